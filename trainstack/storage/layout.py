"""Where things lie below the project's folder ($SHARED_DIR/$PROJECT_NAME, here called home)."""

import hashlib
from pathlib import Path

DEMO = "demo"
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
