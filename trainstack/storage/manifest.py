"""The manifest of a folder: what is in it, hashed; a folder that has one is whole.

The publish protocol: write into a temporary folder, fsync each file, write manifest.json last,
fsync the folder, rename it to its final name, fsync the parent. A folder under its final name is
therefore complete. Sources: rename(2) and fsync(2); an fsync of a file says nothing about its name.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack.storage.files import (
    READ_BYTES,
    _remove_tree,
    rename,
    sync_folder,
    unlink,
    write_file,
)

MANIFEST = "manifest.json"
TRUSTED_BY_SIZE = 64 << 20  # bytes; larger files are hashed only when they are read: it takes long


def hash_file(path: Path) -> dict[str, Any]:
    """The manifest entry of a file as it lies on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def publish_folder(temporary: Path, final: Path, entries: dict[str, dict], **facts: Any) -> None:
    """Seal a written and synced temporary folder and give it its final name.

    ``entries`` maps each relative path to its manifest entry; ``facts`` are kept in the manifest
    beside them. Raises OSError where ``final`` exists and is not empty.
    """
    write_manifest(temporary, entries, **facts)
    rename(temporary, final)
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
    with contextlib.suppress(OSError):  # what stays is tried again after the next save
        if folder.is_dir():
            unlink(folder / MANIFEST)
        _remove_tree(folder)
