"""Files that survive a crash: the one thin layer through which everything durable is written.

The publish protocol: write into a temporary folder, fsync each file, write manifest.json last,
fsync the folder, rename it to its final name, fsync the parent. A folder under its final name is
therefore complete. Sources: rename(2) and fsync(2); an fsync of a file says nothing about its name.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20


class HashedFile:
    """A new file that is hashed while it is written, and synced when it is closed.

    ``sha256`` and ``size`` (bytes) are valid after the ``with`` block. Raises FileExistsError:
    nothing is ever overwritten in place.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.sha256 = path, 0, ""
        self._hash = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        # 0666 less the umask: what the group may read is the umask's decision alone.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        return self

    def write(self, data) -> None:
        """Write a bytes-like object whole."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        self.sha256 = self._hash.hexdigest()

    def entry(self) -> dict[str, Any]:
        """This file's entry in a manifest."""
        return {"size": self.size, "sha256": self.sha256}


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file durably; returns its manifest entry."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry()


def replace_file(path: Path, data: bytes) -> None:
    """Put new content under a name at once: readers see the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Create a file with its whole content, exclusively; False where the name is taken.

    A hard link is the one exclusive creation that NFS, Lustre and GPFS all keep atomic together
    with the content; open(O_EXCL) alone would show an empty file first.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_file(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line with a single write, so that two writers never mix within a line."""
    line = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> dict[str, Any]:
    """The manifest entry of a file as it lies on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def publish_folder(temporary: Path, final: Path, entries: dict[str, dict], **facts: Any) -> None:
    """Seal a written and synced temporary folder and give it its final name.

    ``entries`` maps each relative path to its manifest entry; ``facts`` are kept in the manifest
    beside them. Raises OSError where ``final`` exists and is not empty.
    """
    write_manifest(temporary, entries, **facts)
    os.rename(temporary, final)
    sync_folder(final.parent)


def write_manifest(folder: Path, entries: dict[str, dict], **facts: Any) -> None:
    """Write manifest.json as the last file of a folder, and sync every folder below."""
    content = {**facts, "files": dict(sorted(entries.items()))}
    write_file(folder / MANIFEST, _manifest_bytes(content))
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; raises FileNotFoundError or ValueError.

    The manifest seals itself with a hash of its own content: one changed bit is a ValueError.
    """
    data = (folder / MANIFEST).read_bytes()
    content = json.loads(data)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it has no list of files")
    content.pop("seal", None)
    if _manifest_bytes(content) != data:
        raise ValueError("its seal does not match")
    return content


def damage(folder: Path, hash_up_to: int | None = None) -> Iterator[str]:
    """What is wrong with a published folder, file by file; nothing where it verifies.

    Sizes are always compared; contents of files of at most ``hash_up_to`` bytes, None for all.
    """
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        yield f"{MANIFEST}: missing"
        return
    except (OSError, ValueError) as error:
        yield f"{MANIFEST}: not readable ({error})"
        return
    for name, entry in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                yield f"{name}: {size:,} bytes instead of {entry['size']:,}"
                continue
            is_small = hash_up_to is None or size <= hash_up_to
            if is_small and hash_file(path)["sha256"] != entry["sha256"]:
                yield f"{name}: hash differs"
        except FileNotFoundError:
            yield f"{name}: missing"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def remove_folder(folder: Path) -> None:
    """Remove a published folder, its manifest first: half removed, it no longer verifies."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Free space at a folder or its nearest existing parent, in bytes."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
