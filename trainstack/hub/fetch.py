"""Bring the model and the data set of a configuration here: verified, complete, or not at all.

Command line: ``python -m trainstack hub --home DIR [--config FILE] [--force] [key=value ...]``.
Runs where the Hub can be reached; nothing that it leaves needs a network. A folder under its final
name is whole: files arrive in a hidden folder beside it, which then takes its place. Two renames do
that, not a symbolic link, so that a folder stays something that people can copy and remove; a job
that has the old files open keeps them. Imports neither torch nor transformers.
"""

import argparse
import contextlib
import errno
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.errors import USAGE_ERROR, ConfigError
from trainstack.hub import choose
from trainstack.hub.local import LocalFiles
from trainstack.processes import end_on_interrupt
from trainstack.storage import files, layout
from trainstack.storage.manifest import (
    TRUSTED_BY_SIZE,
    damage,
    read_manifest,
    remove_folder,
    write_manifest,
)
from trainstack.units import human

if TYPE_CHECKING:
    from trainstack.hub.commit import HubCommit

WAITING = "another process is bringing it; waiting"
RETRY_SECONDS = 2.0  # before the second try; doubles with each, 30 s in all


@dataclass(frozen=True)
class Asset:
    """A model or a data set that a configuration names, and where it lies."""

    kind: str  # model or dataset, the Hub's words
    name: str
    revision: str
    folder: Path
    lock: Path
    needs_weights: bool = False
    subset: str | None = None
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'model' if self.kind == 'model' else 'data set'} {self.name}"

    @property
    def aside(self) -> Path:
        """Where the old folder is while a new one takes its place."""
        return self.folder.with_name(f".{self.folder.name}.old")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack hub", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--force", action="store_true", help="fetch anew what is here")
    parser.add_argument("--retry-delay", type=float, default=RETRY_SECONDS, metavar="SECONDS")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load(options.config, options.overrides)
    except ConfigError as error:
        print(redacted(error.report("hub")), file=sys.stderr)
        return USAGE_ERROR
    home = options.home.expanduser().absolute()
    prepare_environment(home)
    exit_code = 0
    end_on_interrupt("hub: stopped; what has arrived is kept, run it again to go on")
    for asset in named_assets(config, home):
        try:
            provide(asset, options.force, options.retry_delay)
        except ConfigError as error:
            say(f"error: {asset}: {error}")
            exit_code = 1
    return exit_code


