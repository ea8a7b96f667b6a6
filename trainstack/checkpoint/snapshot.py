"""What a checkpoint holds, and which part of it each rank writes."""

import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WEIGHTS = "model.safetensors"
ADAPTER_NAME = "default"  # of an adapter within its model
CONFIG, GENERATION = "config.json", "generation_config.json"
ENDS = "eos_token_id"
TEMPLATE = "chat_template.jinja"
JSON_FILES = (CONFIG, GENERATION, "tokenizer_config.json")
TOKENIZER_PATTERNS = (  # of what is copied beside the weights, whatever tokenizer it is
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "additional_chat_templates/*.jinja",
)
TEMPLATE_PATTERNS = ("chat_template", "additional_chat_templates")


class SaveError(Exception):
    """A checkpoint could not be written; the earlier ones are untouched."""


@dataclass
class Share:
    """The tensors that one rank writes, on any device; no two ranks have the same one.

    ``weights`` under the names of model.safetensors, ``optimizer`` as ``<parameter>/<state>``.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them; the names of weights and of optimizer tensors differ."""
        yield from self.weights.items()
        yield from self.optimizer.items()


@dataclass
class Snapshot:
    """One checkpoint as a rank sees it: its own tensors, and what rank 0 writes for all."""

    step: int
    share: Share
    state: bytes  # the content of state.json
    small_files: dict[str, bytes]  # by name: what from_pretrained needs beside the weights
    synced_first: list[Path] = field(default_factory=list)  # files made durable before it
    best_step: int = 0  # of the checkpoint that is kept beside the newest ones; 0: none


@dataclass
class Saved:
    """How a save ended, the same on every rank; ``problem`` is None if it was published."""

    step: int
    path: Path
    seconds: float  # from its start to its publication
    size: int  # bytes
    problem: str | None
    gpu_seconds: float = 0.0  # for which this rank's GPU waited to update what was being copied


def replicated_share(
    weights: dict[str, torch.Tensor],
    weight_bytes: int,
    optimizer: dict[str, torch.Tensor],
    rank: int,
    world_size: int,
) -> Share:
    """A rank's share if every rank has all tensors: rank 0 writes the weights, others need none.

    The optimizer's are spread: largest first, each to the rank with the least to write so far.
    ``weight_bytes``: alike on all ranks.
    """
    load = [0] * world_size
    load[0] = weight_bytes
    own = {}
    for name in sorted(optimizer, key=lambda n: (-optimizer[n].nbytes, n)):
        target = load.index(min(load))
        load[target] += optimizer[name].nbytes
        if target == rank:
            own[name] = optimizer[name]
    return Share(weights if rank == 0 else {}, own)


def small_files(
    causal_lm: torch.nn.Module,
    model_folder: Path,
    ends: list[int],
    template: str | None,
    odd: Collection[int] = (),
) -> dict[str, bytes]:
    """What from_pretrained needs beside the weights: the model's configuration, the tokenizer.

    Of an adapter its own configuration, which names its model.

    ``ends``: the tokens at which the model stops when it generates. ``template``: a chat template
    that took the place of all that the model has; None: none did. ``odd``: ids of tokens that the
    model's settings name and do not mean.
    """
    found = {}
    causal_lm.config.architectures = [type(causal_lm).__name__]
    with tempfile.TemporaryDirectory() as temporary:
        adapters = getattr(causal_lm, "peft_config", {})
        adapters.get(ADAPTER_NAME, causal_lm.config).save_pretrained(temporary)
        if causal_lm.can_generate():
            causal_lm.generation_config.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            found[path.name] = path.read_bytes()
    for pattern in TOKENIZER_PATTERNS:
        if template is None or not pattern.startswith(TEMPLATE_PATTERNS):
            for path in model_folder.glob(pattern):
                found[str(path.relative_to(model_folder))] = path.read_bytes()
    if template is not None:
        found[TEMPLATE] = template.encode()
    for name in {*JSON_FILES} & found.keys():  # a template has a file of its own, or is in one
        found[name] = as_learned(name, found[name], ends, TEMPLATE in found, odd)
    return found


def as_learned(
    name: str, content: bytes, ends: list[int], has_template: bool, odd: Collection[int]
) -> bytes:
    """A file of settings that says what was learned; the same bytes where it does already.

    Changed as JSON: transformers 5 refuses to save settings that contradict each other once one is
    changed.
    """
    before = json.loads(content)
    settings, known = dict(before), ends_in(before.get(ENDS))
    is_odd = not {*known} <= {*ends}  # for those who read config.json alone
    if (name == GENERATION and {*known} != {*ends}) or (name == CONFIG and is_odd):
        settings[ENDS] = ends
    if name == GENERATION:  # config.json also says which row of the embedding is for padding
        for key, ids in tokens_in(before).items():
            if key != ENDS and not {*odd}.isdisjoint(ids):
                del settings[key]
    settings.pop("auto_map", None)  # names code that was not run, and that is not here
    if has_template:
        settings.pop("chat_template", None)
    if settings == before:
        return content
    return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def tokens_in(settings: dict[str, Any]) -> dict[str, list[int]]:
    """The ids of special tokens that a model's settings name, by their keys."""
    return {key: ends_in(ids) for key, ids in settings.items() if key.endswith("_token_id")}


def ends_in(ends: Any) -> list[int]:
    """The ids in an eos_token_id of a model's settings, which may name one, several or none."""
    return [n for n in (ends if isinstance(ends, list) else [ends]) if isinstance(n, int)]
