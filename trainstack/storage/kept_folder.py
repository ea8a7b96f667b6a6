"""A folder on a node's own disk that a job leaves to the next: one archive on the shared disk."""

import contextlib
import shutil
import tarfile
import time
from pathlib import Path

from trainstack.storage import files


def unpack(archive: Path, folder: Path) -> bool:
    """Make the folder as the archive has it; whether it did. It must not be there yet."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unfinished, filter="data")
        unfinished.rename(folder)
    except (OSError, tarfile.TarError, EOFError):  # none, a damaged one: the job makes its own
        shutil.rmtree(unfinished, ignore_errors=True)
        return False
    return True


def pack(folder: Path, archive: Path) -> None:
    """Let the archive have what the folder has; readers see the old one or the new one."""
    files.make_folder(archive.parent)
    unfinished = archive.with_name(f".{archive.name}.{time.time_ns()}.tmp")
    try:
        with tarfile.open(unfinished, "w") as tar:
            tar.add(folder, ".")
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)


def pack_when_quiet(folder: Path, archive: Path, seconds: float) -> None:
    """Pack it again and again, whenever it has changed and then not for some time. Never ends."""
    packed = before = content(folder)
    while True:
        time.sleep(seconds)
        now = content(folder)
        if now == before != packed:
            with contextlib.suppress(OSError):  # the disk is full, or another's: the next one may
                pack(folder, archive)
            packed = now
        before = now


def content(folder: Path) -> tuple[int, int]:
    """How many files it has, and their bytes."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it went meanwhile
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)
