"""What submit.sh said when it refused a run before the queue: it leaves nothing else behind.

submit.sh itself keeps what its own half refuses, in the same folder.
"""

import contextlib
import re
import sys
import time
from pathlib import Path

from trainstack.errors import ConfigError, without_secrets
from trainstack.run.folder import RunFolder
from trainstack.storage import files
from trainstack.units import age, seconds_of

MOST = 2000  # characters that are kept
UNKNOWN = ".unnamed"  # in place of a run's name: its settings could not be read


def file_of(home: Path, name: str) -> Path:
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    return home / "cache" / "refused" / (name if is_plain else UNKNOWN)


def tell(text: str, home: Path, config_file: Path, overrides: list[str]) -> None:
    """Say it, and keep it under the run's name, if that is known, without what may be a token."""
    print(text, file=sys.stderr)
    name = next((o[9:] for o in reversed(overrides) if o.startswith("run.name=")), "")
    with contextlib.suppress(ConfigError):  # a broken file
        from trainstack.config.load import load  # 0.2 s, and monitor.sh does without

        name = name or load(config_file, []).run.name
    with contextlib.suppress(OSError):  # the folder is somebody else's
        path = file_of(home, name)
        files.make_folder(path.parent)
        path.write_text(without_secrets(text[:MOST]) + "\n")


def files_for(run: RunFolder) -> tuple[Path, Path]:
    """Its own, and that of nobody, which may be its own."""
    home = run.path.parents[1]
    return file_of(home, run.path.name), file_of(home, UNKNOWN)


def forget(run: RunFolder) -> None:
    """A submission was accepted, or a trial of one."""
    for path in files_for(run):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def last(run: RunFolder) -> str:
    """What was said last, and how long ago; empty if something happened in the run since.

    What was said of a run without a name is told only of one that is not there.
    """
    with contextlib.suppress(OSError):
        since = max((seconds_of(event["at"]) for event in run.events()), default=0.0)
        own, unnamed = files_for(run)
        for path in (own,) if run.path.is_dir() else (own, unnamed):
            if path.exists() and (at := path.stat().st_mtime) > since:
                text = " | ".join(path.read_text(errors="replace").split("\n")).strip(" |")
                whose = ", for a run whose name is not known" if path is unnamed else ""
                return f"{age(time.time() - at)} ago, before the queue{whose}: {text}"
    return ""
