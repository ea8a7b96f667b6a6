"""Where things lie below the project's folder ($SHARED_DIR/$PROJECT_NAME, here called home)."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from trainstack.storage import files

DEMO = "demo"
STATE = "training/state.json"  # within a checkpoint
STATE_BYTES = 1 << 20  # what is hashed to trust it; larger files are compared by size
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCAL_PREFIXES = ("/", "./", "../", "~")


def is_local(name: str) -> bool:
    """A model or data set name is a path where it starts like one; else it is a Hub name."""
    return name.startswith(LOCAL_PREFIXES)


def absolute(name: str) -> str:
    """The name as it means the same from every folder: a local path becomes absolute."""
    return str(Path(name).expanduser().resolve()) if is_local(name) else name


def model_folder(home: Path, name: str) -> Path:
    """Where the model ``name`` lies, or will lie once it is downloaded."""
    return home / "models" / folder_name(name)


def dataset_folder(home: Path, name: str, subset: str | None) -> Path:
    """Where the data set lies; each subset has a folder, since each may be fetched alone."""
    return home / "datasets" / (folder_name(name) + (f"@{subset}" if subset else ""))


def folder_name(name: str) -> str:
    """``org/name`` as it is; a local path becomes its last part and a hash of the whole path."""
    if not is_local(name):
        return name
    path = absolute(name)
    return f"local/{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def run_folder(home: Path, run_name: str) -> Path:
    return home / "runs" / run_name


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of all checkpoints by name, newest first; links and other names are none."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """Step and path of the newest checkpoint by name; (0, None) where there is none."""
    return next(iter(checkpoints(folder)), (0, None))


def newest_identity(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Step and identity of the newest checkpoint whose small files verify; (0, None) if none does.

    A damaged one says nothing: the job names it, and takes the one before.
    """
    for step, path in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if not any(files.damage(path, STATE_BYTES)):
                return step, read_state(path)["identity"]
    return 0, None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, counters, identity, versions."""
    return json.loads((checkpoint / STATE).read_bytes())
