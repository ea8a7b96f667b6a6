"""One save on the disk: each rank writes its share, rank 0 seals and renames."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainstack.checkpoint.names import STATE, checkpoints
from trainstack.checkpoint.snapshot import WEIGHTS, Share, Snapshot
from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.distributed import World
from trainstack.errors import Refused
from trainstack.storage import files, manifest


def _attempt(action: Callable[[], Any], path: Path) -> str | Refused | None:
    """Run an action; what the file system refused becomes one line."""
    try:
        action()
    except OSError as error:
        free = "free space unknown"
        with contextlib.suppress(OSError):  # what broke the one may break the other
            free = f"{files.free_bytes(path) / 1e9:.2f} GB free"
        return f"{error.filename or path}: {error.strerror or error} ({free})"
    except Refused as error:
        return error
    except Exception as error:  # whatever it is, the peers wait for this rank's answer
        return f"{type(error).__name__}: {error}"
    return None


def _prepare_folder(temporary: Path) -> None:
    for leftover in temporary.parent.glob(".checkpoint-*.tmp"):  # of lives killed while saving
        manifest.remove_folder(leftover)
    files.make_folder(temporary / "training")


def _write_share(
    temporary: Path,
    snapshot: Snapshot,
    share: Share,
    world: World,
    rest: Callable[[float], None],
) -> tuple[dict[str, dict], str | None]:
    """Write this rank's files; returns their manifest entries, or the problem."""
    entries: dict[str, dict] = {}
    need = sum(tensor.nbytes for _, tensor in share.tensors())

    def write() -> None:
        if world.is_main:
            for path in snapshot.synced_first:
                files.sync_file(path)
            for name, data in snapshot.small_files.items():
                entries[name] = files.write_file(temporary / name, data)
            entries[WEIGHTS] = write_safetensors(temporary / WEIGHTS, share.weights, rest)
            state = json.dumps(snapshot.state, indent=1).encode()
            entries[STATE] = files.write_file(temporary / STATE, state)
        if share.optimizer:
            name = f"training/optimizer-{world.rank}.safetensors"
            entries[name] = write_safetensors(temporary / name, share.optimizer, rest)

    problem = _attempt(write, temporary)
    if problem is not None:
        problem += f", {need / 1e9:.2f} GB needed by rank {world.rank}"
    return entries, problem


def _publish(
    temporary: Path, final: Path, entries: dict, step: int, still_mine: Callable[[], None]
) -> None:
    manifest.write_manifest(temporary, entries, kind="checkpoint", step=step)
    still_mine()
    if final.exists():  # damaged, and trained again since
        set_aside(final)
    files.rename(temporary, final)
    files.sync_folder(final.parent)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that a person can look and no name promises too much."""
    aside = folder.with_name(f"damaged-{folder.name}")
    manifest.remove_folder(aside)
    files.rename(folder, aside)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` (at least two) checkpoints, a manifest always first."""
    for _, path in checkpoints(folder)[max(2, keep) :]:
        manifest.remove_folder(path)
