"""A folder on a node's own disk that a job leaves to the next: one archive on the shared disk."""

import contextlib
import os
import shutil
import tarfile
import time
from pathlib import Path

from trainstack.storage import files

OLD_SECONDS = 86400


def unpack(archive: Path, folder: Path) -> bool:
    """Make the folder as the archive has it; whether it did. It must not be there yet.

    What is in it is run, so an archive of somebody else is none.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        if archive.stat().st_uid != os.getuid():
            return False
        with tarfile.open(archive) as tar:
            # Python knows it since 3.11.4: no path leads out of the folder.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(unfinished, **safe)
        unfinished.rename(folder)
    except (OSError, tarfile.TarError, EOFError):  # none, a damaged one: the job makes its own
        shutil.rmtree(unfinished, ignore_errors=True)
        return False
    return True


def pack(folder: Path, archive: Path) -> None:
    """Let the archive have what the folder has; readers see the old one or the new one."""
    files.make_folder(archive.parent)
    for left in archive.parent.glob(f".{archive.name}.*.tmp"):  # of jobs that ended meanwhile
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD_SECONDS:
                left.unlink()
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
    with contextlib.suppress(OSError):  # some went meanwhile: it is not quiet
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
