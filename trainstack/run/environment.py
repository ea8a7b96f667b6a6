"""What a run was made with: code, packages, machine; kept in environment.json."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from trainstack.errors import without_secrets


def describe_environment(repository: Path) -> dict[str, Any]:
    """Git commit and uncommitted difference of a checkout, Python, and every installed package."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "git_commit": _git(repository, "rev-parse", "HEAD"),
        "git_difference": _git(repository, "diff", "HEAD"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(repository: Path, *arguments: str) -> str | None:
    """Git's answer, without the tokens in it; None outside a checkout or without git."""
    try:
        result = subprocess.run(
            ["git", "-C", repository, *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return without_secrets(result.stdout.strip()) if result.returncode == 0 else None
