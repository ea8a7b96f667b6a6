"""``python -m trainstack clean``: what lies in the project, who needs it, and what may go.

Removes only what it is told to, by the names that it lists, and never what a run that can go on
needs: its checkpoints and tokens, and the model beside an adapter; before its first checkpoint all.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trainstack
from trainstack.checkpoint.names import BEST, checkpoints, kept_stores, linked
from trainstack.config.load import load
from trainstack.data.store import find_stores
from trainstack.errors import ConfigError, Failed
from trainstack.hub.asset import needed_assets
from trainstack.options import parse, parser_of
from trainstack.processes import is_dead
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, is_known_here, user
from trainstack.run.queue import NO_JOB, Job, read_queue
from trainstack.run.states import EXIT_CODES, QUEUED
from trainstack.storage import files
from trainstack.storage.manifest import MANIFEST, remove_folder
from trainstack.units import NOTHING, bytes_text

REBUILT = ("pip", "uv", "conda", "hub", "xet", "datasets", "kernels")  # caches that fill again
OLD_SECONDS = 86400  # after which nobody is still at it


@dataclass
class Item:
    """Something in the project that may be removed as a whole."""

    name: str  # below the project's folder
    path: Path
    size: int  # bytes
    needed_by: list[str] = field(default_factory=list)  # runs
    note: str = ""

    @property
    def is_run(self) -> bool:
        return re.fullmatch(r"runs/[^/]+", self.name) is not None


def main(arguments: list[str]) -> int:
    parser = parser_of("clean", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to remove, as it is listed")
    options = parse(parser, arguments)
    items = list(items_of(options.home))
    if options.names:
        remove(options.home, items, options.names)
    else:
        show(items)
    return 0


def items_of(home: Path) -> Iterator[Item]:
    """All that could be removed, each with who needs it."""
    needs = needs_of(home)
    for kind in ("models", "datasets", "tokens"):
        for path in published(home / kind):
            name = str(path.relative_to(home))
            is_it = {path, path.resolve()}
            users = [
                r for r, paths in needs.items() if paths is None or not is_it.isdisjoint(paths)
            ]
            yield Item(name, path, size_of(path), users)
    for path in sorted((home / "runs").glob("*")):
        if path.is_dir() and not path.is_symlink():
            yield from items_of_run(home, path)
    for path in [*(home / "runs").glob("*/checkpoints/damaged-*"), *leftovers(home)]:
        yield Item(str(path.relative_to(home)), path, size_of(path), note="left over, or a cache")


def items_of_run(home: Path, path: Path) -> Iterator[Item]:
    """A run, and those of its checkpoints that it does not need to go on."""
    run = RunFolder(path)
    state = run.status().get("state", "no state")
    users = [path.name] if is_alive(run) else []
    yield Item(str(path.relative_to(home)), path, size_of(path), users, state)
    spare = [] if users else checkpoints(run.checkpoints)[1 if state == "DONE" else 2 :]
    losses = run.eval_losses()
    best = min(losses, key=losses.get, default=None)
    for step, checkpoint in spare:
        if step == best or checkpoint == linked(run.checkpoints, BEST):
            continue
        own = str(checkpoint.relative_to(home))
        yield Item(own, checkpoint, size_of(checkpoint), note=f"within the run, step {step:,}")


def needs_of(home: Path) -> dict[str, set[Path] | None]:
    """The folders that each run needs beside its own; None: all, for it cannot be read."""
    found = {}
    for path in sorted((home / "runs").glob("*/config.yaml")):
        run = RunFolder(path.parent)
        try:
            config, kept = load(path, []), kept_stores(run.checkpoints)
        except ConfigError:  # also of another version
            found[path.parent.name] = None
            continue
        paths = {home / "tokens" / name for name in kept}
        with contextlib.suppress(OSError, ValueError):  # what it was to be made from is gone
            paths |= {*find_stores(home, config, kept)}
        paths |= {asset.folder for asset in needed_assets(config, home, bool(kept))}
        paths |= {link.resolve().parent for link in folder_links(home, paths)}
        found[path.parent.name] = paths | {path.resolve() for path in paths}
    return found


def folder_links(home: Path, folders: set[Path]) -> Iterator[Path]:
    """The links in folders, such as those of models to checkpoints of other runs."""
    for folder in folders:
        if folder.is_dir() and not folder.is_relative_to(home / "tokens"):
            yield from (path for path in folder.iterdir() if path.is_symlink())


def published(folder: Path) -> Iterator[Path]:
    """The folders below that were published whole, and links to such; org/name is two folders."""
    for path in sorted(folder.glob("*")):
        if path.name.startswith("."):
            continue
        if path.is_symlink() or (path / MANIFEST).exists():
            yield path
        elif path.is_dir():
            yield from published(path)


def leftovers(home: Path) -> Iterator[Path]:
    """What a killed process left, environments that are not used, and caches that fill again."""
    current = (home / "venv").resolve()
    unfinished = [path for path in home.glob("venv-*") if path != current]
    for kind in ("models", "datasets", "tokens"):  # downloads and stores
        unfinished += [p for p in (home / kind).glob("**/.*") if not p.name.endswith(".old")]
    for path in sorted(unfinished):
        if path.is_dir() and time.time() - path.stat().st_mtime > OLD_SECONDS:
            yield path
    yield from (home / "cache" / name for name in REBUILT if (home / "cache" / name).is_dir())


@functools.cache
def jobs_of_slurm() -> dict[str, Job] | None:
    """The jobs that Slurm shows; None if it cannot be asked."""
    script = Path(trainstack.__file__).parent.parent / "slurm.sh"
    if not shutil.which("squeue") or not script.exists():
        return None
    ask = ["bash", "-c", '. "$1" && forget_outer_slurm && list_jobs', "clean", script]
    done = subprocess.run(ask, capture_output=True, text=True)
    return read_queue(done.stdout) if done.returncode == 0 else None


def is_alive(run: RunFolder) -> bool:
    """Whether a job works on a run, or waits to."""
    state = run.status().get("state")
    lease = Lease(run.path).unreleased()
    if lease is None and state in EXIT_CODES:
        return False  # it ended in order, though its heartbeat may be seconds old
    holder = lease or {"job": run.status().get("job") or ""}
    if is_known_here({"host": "", **holder}):
        return not is_dead(holder)
    if state != QUEUED or run.is_beating(holder["job"]):
        return run.is_beating(holder["job"])
    submitted = [event for event in run.events() if event["event"] == "submitted"]
    jobs = jobs_of_slurm()
    if jobs is None or not submitted:
        return True
    last = submitted[-1]
    is_hidden = last["job"] not in jobs and last.get("user", user()) != user()
    return is_hidden or any(jobs.get(event["job"], NO_JOB).is_live for event in submitted)


def size_of(path: Path) -> int:
    """Bytes on the disk below a path; a link counts nothing."""
    if path.is_symlink():
        return 0
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                stat = os.lstat(os.path.join(folder, name))
                total += stat.st_size // stat.st_nlink  # of a file with two names, half for each
            except OSError:
                continue  # removed meanwhile
    return total


def show(items: list[Item]) -> None:
    """A line for each item: size, name, who needs it."""
    for item in sorted(items, key=lambda item: -item.size):
        users = f"needed by run {', '.join(item.needed_by)}" if item.needed_by else "may go"
        if item.is_run:
            users = f"{item.note}; a job works on it" if item.needed_by else item.note
        elif item.note:
            users = f"{users} ({item.note})"
        print(f"{bytes_text(item.size) if item.size else NOTHING:>10}  {item.name:<44} {users}")
    total = sum(item.size for item in items if "/checkpoints/" not in item.name)
    spare = sum(item.size for item in items if not item.needed_by and not item.is_run)
    print(f"{bytes_text(total):>10}  in all, of which {bytes_text(spare)} may go")


def remove(home: Path, items: list[Item], names: list[str]) -> None:
    """Remove items by their names; Failed, and nothing is removed, if one is needed."""
    known = {item.name: item for item in items}
    chosen = [name.rstrip("/") for name in names]
    for name in chosen:
        if name not in known:
            kept = "the run keeps it" if "/checkpoints/" in name else "not in the list"
            raise ConfigError(f"{name}: {kept}; clean without a name shows what may be named")
        users = [run for run in known[name].needed_by if f"runs/{run}" not in chosen]
        if name.startswith("runs/") and known[name].needed_by:
            raise Failed(
                f"{name}: a job works on it or waits to; end it first. If surely none does: rm -r "
                f"{known[name].path}"
            )
        if users:
            also = " ".join(f"runs/{run}" for run in users)
            raise Failed(
                f"{name}: run {', '.join(users)} needs it to go on; nothing was removed. If that "
                f"run may go too: {name} {also}"
            )
    freed = 0
    for name in chosen:
        item = known[name]
        try:
            remove_folder(item.path)
            files.remove_tree(item.path)
        except OSError as error:
            raise Failed(f"{name}: {error.filename}: {error.strerror}; ask its owner") from None
        freed += item.size
        print(f"removed {name}  ({bytes_text(item.size)})", file=sys.stderr)
    print(f"{bytes_text(freed)} freed", file=sys.stderr)
