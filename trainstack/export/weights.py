"""The tensors of an export: rounded, and in shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.errors import ConfigError
from trainstack.hub.weights import INDEX, WEIGHTS
from trainstack.storage import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    shards = [*sharded(weights, most_bytes)]
    if len(shards) == 1:
        return {WEIGHTS: write_safetensors(folder / WEIGHTS, shards[0])}
    entries, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries[name] = write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    entries[INDEX] = files.write_file(folder / INDEX, json.dumps(index, indent=2).encode())
    return entries


def sharded(weights: dict[str, torch.Tensor], most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in their order, so many together as stay below a size; a larger one is alone."""
    shard, size = {}, 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > most_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
