"""The settings of a run, and those that were shipped with its code."""

import contextlib
from pathlib import Path
from typing import Any

from trainstack.config.load import read_yaml
from trainstack.errors import ConfigError
from trainstack.storage.layout import CODE


def settings_of(path: Path) -> dict[str, Any]:
    """The settings of a file by their dotted keys; empty if it is not there or cannot be read."""
    with contextlib.suppress(ConfigError):
        sections, _ = read_yaml(path)
        return {f"{s}.{key}": v for s, keys in sections.items() for key, v in keys.items()}
    return {}


def shipped_settings(folder: Path) -> dict[str, Any]:
    """Those of the config.yaml beside the code that a run uses; by hand, beside this code."""
    return settings_of(folder / "code" / "config.yaml") or settings_of(CODE / "config.yaml")


def changed_settings(folder: Path, *sections: str) -> dict[str, tuple[Any, Any]]:
    """Of some sections, what a run has and what was shipped, where they differ."""
    own, shipped = settings_of(folder / "config.yaml"), shipped_settings(folder)
    return {
        key: (value, shipped.get(key))
        for key, value in own.items()
        if key.startswith(tuple(f"{section}." for section in sections))
        and value != shipped.get(key)
    }
