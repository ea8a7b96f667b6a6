"""Files that survive a crash: the one thin layer through which everything durable is written.

An fsync makes a file's content durable, but not its name: that takes an fsync of its folder
(fsync(2)). A rename replaces a name at once (rename(2)). manifest.py publishes folders with these.

Each change that the protocols rely on is announced before it is made (``watched_by``), so that a
test can record a save, cut it short anywhere, and see whether what is left still resumes.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError, Failed
from trainstack.units import bytes_text

CHUNK_BYTES = 8 << 20  # written at once
READ_BYTES = 1 << 20  # read at once, to be hashed
EIO_TRIES = 3  # a shared file system that fails over answers EIO for a moment
# Called as (operation, path, detail) before each change: create, write (detail: the bytes), sync,
# sync_folder, rename and link (detail: the new path), symlink (detail: where it leads to), unlink,
# make_folder, remove_folder.
Watcher = Callable[[str, Path, Any], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` see every change to the disk; an OSError that it raises stops the change."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _announce(operation: str, path: Path, detail: Any = None) -> None:
    for watcher in _watchers:
        watcher(operation, path, detail)


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file of settings holds; nothing if it is not there. ConfigError if it is none."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        problem = None if isinstance(found, dict) else f"holds a {type(found).__name__}"
    except ValueError as error:  # of JSON, of UTF-8
        problem = f"is damaged ({error})"
    if problem:
        raise ConfigError(
            f"{path.name} {problem}, not a JSON object; bring it again, or correct it"
        )
    return found


def object_in(path: Path) -> dict[str, Any]:
    """What a JSON file of ours holds; nothing if it cannot be read, is torn, or is no object."""
    with contextlib.suppress(OSError):
        return record_in(path.read_bytes())
    return {}


def record_in(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON; an empty one if the line is torn, by a kill or a cut."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return {}


class HashedFile:
    """A new file that is hashed while it is written, and synced when it is closed.

    ``sha256`` and ``size`` (bytes) are valid after the ``with`` block. FileExistsError if the name
    is taken: nothing is ever overwritten.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.sha256 = path, 0, ""
        self._hash = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        _announce("create", self.path)
        # 0666 less the umask: what the group may read is the umask's decision alone.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        return self

    def write(self, data) -> None:
        """Write a bytes-like object whole."""
        view = memoryview(data).cast("B")
        _announce("write", self.path, view)
        self._hash.update(view)
        self.size += len(view)
        with self._named():
            while view:
                view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Make what is written so far durable."""
        _announce("sync", self.path)
        with self._named():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Give an OSError the name of the file: errors of an open file have none."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            self._file.close()
        self.sha256 = self._hash.hexdigest()

    def entry(self) -> dict[str, Any]:
        """This file's entry in a manifest."""
        return {"size": self.size, "sha256": self.sha256}


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file durably; returns its manifest entry."""
    return write_with(path, lambda file: file.write(data))


def write_with(path: Path, fill: Callable[[HashedFile], None]) -> dict[str, Any]:
    """Write a new file durably, its content by ``fill``; returns its manifest entry.

    After EIO the whole file is written again, since a page whose fsync failed may be gone: another
    fsync alone would succeed and lose it (Rebello et al., "Can Applications Recover from fsync
    Failures?", 2020). Any other OSError is raised, with the name of the file.
    """
    for tried in itertools.count(1):
        try:
            with HashedFile(path) as file:
                fill(file)
            return file.entry()
        except OSError as error:
            if error.errno != errno.EIO or tried == EIO_TRIES:
                error.filename = error.filename or str(path)
                raise
            unlink(path)
            time.sleep(0.2 * tried)


def replace_file(path: Path, data: bytes) -> None:
    """Put new content under a name at once: readers see the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except BaseException:
        unlink(temporary)
        raise
    sync_folder(path.parent)


def keep_found(path: Path, found: dict[str, Any]) -> None:
    """Write what was found out into a cache; of somebody else, it is found again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found).encode())


def create_file(path: Path, data: bytes) -> bool:
    """Create a file with its whole content, exclusively; False if the name is taken.

    A hard link is the one exclusive creation that NFS, Lustre and GPFS all keep atomic together
    with the content; open(O_EXCL) alone would show an empty file first.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_file(temporary, data)
    try:
        _announce("link", temporary, path)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        unlink(temporary)
    sync_folder(path.parent)
    return True


def give_second_name(path: Path, other: Path) -> None:
    """A hard link; a copy where the file is somebody else's, or on another file system."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        sync_file(other)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line."""
    append_lines(path, (json.dumps(record) + "\n").encode())


def append_lines(path: Path, lines: bytes) -> None:
    """Append whole lines with a single write, so that two writers never mix within a line.

    A torn last line, left by a kill, is ended first: else it would take the next one with it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        os.write(descriptor, lines)
    finally:
        os.close(descriptor)


def rename(path: Path, to: Path) -> None:
    """Give a file or a folder another name; a file of that name is replaced at once."""
    _announce("rename", path, to)
    os.replace(path, to)


def replace_link(link: Path, target: str) -> None:
    """Let a symbolic link lead to a name beside it; the link of before is replaced at once."""
    temporary = link.with_name(f".{link.name}.tmp")
    unlink(temporary)
    _announce("symlink", temporary, target)
    os.symlink(target, temporary)
    rename(temporary, link)


def unlink(path: Path) -> None:
    """Remove a file, if it is there."""
    _announce("unlink", path)
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and those above it."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            _announce("make_folder", folder)
            folder.mkdir(exist_ok=True)


def sync_file(path: Path) -> None:
    """Make a file's content durable, if there is such a file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _announce("sync_folder", folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all below it, if it is there; a link is removed, not what it leads to."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            unlink(path)
    if folder.is_dir():
        _announce("remove_folder", folder)
        folder.rmdir()


@contextlib.contextmanager
def only_one(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time into the block; ``waiting`` is called if another one is inside.

    Best effort: on a file system without flock two may run at once, so whatever is done under this
    lock must survive that.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # as NFS wants it of a lock
    except PermissionError:  # it is another account's
        descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # no flock here
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Free space at a folder or its nearest existing parent, in bytes."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(
    folder: Path, needed_bytes: int, needs: str = "it needs", move: str = "move SHARED_DIR"
) -> int:
    """The free bytes at a folder; Failed if they are too few."""
    free = free_bytes(folder)
    if needed_bytes > free:
        there = f"{bytes_text(free)} are free at {folder}"
        fix = f"free some space or {move}"
        raise Failed(f"{needs} {bytes_text(needed_bytes)}, and {there}; {fix}")
    return free


def disk_problem(error: OSError, move: str = "move SHARED_DIR") -> str:
    """One line on what the file system refused, and what to do; ``move``: how to use another."""
    location = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk or your quota is full{location}; free some space or {move}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write{location}; ask its owner, or {move}"
    return f"{error.strerror or error}{location}; check SHARED_DIR"
