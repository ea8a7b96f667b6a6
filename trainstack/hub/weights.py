"""The files of a model's weights: those that an index names, and what one holds."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trainstack.errors import ConfigError, first_line

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


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
    """The shapes of all tensors in a safetensors file; ConfigError if it is none, or not whole."""
    try:
        with safe_open(path, "np") as file:  # reads the header alone, and loads no torch
            return {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    except SafetensorError as error:
        raise ConfigError(
            f"{path.name} is no whole safetensors file ({first_line(error)}); bring it again "
            "(in a git clone: git lfs pull)"
        ) from None
