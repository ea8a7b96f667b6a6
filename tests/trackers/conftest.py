"""Where the real trackers are installed."""

import os
import sys
from pathlib import Path

import pytest

from trainstack.storage import layout


@pytest.fixture(scope="session")
def packages():
    """The folder of a tracker's packages, which tests/run.sh installs; skipped without."""

    def packages_of(tracker: str) -> Path:
        folder = layout.tracker_packages(Path(sys.prefix).parent, tracker)
        if folder is None:
            reason = f"{tracker} is not installed; bash tests/run.sh does"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
        return folder

    return packages_of


@pytest.fixture(scope="session")
def install(packages):
    """Brings a tracker into a project of a test."""

    def install_into(home: Path, tracker: str) -> None:
        folder = packages(tracker)
        (home / "cache").mkdir(parents=True, exist_ok=True)
        (home / "cache" / folder.name).symlink_to(folder)

    return install_into
