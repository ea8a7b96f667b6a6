"""Where everything is below ``home``, the project's folder ($SHARED_DIR/$PROJECT_NAME)."""

import contextlib
import hashlib
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]  # of this checkout, or of the copy that a run keeps
DEMO = "demo"  # the name of the built-in model and data set
LOCAL_PREFIXES = ("/", "./", "../", "~")
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's
TRACKERS = ("wandb", "trackio")  # of log.report_to; the pins of each are in requirements-NAME.txt


def is_local(name: str) -> bool:
    """Whether the name of a model or data set is a path: it starts like one. Else the Hub's."""
    return name.startswith(LOCAL_PREFIXES)


def absolute(name: str) -> str:
    """The name in a form that means the same in every folder: a local path becomes absolute."""
    return str(Path(name).expanduser().resolve()) if is_local(name) else name


def model_folder(home: Path, name: str) -> Path:
    """Where the model is, or will be once it is fetched."""
    return home / "models" / folder_name(name)


def dataset_folder(home: Path, name: str, subset: str | None) -> Path:
    """Where the data set is; each subset has a folder, since each may be fetched alone."""
    return home / "datasets" / (folder_name(name) + (f"@{subset}" if subset else ""))


def folder_name(name: str) -> str:
    """``org/name`` as it is; a local path becomes its last part and a hash of the whole path."""
    if not is_local(name):
        return name
    path = absolute(name)
    return f"local/{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def run_folder(home: Path, run_name: str) -> Path:
    """Where the run keeps everything, whether it has begun or not."""
    return home / "runs" / run_name


def tracker_packages(home: Path, name: str) -> Path | None:
    """Where setup.sh installed a tracker by the pins beside this code; None if it did not."""
    with contextlib.suppress(OSError):  # a checkout may lack the pins
        pins = (CODE / f"requirements-{name}.txt").read_bytes()
        folder = home / "cache" / f"beside-{hashlib.sha256(pins).hexdigest()[:12]}"
        if (folder / ".ready").exists():
            return folder
    return None
