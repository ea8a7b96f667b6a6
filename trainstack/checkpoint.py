"""Checkpoints that are whole or not there: written sharded over ranks, verified before use.

``checkpoint-<step>/`` loads with from_pretrained; training/ beside it holds the optimizer shards
and state.json. No pickle is written or read. Which rank writes what depends on the world size,
what is read does not.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from trainstack import files
from trainstack.config import ConfigError
from trainstack.distributed import World, from_main, gather
from trainstack.places import STATE, checkpoints

log = logging.getLogger("trainstack")
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
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


def save(
    folder: Path,
    snapshot: Snapshot,
    world: World,
    keep: int,
    attempt: str,
    still_mine: Callable[[], None],
) -> Path:
    """Publish a snapshot as ``folder/checkpoint-<step>``. Collective: every rank must call this.

    ``still_mine`` is asked by rank 0 just before the rename and raises where another job owns the
    run. Raises SaveError on every rank where any rank could not write.
    """
    final = folder / f"checkpoint-{snapshot.step}"
    temporary = folder / f".{final.name}.{attempt}.tmp"
    entries, problem = {}, None
    if world.is_main:
        still_mine()  # or the leftovers below may be another life's save in the making
        problem = _attempt(lambda: _prepare_folder(folder, temporary), temporary)
    problem = from_main(problem)
    if problem is None:
        entries, problem = _write_share(temporary, snapshot, world)
    shares = gather((entries, problem))
    problem = next((text for _, text in shares if text), None)
    if world.is_main and problem is None:
        whole = {name: entry for share, _ in shares for name, entry in share.items()}
        problem = _attempt(
            lambda: _publish(temporary, final, whole, snapshot.step, still_mine), final
        )
    problem = from_main(problem)
    if problem is not None:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(problem)
    if world.is_main:
        prune(folder, keep)
    return final


def _attempt(action: Callable[[], Any], path: Path) -> str | None:
    """Run an action; what the file system refused becomes one line."""
    try:
        action()
    except OSError as error:
        free = files.free_bytes(path.parent) / 1e9
        return f"{error.filename or path}: {error.strerror} ({free:.2f} GB free)"
    return None


def _prepare_folder(folder: Path, temporary: Path) -> None:
    for leftover in folder.glob(".checkpoint-*.tmp"):  # of lives that were killed while saving
        shutil.rmtree(leftover)
    (temporary / "training").mkdir(parents=True)


def _write_share(
    temporary: Path, snapshot: Snapshot, world: World
) -> tuple[dict[str, dict], str | None]:
    """Write this rank's files; returns their manifest entries, or the problem."""
    entries: dict[str, dict] = {}

    def write() -> None:
        if world.is_main:
            for name, data in snapshot.small_files.items():
                entries[name] = files.write_file(temporary / name, data)
            entries[WEIGHTS] = write_safetensors(temporary / WEIGHTS, snapshot.weights)
            state = json.dumps(snapshot.state, indent=1).encode()
            entries[STATE] = files.write_file(temporary / STATE, state)
        mine = optimizer_share(snapshot, world.rank, world.world_size)
        if mine:
            name = f"training/optimizer-{world.rank}.safetensors"
            entries[name] = write_safetensors(temporary / name, mine)

    problem = _attempt(write, temporary)
    return entries, problem


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


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write tensors one by one through our own handle, hashed and synced; returns the entry.

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
    with files.HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_raw_bytes(tensor))
    return file.entry()


def _raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes on the host; numpy has no bfloat16, so it is viewed as bytes first."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _publish(
    temporary: Path, final: Path, entries: dict, step: int, still_mine: Callable[[], None]
) -> None:
    files.write_manifest(temporary, entries, kind="checkpoint", step=step)
    still_mine()
    if final.exists():  # damaged, and trained again since
        set_aside(final)
    os.rename(temporary, final)
    files.sync_folder(final.parent)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that a person can look and no name promises too much."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, every byte hashed; None where there is none at all.

    A damaged one is named, set aside, and the one before is taken. ConfigError where checkpoints
    exist and none verifies: never silently start over.
    """
    candidates, problems = checkpoints(folder), []
    for _, path in candidates:
        problem = next(files.damage(path), None)
        if problem is None:
            for broken in problems:
                log.warning("resume  %s; using %s instead", broken, path.name)
            _set_aside_newer(candidates, path)
            return path
        problems.append(f"{path.name} is damaged ({problem})")
    if problems:
        raise ConfigError(
            f"no checkpoint verifies: {'; '.join(problems)}; restore one into {folder}, or move "
            "them away to start over"
        )
    return None


def _set_aside_newer(candidates: list[tuple[int, Path]], good: Path) -> None:
    for _, path in candidates:
        if path == good:
            return
        set_aside(path)


def read_optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All optimizer tensors of a checkpoint, whatever number of ranks wrote them."""
    tensors = {}
    for path in sorted((checkpoint / "training").glob("optimizer-*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` (at least two) checkpoints, a manifest always first."""
    for _, path in checkpoints(folder)[max(2, keep) :]:
        files.remove_folder(path)
