"""The newest checkpoint that verifies, and what is read from it."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from trainstack.checkpoint.names import by_name, checkpoints, point_to
from trainstack.checkpoint.publish import set_aside
from trainstack.errors import ConfigError
from trainstack.storage import manifest

log = logging.getLogger("trainstack")


def newest_whole(folder: Path, moves: Callable[[], None] = lambda: None) -> Path | None:
    """The newest checkpoint that verifies, every byte hashed; None if there is none at all.

    A damaged one is named and set aside, and the one before is taken. ConfigError if checkpoints
    exist and none verifies: never silently start over. ``moves`` is called for each piece hashed.
    """
    damaged: dict[Path, str] = {}  # with what is wrong
    for _, path in sorted({*by_name(folder)} - {*checkpoints(folder)}):
        log.warning("resume  %s is a copy of another step; it is passed over", path.name)
    for _, path in checkpoints(folder):
        log.info("resume  verifying %s, every byte of it", path.name)
        problem = next(manifest.damage(path, moves=moves), None)
        if problem is None:
            for broken, text in damaged.items():
                log.warning("resume  %s; using %s instead", text, path.name)
                set_aside(broken)
            point_to(path, 0)
            return path
        damaged[path] = f"{path.name} is damaged ({problem})"
    if damaged:
        raise ConfigError(
            f"no checkpoint verifies: {'; '.join(damaged.values())}; restore one into {folder}, or "
            "move them away to start over"
        )
    return None


def read_optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All optimizer tensors of a checkpoint, whatever number of ranks wrote them."""
    tensors = {}
    for path in sorted((checkpoint / "training").glob("optimizer-*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors
