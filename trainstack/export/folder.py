"""The files of an export, and the folder that they become: whole, or not there."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError
from trainstack.export.source import Source, Way
from trainstack.hub.choose import CARD, is_edited
from trainstack.storage import files, manifest

KIND = "export"  # what the manifest calls such a folder


def export(source: Source, target: Path, way: Way, say: Callable[[str], None]) -> None:
    """Leave the export in ``target``, compared with its checkpoint.

    An earlier export there is replaced. ConfigError if something else is there.
    """
    manifest.put_back(target)
    before = earlier(target)
    facts = facts_of(source, way)
    is_same = before.items() >= facts.items() and (target / CARD).exists()
    if is_same and manifest.is_whole(target, hash_up_to=None):
        say(f"{target} is this export already")
        return
    from trainstack.export.card import card  # torch: not to push what is here
    from trainstack.export.model import write_model

    with unfinished(target) as temporary:
        entries, made = write_model(source, temporary, way, say)
        text = card(source, made).encode()
        facts["card"] = hashlib.sha256(text).hexdigest()
        if before:
            say(f"it replaces {title(before)}, which was there")
            if (target / CARD).exists() and is_edited(target / CARD, before):
                text = (target / CARD).read_bytes()
                say(f"{CARD} was edited, so it stays as it is; remove it for one of this export")
        files.write_file(temporary / CARD, text)
        manifest.write_manifest(temporary, entries, **facts)
        manifest.swap_in(temporary, target)


def facts_of(source: Source, way: Way) -> dict[str, Any]:
    """What tells one export from another, for its manifest."""
    content = hashlib.sha256(json.dumps(source.entries, sort_keys=True).encode()).hexdigest()
    return {"kind": KIND, "run": source.name, "step": source.state.step, "dtype": way.dtype,
            "is_merged": way.is_merged, "checkpoint": content}  # fmt: skip


def title(facts: dict[str, Any]) -> str:
    return f"the export of run {facts['run']} at step {facts['step']:,} in {facts['dtype']}"


def earlier(target: Path) -> dict[str, Any]:
    """The manifest of the export that is there; empty if nothing is. ConfigError for the rest."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return {}
    known, fix = {}, "name another folder with --to"
    with contextlib.suppress(OSError, ValueError):
        known = manifest.read_manifest(target)
    if known.get("kind") != KIND:
        raise ConfigError(f"{target} is there already, and is no export; {fix}")
    there = [str(p.relative_to(target)) for p in sorted(target.rglob("*")) if not p.is_dir()]
    if others := [name for name in there if name not in (manifest.MANIFEST, CARD, *known["files"])]:
        raise ConfigError(
            f"{target} is {title(known)}, and {others[0]} in it is somebody's own; move that away, "
            f"or {fix}"
        )
    return known


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A folder beside the target, which is gone after the block unless it was renamed."""
    temporary = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    files.make_folder(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
