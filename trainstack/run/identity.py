"""What may not change between two attempts of a run, and what may."""

from typing import Any

from trainstack.config.schema import Config
from trainstack.errors import Refused


def identity(config: Config, key: str) -> dict[str, Any]:
    """What may not change between two attempts of a run; ``key``: of its corpus."""
    return {**config.identity(), "tokens": key}


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], run_name: str) -> None:
    """Refused if any of it differs, showing each that does."""
    different = [
        f"{key}={wanted.get(key)} (the run has {saved.get(key)})"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if different:
        raise Refused(
            f"run {run_name} cannot continue with {', '.join(different)}; "
            "put it back, or choose another run.name"
        )


def changed_settings(saved: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """One line for each setting ``section.key`` that differs between two configurations."""
    return [
        f"{section}.{key}: {saved.get(section, {}).get(key)} -> {value}"
        for section, values in now.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]
