"""What a checkpoint holds, and which part of it each rank writes."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainstack.distributed import World

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


class SaveError(Exception):
    """A checkpoint could not be written; the earlier ones are untouched."""


@dataclass
class Snapshot:
    """What a checkpoint holds: tensors may be on any device, ``small_files`` are bytes by name."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    small_files: dict[str, bytes]
    synced_first: list[Path] = field(default_factory=list)  # files made durable before it


@dataclass
class Saved:
    """How a save ended, the same on every rank: ``problem`` is None where it was published."""

    step: int
    path: Path
    seconds: float  # from its start to its publication
    size: int  # bytes
    problem: str | None


@dataclass
class Share:
    """What one rank writes of a snapshot."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, under names that differ."""
        yield from self.weights.items()
        yield from self.optimizer.items()


def _share(snapshot: Snapshot, world: World) -> Share:
    optimizer = optimizer_share(snapshot, world.rank, world.world_size)
    return Share(snapshot.weights if world.is_main else {}, optimizer)


def optimizer_share(snapshot: Snapshot, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The optimizer tensors that a rank writes: largest first, each to the least loaded rank.

    Rank 0 starts with the weights as its load, since it writes those.
    """
    load = [0] * world_size
    load[0] = sum(tensor.nbytes for tensor in snapshot.weights.values())
    share = {}
    for name in sorted(snapshot.optimizer, key=lambda n: (-snapshot.optimizer[n].nbytes, n)):
        target = load.index(min(load))
        load[target] += snapshot.optimizer[name].nbytes
        if target == rank:
            share[name] = snapshot.optimizer[name]
    return share


def small_files(causal_lm: torch.nn.Module, model_folder: Path) -> dict[str, bytes]:
    """What from_pretrained needs beside the weights: the model's configuration, the tokenizer."""
    found = {}
    causal_lm.config.architectures = [type(causal_lm).__name__]
    with tempfile.TemporaryDirectory() as temporary:
        causal_lm.config.save_pretrained(temporary)
        if causal_lm.can_generate():
            causal_lm.generation_config.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            found[path.name] = path.read_bytes()
    for pattern in TOKENIZER_FILES:
        for path in model_folder.glob(pattern):
            found[path.name] = path.read_bytes()
    return found
