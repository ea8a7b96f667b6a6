"""Folders that are whole or not there: the manifest, and the protocol that publishes a folder.

Write into a temporary folder, hash and fsync each file (files.py), write manifest.json last, fsync
the folder, rename it to its final name, fsync the parent. So a folder under its final name is
complete, and its manifest has the size and the SHA-256 of every file in it.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainstack.storage import files

MANIFEST = "manifest.json"
# Bytes. Of a larger file that is already here only the size is compared: every submit checks all
# files, and SHA-256 takes a second for 1 to 2 GB.
TRUSTED_BY_SIZE = 64 << 20


def publish_folder(temporary: Path, final: Path, entries: dict[str, dict], **facts: Any) -> None:
    """Write the manifest of a temporary folder, whose files are synced, and give it its final name.

    ``entries`` maps each relative path to its manifest entry; ``facts`` are kept in the manifest
    beside them. OSError if ``final`` exists and is not empty.
    """
    write_manifest(temporary, entries, **facts)
    files.rename(temporary, final)
    files.sync_folder(final.parent)


def swap_in(temporary: Path, final: Path) -> None:
    """Give a whole folder its final name, in place of the folder of before.

    Of one with a manifest, ``put_back`` undoes it after a kill between the two renames.
    """
    aside = aside_of(final)
    remove_folder(aside)
    if final.exists():
        files.rename(final, aside)
    files.rename(temporary, final)
    files.sync_folder(final.parent)
    remove_folder(aside)


def put_back(final: Path) -> None:
    """Let the folder of before have its name again if a swap was killed in its middle."""
    if not final.exists() and is_whole(aside_of(final)):
        files.rename(aside_of(final), final)


def aside_of(final: Path) -> Path:
    """Where a folder is while a new one takes its place."""
    return final.with_name(f".{final.name}.old")


def write_manifest(folder: Path, entries: dict[str, dict], **facts: Any) -> None:
    """Write manifest.json as the last file of a folder; sync that folder and all below it."""
    content = {**facts, "files": dict(sorted(entries.items()))}
    files.write_file(folder / MANIFEST, _manifest_bytes(content))
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        files.sync_folder(path)


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder: its facts, and its entries as ``files``.

    FileNotFoundError if there is none. ValueError if it is not as it was written: it carries a hash
    of its own content, so one changed bit is found.
    """
    data = (folder / MANIFEST).read_bytes()
    content = json.loads(data)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it has no list of files")
    content.pop("seal", None)
    if _manifest_bytes(content) != data:
        raise ValueError("its seal does not match")
    return content


def is_whole(folder: Path, hash_up_to: int = TRUSTED_BY_SIZE) -> bool:
    """Whether a published folder verifies; ``hash_up_to`` as in ``damage``."""
    return not any(damage(folder, hash_up_to))


def damage(
    folder: Path, hash_up_to: int | None = None, moves: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """What is wrong with a published folder, file by file; yields nothing if it verifies.

    Sizes are always compared, contents only of files of at most ``hash_up_to`` bytes (None: all).
    ``moves`` is called for each piece that is hashed.
    """
    try:
        entries = read_manifest(folder)["files"]
    except FileNotFoundError:
        yield f"{MANIFEST}: missing"
        return
    except (OSError, ValueError) as error:
        yield f"{MANIFEST}: not readable ({error})"
        return
    for name, entry in entries.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                yield f"{name}: {size:,} bytes instead of {entry['size']:,}"
                continue
            is_small = hash_up_to is None or size <= hash_up_to
            if is_small and hash_file(path, moves)["sha256"] != entry["sha256"]:
                yield f"{name}: hash differs"
        except FileNotFoundError:
            yield f"{name}: missing"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def hash_file(path: Path, moves: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The manifest entry of a file as it is on disk: its size in bytes, its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(files.READ_BYTES):
            digest.update(chunk)
            moves()
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def remove_folder(folder: Path) -> None:
    """Remove a published folder, its manifest first: what is half removed must not verify.

    Of a link to one only the link.
    """
    with contextlib.suppress(OSError):  # what stays is tried again after the next save
        if folder.is_symlink():
            files.unlink(folder)
        elif folder.is_dir():
            files.unlink(folder / MANIFEST)
        files.remove_tree(folder)
