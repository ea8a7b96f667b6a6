"""What to take of a repository and what to refuse: no code, no pickles, no other subset.

Every refusal is a ConfigError that names the fix.
"""

import importlib.util
import json
import logging
import math
import os
import re
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from trainstack.errors import ConfigError
from trainstack.prepare import readers
from trainstack.storage import manifest

WEIGHTS = "model.safetensors"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SETTINGS = (".json", ".jinja", ".txt", ".model")  # of the model and its tokenizer
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
A_TOKENIZER = re.compile(r"tokenizer\.json|.*\.model|vocab\.(json|txt)")  # any one is enough
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # they define subsets and splits


class Origin(Protocol):
    """Where files come from: a commit on the Hub, or local originals."""

    sizes: dict[str, int]  # bytes of each file
    folder: Path  # where collected files are

    def collect(self, names: Iterable[str]) -> None:
        """Bring these files into ``folder``."""


def is_model_file(name: str) -> bool:
    """Whether a file can matter to a model: at the top of its folder, settings or weights."""
    suffixes = (*SETTINGS, *PICKLES, ".safetensors")
    return "/" not in name and name.endswith(suffixes) and name != manifest.MANIFEST


def is_data_file(name: str) -> bool:
    """Whether a file can matter to a data set."""
    is_hidden = name.startswith(".") or "/." in name
    return name in CARDS or (not is_hidden and name.endswith(readers.SUFFIXES))


def choose_model(origin: Origin, wants_weights: bool) -> list[str]:
    """The files that transformers loads; ConfigError if some are missing, or code would run."""
    names = [name for name in origin.sizes if is_model_file(name)]
    if "config.json" not in names:
        raise ConfigError("has no config.json; name a model that transformers can load")
    origin.collect(["config.json"])
    refuse_code(origin.folder / "config.json")
    shards = [name for name in names if SHARD.fullmatch(name)] if INDEX in names else []
    weights = [WEIGHTS] if WEIGHTS in names else shards
    pickles = [name for name in names if name.endswith(PICKLES)]
    if wants_weights and pickles and not weights:
        raise ConfigError(
            f"has its weights only as {pickles[0]}, a format that can run code when it is loaded;"
            " name a repository with model.safetensors, or convert it with save_pretrained"
        )
    if wants_weights and not weights:
        raise ConfigError(f"has no {WEIGHTS}; name another model, or set model.init=scratch")
    if not any(A_TOKENIZER.fullmatch(name) for name in names):
        raise ConfigError(
            "has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt); put one"
            " beside its config.json, or name another model"
        )
    settings = [name for name in names if name.endswith(SETTINGS) and name != INDEX]
    index = [INDEX] if INDEX in names and WEIGHTS not in names else []
    return settings + (index + weights if wants_weights else [])


def refuse_code(config: Path) -> None:
    """ConfigError if the architecture is Python code that comes along with the model.

    An auto_map alone does no harm: many models kept theirs after transformers took them in.
    """
    try:
        content = json.loads(config.read_bytes())
        model_type, code = content.get("model_type") or "", content.get("auto_map")
    except (ValueError, AttributeError):
        raise ConfigError("its config.json is no JSON object; name another model") from None
    transformers = importlib.util.find_spec("transformers")  # finds it, does not import it
    built_in = Path(transformers.origin).parent / "models" / model_type.replace("-", "_")
    if code and not (model_type and built_in.is_dir()):
        raise ConfigError(
            f"needs Python code of its own (auto_map, model_type {model_type or 'missing'}), which"
            " is never run here; name a model that transformers has built in"
        )


def model_facts(origin: Origin, names: list[str]) -> dict[str, int | None]:
    """What the manifest says of the collected weights: bytes, parameters (None if there are none).

    ConfigError if a shard is missing, or a file is not in the safetensors format.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        try:
            shards = set(json.loads((origin.folder / INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{INDEX} names no shards; name another model") from None
        if missing := sorted(shards - set(weights)):
            raise ConfigError(f"{INDEX} names {missing[0]}, which is not there; name another model")
    return {
        "weight_bytes": sum(origin.sizes[name] for name in weights),
        "parameters": sum(count_parameters(origin.folder / n) for n in weights) or None,
    }


def count_parameters(path: Path) -> int:
    """Elements of all tensors in a safetensors file, from its header alone.

    The format (github.com/huggingface/safetensors): an 8-byte little-endian length, a JSON header.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        return sum(math.prod(tensor["shape"]) for tensor in header.values())
    except (ValueError, AttributeError, KeyError, TypeError, struct.error):
        raise ConfigError(
            f"{path.name} is no safetensors file; if the folder is a git clone: git lfs pull"
        ) from None


def choose_data(origin: Origin, name: str, subset: str | None) -> tuple[list[str], dict[str, Any]]:
    """The files of one subset, with all its splits, and the facts of them for the manifest.

    ConfigError if it is a script, or if no file of it can be read here.
    """
    script = f"{name.rpartition('/')[2]}.py"
    if script in origin.sizes:
        raise ConfigError(f"is made by the script {script}, which is never run here; name another")
    readable = ", ".join(readers.SUFFIXES)
    if not any(is_data_file(name) and name not in CARDS for name in origin.sizes):
        raise ConfigError(f"has no {readable} file; name another data set")
    cards = [card for card in CARDS if card in origin.sizes]
    origin.collect(cards)
    texts = {card: (origin.folder / card).read_bytes() for card in cards}
    splits = resolve_splits(origin.sizes, texts, subset)
    paths = sorted({path for split in splits.values() for path in split} - {*cards})
    if odd := [path for path in paths if not path.endswith(readers.SUFFIXES)]:
        raise ConfigError(f"consists of files such as {odd[0]}; name one with {readable} files")
    return [*cards, *paths], {"subset": subset, "splits": splits}


def resolve_splits(
    names: Iterable[str], cards: dict[str, bytes], subset: str | None
) -> dict[str, list[str]]:
    """The files of each split of a subset, as the library ``datasets`` finds them.

    ``names``: all files; ``cards``: the content of those that define subsets. The library is given
    empty files of these names, so that it sends no request and treats a local folder alike. It is
    asked now, while all names are known: asked for one subset, it wants the files of the first too.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "data"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(cards.get(name, b""))
        try:
            builder = datasets.load_dataset_builder(str(root), subset, cache_dir=scratch)
        except Exception as error:  # of YAML, of zip, ValueError, FileNotFoundError, its own
            words = " ".join(str(error).partition("Example of")[0].split()).replace(str(root), "it")
            raise ConfigError(
                f"datasets cannot resolve its files ({words[:300]}); set data.subset to one that it"
                " has, or name local files"
            ) from None
        found = (builder.config.data_files or {}).items()
        return {str(split): [os.path.relpath(p, root) for p in paths] for split, paths in found}