def prepare_environment(home: Path) -> None:
    """What the libraries of the Hub read when they are imported; the user's settings win.

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


def named_assets(config: Config, home: Path) -> list[Asset]:
    """What the configuration names, less the demo, which is made here."""
    model = config.model
    folder = layout.model_folder(home, model.name)
    named = [
        Asset(
            kind="model",
            name=model.name,
            revision=model.revision,
            folder=folder,
            lock=lock_path(home, folder),
            needs_weights=model.init == "pretrained",
        )
    ]
    splits: dict[tuple[str, str | None, str], list[str]] = {}
    for data in config.data.sources:
        wanted = splits.setdefault((data.name, data.subset, data.revision), [])
        wanted += [s for s in (data.split, data.eval_split) if s and s not in wanted]
    for (name, subset, revision), wanted in splits.items():
        folder = layout.dataset_folder(home, name, subset)
        named.append(
            Asset(
                kind="dataset",
                name=name,
                revision=revision,
                folder=folder,
                lock=lock_path(home, folder),
                subset=subset,
                splits=tuple(wanted),
            )
        )
    return [asset for asset in named if asset.name != layout.DEMO]


def lock_path(home: Path, folder: Path) -> Path:
    return home / "cache" / "locks" / str(folder.relative_to(home)).replace("/", "--")


def provide(asset: Asset, is_forced: bool, retry_delay: float) -> None:
    """Leave the asset whole in its folder; ConfigError says why not, and then the old one stays."""
    manifest, problem = {}, "absent"
    try:
        manifest, problem = inspect(asset, is_forced)
        if problem or is_forced:
            with files.only_one(asset.lock, lambda: say(f"{asset}: {WAITING}")):
                put_back(asset)
                manifest, problem = inspect(asset, is_forced)
                if problem or is_forced:
                    obtain(asset, manifest, problem, is_forced, retry_delay)
                    return
    except (ConfigError, OSError) as error:
        text = disk_problem(error) if isinstance(error, OSError) else str(error)
        if not problem:
            text += f". The copy that is here ({summary(manifest)}) stays in use"
        raise ConfigError(text) from None
    if asset.kind == "dataset":
        check_splits(asset, manifest)
    say(f"{asset} is here ({summary(manifest)})")


def inspect(asset: Asset, is_forced: bool) -> tuple[dict[str, Any], str]:
    """The manifest of what is here, and why that does not do; an empty text where it does.

    Raises ConfigError where local originals changed, unless that is meant: ``is_forced``.
    """
    if not asset.folder.exists():
        return {}, "absent"
    try:
        manifest = read_manifest(asset.folder)
    except (OSError, ValueError):
        manifest = {}
    is_local = manifest.get("source") == "local"
    original = LocalFiles(asset.kind, asset.name, asset.folder) if is_local else None
    is_touched = is_local and original.modified_ns != manifest["modified_ns"]
    wrong = next(damage(asset.folder, None if is_touched else TRUSTED_BY_SIZE), "")
    if is_local and original.modified_ns.keys() != manifest["modified_ns"].keys():
        wrong = wrong or "files were added or removed"
    if is_local and wrong and not is_forced:
        raise ConfigError(
            f"changed since {manifest['fetched_at']} ({wrong}); if that is meant, run this again"
            " with FORCE_REFRESH=1"
        )
    if not wrong and manifest["kind"] != asset.kind:
        wrong = f"it is a {manifest['kind']}"
    if wrong:
        return manifest, f"damaged ({wrong})"
    if asset.revision not in (manifest["revision"], manifest["commit"]) and not is_local:
        return manifest, f"here at revision {manifest['revision']}, not {asset.revision}"
    if asset.needs_weights and not manifest["weight_bytes"]:
        return manifest, "here without its weights"
    return manifest, ""


def put_back(asset: Asset) -> None:
    """Mend a swap that was killed between its two renames."""
    if not asset.folder.exists() and next(damage(asset.aside, TRUSTED_BY_SIZE), None) is None:
        os.rename(asset.aside, asset.folder)


def obtain(
    asset: Asset, manifest: dict[str, Any], problem: str, is_forced: bool, retry_delay: float
) -> None:
    """Fetch or link the asset beside its folder, then swap."""
    started = time.monotonic()
    source = open_source(asset, is_forced, retry_delay)
    if asset.folder.exists() and problem:
        say(f"{asset} is {problem}; {source.verb} it anew")
    remove_partials(asset, but=source.folder)
    try:
        facts = gather(asset, source, bool(manifest.get("weight_bytes")))
        publish(asset, source, facts)
    except (ConfigError, OSError):
        if not source.is_resumable:
            remove_partials(asset)
        raise
    size = human(sum(entry["size"] for entry in source.entries.values()))
    origin = "linked" if layout.is_local(asset.name) else f"commit {source.commit[:7]}"
    seconds = f"{time.monotonic() - started:.0f} s"
    say(f"{asset}: {origin}, {len(source.entries)} files verified, {size}, {seconds}")


def open_source(asset: Asset, is_forced: bool, retry_delay: float) -> "HubCommit | LocalFiles":
    if layout.is_local(asset.name):
        return LocalFiles(asset.kind, asset.name, asset.folder)
    from trainstack.hub.commit import HubCommit

    return HubCommit(
        asset.kind,
        asset.name,
        asset.revision,
        asset.folder,
        retry_delay,
        say=lambda text: say(f"{asset}: {text}"),
        is_cache_used=not is_forced,
    )


def gather(asset: Asset, source: "HubCommit | LocalFiles", had_weights: bool) -> dict[str, Any]:
    """Collect what is needed and nothing else; returns the facts for the manifest."""
    if asset.kind == "model":
        wanted = choose.choose_model(source, asset.needs_weights or had_weights)
    else:
        wanted, facts = choose.choose_data(source, asset.name, asset.subset)
        check_splits(asset, facts)
        spare = [n for n in source.sizes if choose.is_data_file(n) and n not in wanted]
        if spare and not asset.subset:
            say(f"{asset}: left out as of no split: {len(spare)} files, such as {spare[0]}")
    announce(asset, source, wanted)
    source.collect(wanted)
    return choose.model_facts(source, wanted) if asset.kind == "model" else facts


def check_splits(asset: Asset, facts: dict[str, Any]) -> None:
    for split in asset.splits:
        if split not in facts["splits"]:
            known = ", ".join(facts["splits"])
            raise ConfigError(f"has no split {split}; set data.split to one of: {known}")


def announce(asset: Asset, source: "HubCommit | LocalFiles", names: list[str]) -> None:
    """Say what is about to arrive; ConfigError where it does not fit on the disk."""
    need, free = source.missing_bytes(names), files.free_bytes(asset.folder.parent)
    if need > free:
        raise ConfigError(
            f"needs {human(need)}, and {human(free)} are free at {asset.folder.parent}; free some"
            " space or move SHARED_DIR"
        )
    size = human(sum(source.sizes[name] for name in names))
    say(f"{asset}: {source.verb} {len(names)} files, {size}")


def publish(asset: Asset, source: "HubCommit | LocalFiles", facts: dict[str, Any]) -> None:
    """Seal the files that arrived and swap them in for the old ones."""
    for path in sorted(source.folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty: it holds files that are wanted
                path.rmdir()
        elif str(path.relative_to(source.folder)) not in source.entries:
            path.unlink()
    write_manifest(
        source.folder,
        source.entries,
        kind=asset.kind,
        name=asset.name,
        revision=None if layout.is_local(asset.name) else asset.revision,
        commit=source.commit,
        fetched_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **source.facts,
        **facts,
    )
    remove_folder(asset.aside)
    if asset.folder.exists():
        os.rename(asset.folder, asset.aside)
    os.rename(source.folder, asset.folder)
    files.sync_folder(asset.folder.parent)
    remove_folder(asset.aside)


def remove_partials(asset: Asset, but: Path | None = None) -> None:
    """Remove what interrupted calls left, and the folders that this leaves empty."""
    parent = asset.folder.parent
    pattern = re.compile(rf"\.{re.escape(asset.folder.name)}\.([0-9a-f]{{12}}|local)\.partial")
    for path in [*parent.iterdir()] if parent.exists() else []:
        if pattern.fullmatch(path.name) and path != but:
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        parent.rmdir()


def summary(manifest: dict[str, Any]) -> str:
    size = human(sum(entry["size"] for entry in manifest["files"].values()))
    if manifest["source"] == "local":
        return f"linked {manifest['fetched_at']}, {size}"
    return f"commit {manifest['commit'][:7]}, {size}"


def disk_problem(error: OSError) -> str:
    """One line on what the file system refused, and what to do."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk or your quota is full{where}; free some space or move SHARED_DIR"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write{where}; ask its owner, or move SHARED_DIR"
    return f"{error.strerror or error}{where}; check SHARED_DIR"


def say(text: str) -> None:
    """One line of conversation, without any token of the Hub."""
    print(redacted(f"hub: {text}".replace("\n", " ")), file=sys.stderr, flush=True)


def redacted(text: str) -> str:
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(key, "").strip():
            text = text.replace(token, "[token]")
    return re.sub(r"hf_[A-Za-z0-9]{10,}", "[token]", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
