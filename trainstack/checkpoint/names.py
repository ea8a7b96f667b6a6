"""Which checkpoints a run has, by their names and small files; no torch, for login nodes."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from trainstack.checkpoint.state import STATE, TrainState, read_state
from trainstack.errors import ConfigError, Failed
from trainstack.storage import files, manifest

STATE_BYTES = 1 << 20  # what is hashed to trust it; larger files are compared by size
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LATEST, BEST = "latest", "best"  # links beside them, never one to a name that is not there
BYTES_PER_PARAMETER = 12  # of a checkpoint: weights and two moments of AdamW, each in fp32


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of all checkpoints, newest first; links, copies and other names are none."""
    found = by_name(folder)
    return [(step, path) for step, path in found if not is_copy(path, step)]


def by_name(folder: Path) -> list[tuple[int, Path]]:
    """The same with copies."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def linked(folder: Path, name: str) -> Path | None:
    """The checkpoint that a link leads to; None if there is no such link."""
    with contextlib.suppress(OSError):
        path = folder / os.readlink(folder / name)
        return path if path.is_dir() else None
    return None


def point_to(newest: Path, best_step: int) -> None:
    """Let ``latest`` lead to a checkpoint, and ``best`` to that of a step, if there is one."""
    wanted = (LATEST, newest), (BEST, newest.with_name(f"checkpoint-{best_step}"))
    folder = newest.parent
    changed = [(k, path) for k, path in wanted if path.is_dir() and linked(folder, k) != path]
    with contextlib.suppress(OSError):  # the checkpoint is there, if a file system has no links
        for name, path in changed:
            files.replace_link(folder / name, path.name)
        if changed:
            files.sync_folder(folder)


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """Step and path of the newest checkpoint by name; (0, None) if there is none."""
    return next(iter(checkpoints(folder)), (0, None))


def named_checkpoint(folder: Path, which: str) -> Path:
    """That of a step, the one that ``best`` leads to, or the newest (an empty text).

    ConfigError, with the steps that are there, if it is not.
    """
    there = {str(step): path for step, path in checkpoints(folder)}
    found = linked(folder, BEST) if which == BEST else there.get(which or next(iter(there), ""))
    if found is None:
        wanted = {"": "checkpoint", BEST: "best checkpoint (eval.keep_best)"}
        steps = f"it has steps {', '.join(reversed(there))}" if there else "it has saved none yet"
        raise ConfigError(
            f"run {folder.parent.name} has no {wanted.get(which, f'checkpoint {which}')}; {steps}"
        )
    return found


def newest_state(folder: Path) -> tuple[int, TrainState | None]:
    """Step and state of the newest checkpoint whose small files verify; (0, None) if none does.

    A damaged one is passed over: the job names it, and takes the one before. Refused if another
    version of the code wrote it.
    """
    for step, path in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError):
            if manifest.is_whole(path, STATE_BYTES):
                return step, read_state(path)
    return 0, None


def check_not_lost(folder: Path, events: list[dict[str, Any]]) -> None:
    """Failed if a run has none of the checkpoints that its events name: it never starts over."""
    published = [event["step"] for event in events if event["event"] in ("checkpoint", "branch")]
    if published and not by_name(folder):
        raise Failed(
            f"run {folder.parent.name} has lost its checkpoints, the last of step "
            f"{max(published):,}: restore one into {folder}, or, to start over, choose another "
            f"run.name or remove {folder.parent}"
        )


def is_copy(checkpoint: Path, step: int) -> bool:
    """Whether the state of a checkpoint is of another step than its name says."""
    return files.object_in(checkpoint / STATE).get("step", step) != step


def kept_stores(folder: Path | None) -> list[str]:
    """The names of the stores that a run has learned from so far; none without a checkpoint."""
    _, saved = newest_state(folder) if folder else (0, None)
    return saved.identity["tokens"].split("+") if saved and "tokens" in saved.identity else []
