"""The tensors of an export: rounded, and in shards."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn

from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.errors import ConfigError
from trainstack.hub.weights import INDEX
from trainstack.storage import files


def round_to(causal_lm: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that type, but for those that transformers keeps in fp32 when it loads them.

    ConfigError for values that it does not have.
    """
    kept = [*causal_lm._get_dtype_plan(dtype)]
    for name, parameter in causal_lm.named_parameters():
        if any(part in name for part in kept):
            continue
        rounded = parameter.data.to(dtype)
        if not torch.isfinite(rounded).all():
            fix = "write --dtype bf16" if torch.isfinite(parameter).all() else "choose another step"
            raise ConfigError(f"{name} has values beyond {dtype}; {fix}")
        parameter.data = rounded


def write_weights(
    folder: Path, weights: dict[str, torch.Tensor], most_bytes: int
) -> dict[str, dict[str, Any]]:
    """The manifest entries of one file, or of shards and their index, as from_pretrained reads."""
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most_bytes,
    )
    entries = {
        file: write_safetensors(folder / file, {name: weights[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        entries[INDEX] = files.write_file(folder / INDEX, json.dumps(index, indent=2).encode())
    return entries
