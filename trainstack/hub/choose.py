"""What to take of a model and what to refuse: no code, no pickles.

Every refusal is a ConfigError that names the fix.
"""

import importlib.util
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from trainstack.errors import ConfigError
from trainstack.hub.weights import INDEX, WEIGHTS, shapes_of, shards_of
from trainstack.storage import manifest
from trainstack.storage.files import read_object
from trainstack.storage.layout import ADAPTER_CONFIG

OBJECTS = (  # files of JSON that decide what a model or its tokenizer is
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
SETTINGS = (".json", ".jinja", ".txt", ".model")  # of the model and its tokenizer
TEMPLATES = "additional_chat_templates/"  # beside chat_template.jinja, by their names
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
A_TOKENIZER = re.compile(r"tokenizer\.json|.*\.model|vocab\.(json|txt)")  # any one is enough
GGUF = "has its weights as GGUF; name what they were made from, which has model.safetensors"
CARD = "README.md"  # what the Hub shows of a repository; people edit it
UNMERGED = (
    f"is an adapter to another model ({ADAPTER_CONFIG}); merge them first (peft: merge_and_unload,"
    " then save_pretrained) and name the folder with the result"
)


def is_edited(card: Path, known: dict[str, Any]) -> bool:
    """Whether people changed an export's card; ``known``: the manifest that was beside it."""
    return manifest.hash_file(card)["sha256"] != known.get("card")


class Origin(Protocol):
    """Where files come from: a commit on the Hub, or local originals."""

    sizes: dict[str, int]  # bytes of each file
    folder: Path  # where collected files are
    listing: list[str]  # what else is there, to be named

    def collect(self, names: Iterable[str]) -> None:
        """Bring these files into ``folder``."""


def is_model_file(name: str) -> bool:
    """Whether a file can matter to a model: at the top of its folder, settings or weights."""
    suffixes = (*SETTINGS, *PICKLES, ".safetensors")
    if name.startswith(TEMPLATES):
        return name.endswith(".jinja")
    return "/" not in name and name.endswith(suffixes) and name != manifest.MANIFEST


def choose_model(origin: Origin, wants_weights: bool) -> list[str]:
    """The files that transformers loads; ConfigError if some are missing, or code would run."""
    names = [name for name in origin.sizes if is_model_file(name)]
    if "config.json" not in names:
        raise ConfigError(without_config(origin.listing))
    origin.collect(["config.json"])
    refuse_code(origin.folder / "config.json")
    weights = choose_weights(origin) if wants_weights else []
    if wants_weights and not weights:
        raise ConfigError(without_weights(names, origin.listing))
    if not any(A_TOKENIZER.fullmatch(name) for name in names):
        raise ConfigError(
            "has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt); put that"
            " of the model that it was made from beside its config.json, or name another model"
        )
    unused = (".index.json", ADAPTER_CONFIG)
    return [n for n in names if n.endswith(SETTINGS) and not n.endswith(unused)] + weights


def without_config(names: list[str]) -> str:
    """What that is which has no config.json, and what to name instead."""
    inner = [name.removesuffix("/config.json") for name in names if name.endswith("/config.json")]
    if ADAPTER_CONFIG in names:
        return UNMERGED
    if inner:
        some = ", ".join(inner[:3]) + (" ..." if len(inner) > 3 else "")
        way = "name that folder, of the Hub once it is here (hf download)"
        return f"has config.json only further down ({some}); {way}"
    if any(name.endswith(".gguf") for name in names):
        return GGUF
    return "has no config.json, which says what the model is; put it there, or name another model"


def without_weights(names: list[str], listing: list[str]) -> str:
    """What those files of a model are that transformers does not load, and what to do."""
    pickles = [n for kind in PICKLES for n in names if n.endswith(kind) and "model" in n]
    if pickles:
        return (
            f"has its weights only as {pickles[0]}, a format that can run code when it is loaded;"
            " name a repository with model.safetensors, or convert it with save_pretrained"
        )
    if ADAPTER_CONFIG in names:
        return UNMERGED
    if others := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"has no {WEIGHTS} and no {INDEX}, and transformers loads no {others[0]}; name another"
            " repository of it, or convert it with save_pretrained"
        )
    is_gguf = any(name.endswith(".gguf") for name in listing)
    problem = GGUF if is_gguf else f"has no {WEIGHTS}; bring it too, name another model"
    return f"{problem}, or set model.init=scratch"


def choose_weights(origin: Origin) -> list[str]:
    """The files of the weights as transformers finds them: one, or an index and what it names."""
    if WEIGHTS in origin.sizes or INDEX not in origin.sizes:
        return [WEIGHTS] if WEIGHTS in origin.sizes else []
    origin.collect([INDEX])
    shards = shards_of(origin.folder / INDEX)
    if missing := [name for name in shards if name not in origin.sizes]:
        fix = "bring it too, or name another model"
        raise ConfigError(f"{INDEX} names {missing[0]}, which is not there; {fix}")
    return [INDEX, *shards]


def refuse_code(config: Path) -> None:
    """ConfigError if the architecture is Python code that comes along with the model.

    An auto_map alone does no harm: many models kept theirs after transformers took them in.
    """
    content = read_object(config)
    model_type, code = str(content.get("model_type") or ""), content.get("auto_map")
    transformers = importlib.util.find_spec("transformers")  # finds it, does not import it
    built_in = Path(transformers.origin).parent / "models" / model_type.replace("-", "_")
    if code and not (model_type and built_in.is_dir()):
        raise ConfigError(
            f"needs Python code of its own (auto_map, model_type {model_type or 'missing'}), which"
            " is never run here; name a model that transformers has built in"
        )


def model_facts(origin: Origin, names: list[str]) -> dict[str, Any]:
    """What the manifest says of the weights, collected or not: bytes, parameters (None: unknown).

    ConfigError if a file is not in the safetensors format, or settings are no JSON object.
    """
    for name in [name for name in OBJECTS if name in names]:
        read_object(origin.folder / name)
    weights = [name for name in names if name.endswith(".safetensors")]
    shapes = [shape for n in weights for shape in shapes_of(origin.folder / n).values()]
    return {
        "weight_bytes": sum(origin.sizes[name] for name in weights),
        "parameters": sum(math.prod(shape) for shape in shapes) or None,
        "has_weights": WEIGHTS in origin.sizes or INDEX in origin.sizes,
    }
