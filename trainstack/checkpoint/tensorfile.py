"""Tensors as a safetensors file, through our own handle: hashed, synced, in our own mode."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainstack.storage import files

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], pause: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """Write tensors one by one through our own handle, hashed and synced; returns the entry.

    ``pause`` is called after each chunk with the seconds of work that it took.

    The format (github.com/huggingface/safetensors): an 8-byte little-endian length, a JSON header
    with dtype, shape and offsets, then the raw data. The library's own writer needs the whole file
    in memory to hash it, writes mode 0600 and hides a full disk behind its own exception.
    """
    # Widest first keeps every tensor aligned; by name makes equal weights equal files.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: files.HashedFile) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            # Viewed as bytes, since numpy has no bfloat16.
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            for start in range(0, raw.size, files.CHUNK_BYTES):
                started = time.thread_time()
                file.write(raw[start : start + files.CHUNK_BYTES])
                pause(time.thread_time() - started)

    return files.write_with(path, fill)
