"""``python -m trainstack hub``: brings what a configuration names here, whole or not at all.

Usage: ``python -m trainstack hub [--home DIR] [--config FILE] [--force] [key=value ...]``. It runs
where the Hub can be reached; nothing that it leaves needs a network. A folder under its final name
is whole: files arrive in a hidden folder beside it, which then takes its place. Two renames do
that, not a symbolic link, so that a folder stays something that people can copy and remove; a job
that has the old files open keeps them. Imports neither torch nor transformers.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainstack.config.load import load
from trainstack.errors import USAGE_ERROR, ConfigError
from trainstack.hub import choose, data_files
from trainstack.hub.asset import Asset, named_assets
from trainstack.hub.local import LocalFiles
from trainstack.options import parse, parser_of
from trainstack.processes import end_on_interrupt
from trainstack.records import readers
from trainstack.storage import files, layout
from trainstack.storage.manifest import (
    TRUSTED_BY_SIZE,
    damage,
    put_back,
    read_manifest,
    swap_in,
    write_manifest,
)
from trainstack.units import bytes_text, counted

if TYPE_CHECKING:
    from trainstack.hub.commit import HubCommit

CHANGED = "changed since"  # of local originals, which may be meant
NO_WEIGHTS = "is here without its weights"
RETRY_SECONDS = 2.0  # before the second try; doubles with each, 30 s in all


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    try:
        config = load(options.config, options.overrides)
    except ConfigError as error:
        print(redacted(error.report("hub")), file=sys.stderr)
        return USAGE_ERROR
    home = options.home.expanduser().absolute()
    configure_libraries(home)
    end_on_interrupt("hub: stopped; what has arrived is kept, run it again to continue")
    errors = []
    for asset in named_assets(config, home):
        if asset.name == layout.DEMO:
            continue  # made here, by prepare
        try:
            provide(asset, options.force, options.retry_delay)
        except ConfigError as error:
            errors.append(f"error: {asset}: {error}")
    for line in errors:  # last, where people look
        say(line)
    return 1 if errors else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("hub", __doc__, has_config=True)
    parser.add_argument("--force", action="store_true", help="fetch what is here again")
    parser.add_argument("--retry-delay", type=float, default=RETRY_SECONDS, metavar="SECONDS")
    return parse(parser, arguments)


def configure_libraries(home: Path) -> None:
    """Set what the Hub's libraries read from the environment on import; the user's values win.

    Only the caches move, so that the token of ``hf auth login`` is still found.
    """
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    if "HF_HOME" not in os.environ:
        caches = {"HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_DATASETS_CACHE": "datasets"}
        wanted |= {key: str(home / "cache" / name) for key, name in caches.items()}
    if not sys.stderr.isatty():
        wanted |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for key, value in wanted.items():
        os.environ.setdefault(key, value)


def provide(asset: Asset, is_forced: bool, retry_delay: float) -> None:
    """Leave the asset whole in its folder; ConfigError says why not, and then the old one stays."""
    manifest, problem = {}, "absent"
    try:
        manifest, problem = inspect(asset)
        if problem or is_forced:
            waiting = f"{asset}: another process is bringing it; waiting"
            with files.only_one(asset.lock, lambda: say(waiting)):
                put_back(asset.folder)
                manifest, problem = inspect(asset)  # another may have brought it
                if problem or is_forced:
                    obtain(asset, manifest, problem, is_forced, retry_delay)
                    return
    except (ConfigError, OSError) as error:
        text = files.disk_problem(error) if isinstance(error, OSError) else str(error)
        if not problem:
            text += f". The copy that is here ({summary(manifest)}) stays in use"
        raise ConfigError(text) from None
    if asset.kind == "dataset":
        check_splits(asset, manifest)
    say(f"{asset} is here ({summary(manifest)})")


def inspect(asset: Asset) -> tuple[dict[str, Any], str]:
    """Manifest and problem of what is in the asset's folder; an empty text if it has none.

    ConfigError if local originals cannot be read.
    """
    if not asset.folder.exists():
        return {}, "absent"
    try:
        manifest = read_manifest(asset.folder)
    except (OSError, ValueError):
        manifest = {}  # the problem will say why
    is_local = manifest.get("source") == "local"
    if is_local and (changed := change_of_originals(asset, manifest)):
        return manifest, f"{CHANGED} {manifest['fetched_at']} ({changed})"
    wrong = "" if is_local else next(damage(asset.folder, TRUSTED_BY_SIZE), "")
    if not wrong and manifest["kind"] != asset.kind:
        wrong = f"it is a {manifest['kind']}"
    if wrong:
        return manifest, f"is damaged ({wrong})"
    revision = manifest["revision"]  # None: it is no repository
    if revision is not None and asset.revision not in (revision, manifest["commit"]):
        return manifest, f"is here at revision {revision}, not {asset.revision}"
    if asset.needs_weights and not manifest["weight_bytes"]:
        return manifest, NO_WEIGHTS
    return manifest, ""


def change_of_originals(asset: Asset, manifest: dict[str, Any]) -> str:
    """How linked originals differ from what was linked; an empty text if they do not."""
    modified_ns = LocalFiles(asset).modified_ns
    is_touched = modified_ns != manifest["modified_ns"]
    wrong = next(damage(asset.folder, None if is_touched else TRUSTED_BY_SIZE), "")
    if not wrong and modified_ns.keys() != manifest["modified_ns"].keys():
        return "files were added or removed"
    return wrong


def obtain(
    asset: Asset, manifest: dict[str, Any], problem: str, is_forced: bool, retry_delay: float
) -> None:
    """Fetch or link the asset beside its folder, then swap. ``manifest``: of what is here."""
    if problem.startswith(CHANGED) and not is_forced:
        raise ConfigError(f"{problem}; if that is meant, run this again with FORCE_REFRESH=1")
    started = time.monotonic()
    origin = open_origin(asset, is_forced, retry_delay)
    if asset.folder.exists() and problem:
        say(f"{asset} {problem}; {origin.doing} it again")
    remove_partials(asset, keep=origin.folder)
    try:
        facts = collect_needed(asset, origin, bool(manifest.get("weight_bytes")))
        finish(asset, origin, facts)
    except (ConfigError, OSError):
        if not origin.is_resumable:
            remove_partials(asset)
        raise
    size = bytes_text(sum(entry["size"] for entry in origin.entries.values()))
    how = "linked" if layout.is_local(asset.name) else f"commit {origin.commit[:7]}"
    seconds = f"{time.monotonic() - started:.0f} s"
    say(f"{asset}: {how}, {counted(len(origin.entries), 'file')} verified, {size}, {seconds}")


def open_origin(asset: Asset, is_forced: bool, retry_delay: float) -> "HubCommit | LocalFiles":
    """Where the asset comes from: a commit on the Hub, or local files."""
    if layout.is_local(asset.name):
        return LocalFiles(asset)
    if (here := Path(asset.name)).exists():
        raise ConfigError(
            f"is a {'folder' if here.is_dir() else 'file'} here; write ./{asset.name} if you mean"
            " it, or run this in another folder if you mean the Hub's"
        )
    if here.name == asset.name and readers.is_readable(asset.name):
        fix = f"write the path to it, such as /data/{here}"
        raise ConfigError(f"no such file in {here.absolute().parent}; {fix}")
    from trainstack.hub.commit import HubCommit

    return HubCommit(asset, retry_delay, lambda text: say(f"{asset}: {text}"), not is_forced)


def collect_needed(
    asset: Asset, origin: "HubCommit | LocalFiles", had_weights: bool
) -> dict[str, Any]:
    """Collect what is needed and nothing else; returns the facts for the manifest.

    ConfigError if a split is not there, if it does not fit on the disk, or what the choice refuses.
    """
    facts = {}
    if asset.kind == "model":
        # Weights that were here may be those of another run.
        wanted = choose.choose_model(origin, asset.needs_weights or had_weights)
        if layout.ADAPTER_CONFIG in origin.sizes:
            adapter = f"its adapter ({layout.ADAPTER_CONFIG})"
            say(f"{asset}: not used: {adapter}; merge it first if it is meant")
    else:
        wanted, facts = data_files.choose_data(origin, asset.name, asset.subset)
        unused, lines = data_files.not_taken(origin, wanted, asset)
        check_splits(asset, facts, unused)
        if others := [name for name in sorted(facts["splits"]) if name not in asset.splits]:
            say(f"{asset}: not used: split {', '.join(others)} (data.split, data.eval_split)")
        for line in (*([belong_to_no_split(unused)] if unused else ()), *lines):
            say(f"{asset}: not {origin.done}: {line}")
        if part := next((name for name in wanted if f"/{data_files.PARTIAL}" in name), None):
            say(f"{asset}: the Hub converted only the first part of it ({part})")
    files.check_space(asset.folder.parent, origin.missing_bytes(wanted))
    size = bytes_text(sum(origin.sizes[name] for name in wanted))
    say(f"{asset}: {origin.doing} {counted(len(wanted), 'file')}, {size}")
    origin.collect(wanted)
    if asset.kind == "model":
        return choose.model_facts(origin, wanted)
    if not Path(asset.name).is_file():  # else it was named itself
        used = {split: facts["splits"][split] for split in asset.splits}
        for line in data_files.oddities(used, origin.entries):
            say(f"{asset}: {line}")
    return facts


def check_splits(asset: Asset, facts: dict[str, Any], unused: Collection[str] = ()) -> None:
    """ConfigError for a split that is not there. ``unused``: files that belong to no split."""
    splits = facts["splits"]
    split = next((split for split in asset.splits if split not in splits), None)
    is_odd = bool(unused) and layout.is_local(asset.name)
    if is_odd and (split or len(unused) > len(splits[asset.splits[0]])):
        word = split or asset.splits[0]
        other = next(iter(splits)) if split else word
        raise ConfigError(
            f"{splits[other][0]} is split {other} by its name, and {belong_to_no_split(unused)}; "
            f"take the word out of its name, or put {word} into the names of those that are meant"
        )
    if split:
        fix = f"set data.split, or data.eval_split, to one of: {', '.join(splits)}"
        raise ConfigError(f"has no split {split}; {fix}")


def finish(asset: Asset, origin: "HubCommit | LocalFiles", facts: dict[str, Any]) -> None:
    """Write the manifest of the files that arrived, and swap them in for the old ones."""
    for path in sorted(origin.folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty: it holds files that are wanted
                path.rmdir()
        elif str(path.relative_to(origin.folder)) not in origin.entries:
            path.unlink()
    facts |= origin.facts | {"kind": asset.kind, "name": asset.name, "commit": origin.commit}
    facts["revision"] = None if layout.is_local(asset.name) else asset.revision
    facts["fetched_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(origin.folder, origin.entries, **facts)
    swap_in(origin.folder, asset.folder)


def remove_partials(asset: Asset, keep: Path | None = None) -> None:
    """Remove what interrupted calls left, but for ``keep``, and a parent that is then empty."""
    parent = asset.folder.parent
    pattern = re.compile(rf"\.{re.escape(asset.folder.name)}\.([0-9a-f]{{12}}|local)\.partial")
    for path in [*parent.iterdir()] if parent.exists() else []:
        if pattern.fullmatch(path.name) and path != keep:
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        parent.rmdir()


def summary(manifest: dict[str, Any]) -> str:
    """What is here, in a few words: which commit, or since when it is linked, and its size."""
    size = bytes_text(sum(entry["size"] for entry in manifest["files"].values()))
    if manifest["source"] == "local":
        return f"linked {manifest['fetched_at']}, {size}"
    return f"commit {manifest['commit'][:7]}, {size}"


def belong_to_no_split(names: list[str]) -> str:
    """For one file or several, with the first one as an example."""
    if len(names) == 1:
        return f"1 file belongs to no split ({names[0]})"
    return f"{len(names)} files belong to no split (such as {names[0]})"


def say(text: str) -> None:
    """One line of conversation, without any token of the Hub."""
    print(redacted(f"hub: {text}".replace("\n", " ")), file=sys.stderr, flush=True)


def redacted(text: str) -> str:
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(key, "").strip():
            text = text.replace(token, "[token]")
    return re.sub(r"hf_[A-Za-z0-9]{10,}", "[token]", text)
