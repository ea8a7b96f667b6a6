"""The newest checkpoint that verifies, and what is read from it."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from trainstack.checkpoint.names import checkpoints
from trainstack.checkpoint.publish import set_aside
from trainstack.errors import ConfigError
from trainstack.storage import manifest

log = logging.getLogger("trainstack")


def newest_whole(folder: Path, moves: Callable[[], None] = lambda: None) -> Path | None:
    """The newest checkpoint that verifies, every byte hashed; None if there is none at all.

    A damaged one is named and set aside, and the one before is taken. ConfigError if checkpoints
    exist and none verifies: never silently start over. ``moves`` is called for each piece hashed.
    """
    candidates, problems = checkpoints(folder), []
    for _, path in candidates:
        log.info("resume  verifying %s, every byte of it", path.name)
        problem = next(manifest.damage(path, moves=moves), None)
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
