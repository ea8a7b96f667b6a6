"""The model that an adapter belongs to, by its name and by its content; loads no torch."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainstack.config.schema import Config
from trainstack.data.store import is_of_weights
from trainstack.errors import ConfigError
from trainstack.storage import layout
from trainstack.storage.manifest import damage, read_manifest


def base_of(home: Path, config: Config) -> str | None:
    """A name for the content of the model that an adapter belongs to; None without an adapter.

    ConfigError if it is not there.
    """
    if not config.adapter.type:
        return None
    return content_of(layout.model_folder(home, config.model.name), config.model.name)


def check_base(saved: dict[str, Any], folder: Path, name: str) -> None:
    """ConfigError if a model is not the one beside which a run of that identity learned."""
    found = content_of(folder, name)
    check_whole(folder, name)
    if saved.get("base", found) != found:
        raise ConfigError(
            f"model {name} in {folder} has other weights than the adapter learned beside; bring "
            f"those back: FORCE_REFRESH=1 bash download_data_model.sh model.name={name}"
        )


def check_whole(folder: Path, name: str, moves: Callable[[], None] = lambda: None) -> None:
    """ConfigError if a model is not what it was when it was brought; every byte is read.

    ``moves`` is called for each piece.
    """
    if problem := next(damage(folder, moves=moves), None):
        raise ConfigError(
            f"model {name}, beside which the adapter learns, is another than when it was brought "
            f"({problem}); bring that back, or: FORCE_REFRESH=1 bash download_data_model.sh "
            f"model.name={name}"
        )


def content_of(folder: Path, name: str) -> str:
    """A hash of the hashes of a model's weights and config.json. ConfigError if it is not there."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name}, which the adapter belongs to, cannot be read ({error}); run: bash "
            f"download_data_model.sh model.name={name}"
        ) from None
    found = {n: e["sha256"] for n, e in files.items() if is_of_weights(n) or n == "config.json"}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def named_base(name: str, folder: Path) -> dict[str, Any]:
    """What peft looks for: the model on the Hub, and its commit; of a local one only its name.

    ``folder``: that holds the model. A path would be of this machine alone.
    """
    if layout.is_local(name):
        return {"base_model_name_or_path": Path(name).name, "revision": None}
    commit = read_manifest(folder).get("commit")
    return {"base_model_name_or_path": name, "revision": commit}
