"""The files of a model's weights: those that an index names, and what one holds."""

import json
import struct
from pathlib import Path

from trainstack.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def shards_of(index: Path) -> list[str]:
    """The files that an index names, whatever they are called; ConfigError if that cannot be."""
    try:
        content = json.loads(index.read_bytes())
        shards = sorted({*content["weight_map"].values()})
        odd = [n for n in shards if not n.endswith(".safetensors") or {"", ".."} & {*n.split("/")}]
    except (ValueError, KeyError, TypeError, AttributeError):
        content, shards, odd = {}, [], []
    if odd or not shards:
        named = f"{odd[0]}, which is no safetensors file within it" if odd else "no shards"
        raise ConfigError(f"{index.name} names {named}; write both again with save_pretrained")
    if "metadata" not in content:  # which transformers asks for
        raise ConfigError(f'{index.name} has no metadata; add to it: "metadata": {{}}')
    return shards


def shapes_of(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors in a safetensors file, from its header alone.

    ConfigError if it is none, or if its end is missing. The format
    (github.com/huggingface/safetensors): an 8-byte little-endian length, a JSON header, tensors.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        size = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        shapes = {name: [*map(int, tensor["shape"])] for name, tensor in header.items()}
    except (ValueError, AttributeError, LookupError, TypeError, struct.error):
        raise ConfigError(
            f"{path.name} is no safetensors file; bring it again (in a git clone: git lfs pull)"
        ) from None
    if (missing := 8 + length + size - path.stat().st_size) > 0:
        cut = f"{missing:,} bytes are missing at its end"
        raise ConfigError(f"{path.name} was cut: {cut}; copy it there again")
    return shapes
