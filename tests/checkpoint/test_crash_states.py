"""Whatever a power cut leaves of a save, or of a change of owner: the run continues correctly.

The real code is recorded (files.watched_by). For each point of the record and each choice of what
had reached the disk by then, the folder is made again and the real loader reads it.

The disk keeps what POSIX promises and no more: content once its file was synced, a name once its
folder was. The rest may be there or not, each by itself, and content may also be cut short or zeros
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014; exhaustive small workloads
after Mohan et al., "Finding Crash-Consistency Bugs with Bounded Black-Box Testing", OSDI 2018).
"""

import itertools
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainstack.checkpoint.load import newest_whole
from trainstack.checkpoint.names import BEST, LATEST, checkpoints
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import Share, Snapshot
from trainstack.distributed import World
from trainstack.errors import ConfigError
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, Owner
from trainstack.storage import files
from trainstack.storage.manifest import MANIFEST

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
ROOT = 0  # inode of the recorded folder
LINK = b"-> "  # how the content of a symbolic link begins
EVERY_SUBSET_OF = 12  # changes that wait for a sync; of more, up to two are lost or kept
Entry = tuple[int, str]  # a folder's inode, a name in it


@pytest.fixture(autouse=True, scope="module")
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def quick_folder(tmp_path):
    """In memory if this machine has /dev/shm: thousands of folders are made here."""
    memory = Path("/dev/shm")
    is_usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if is_usable else tmp_path) as folder:
        yield Path(folder)


# --- The disk


@dataclass(frozen=True)
class Change:
    """One operation, by inode: a path may mean another file if an earlier one was lost."""

    kind: str  # as announced, or "returned": from here on its caller relies on it
    inode: int = ROOT
    gone: Entry | None = None  # the name that it takes away
    here: Entry | None = None  # the name that it gives
    data: bytes = b""


class Record:
    """What is in a folder, and from then on each change to it that is announced."""

    def __init__(self, root: Path):
        self.root, self.changes = root, []
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}  # as they were at first
        self.contents: dict[int, bytes] = {}
        self._numbers = itertools.count(1)
        for path in sorted(root.rglob("*")):
            inode = next(self._numbers)
            parent = _inode(self.folders, path.parent.relative_to(root))
            self.folders[parent][path.name] = inode
            if path.is_dir() and not path.is_symlink():
                self.folders[inode] = {}
            else:
                self.contents[inode] = read(path)
        self._now = _copied(self.folders)

    def __call__(self, operation: str, path: Path, detail: Any) -> None:
        inode, gone, here, data = self._inode(path), None, None, b""
        if operation in ("create", "make_folder", "symlink"):
            inode, here = next(self._numbers), self._entry(path)
            if operation == "make_folder":
                self.folders[inode], self._now[inode] = {}, {}
        elif operation in ("link", "rename"):
            here, gone = self._entry(detail), self._entry(path) if operation == "rename" else None
        elif operation in ("unlink", "remove_folder"):
            gone = self._entry(path)
        elif operation == "write":
            data = bytes(detail)
        if operation == "symlink":
            data = LINK + detail.encode()
        if inode is None:  # the unlink of what is not there
            return
        self.changes.append(Change(operation, inode, gone, here, data))
        _take_effect(self._now, self.changes[-1])

    def returned(self) -> None:
        self.changes.append(Change("returned"))

    def _inode(self, path: Path) -> int | None:
        return _inode(self._now, path.relative_to(self.root))

    def _entry(self, path: Path) -> Entry:
        return self._inode(path.parent), path.name


def _inode(folders: dict, path: Path) -> int | None:
    inode = ROOT
    for name in path.parts:
        inode = folders.get(inode, {}).get(name)
    return inode


def _copied(folders: dict) -> dict:
    return {inode: dict(names) for inode, names in folders.items()}


def _take_effect(folders: dict, change: Change) -> None:
    """Change names; do nothing if what the change builds upon never reached the disk."""
    gone, here = change.gone, change.here
    if gone and folders[gone[0]].get(gone[1]) != change.inode:
        return
    if here and here[1] in folders[here[0]]:
        is_full_folder = folders.get(folders[here[0]][here[1]])
        if change.kind != "rename" or is_full_folder:
            return
    if gone:
        del folders[gone[0]][gone[1]]
    if here:
        folders[here[0]][here[1]] = change.inode


def states(record: Record, done: list[Change]) -> Iterator[tuple]:
    """All trees that a disk may hold when the power fails right after ``done``."""
    pending = waiting(done)
    every_content = list(contents(record, done))
    for kept in choices(pending):
        folders = _copied(record.folders)
        for index, change in enumerate(done):
            if index in kept or index not in pending:
                _take_effect(folders, change)
        for content in every_content:
            yield tree(folders, content)


def waiting(done: list[Change]) -> set[int]:
    """Changes of names in folders that were not synced since."""
    synced, found = set(), set()
    for index in reversed(range(len(done))):
        change = done[index]
        parents = {entry[0] for entry in (change.gone, change.here) if entry}
        if change.kind == "sync_folder":
            synced.add(change.inode)
        elif not parents <= synced:
            found.add(index)
    return found


def choices(pending: set[int]) -> Iterator[set[int]]:
    """What is kept of changes that wait: every subset of a few, the extremes of many."""
    sizes = range(len(pending) + 1)
    if len(pending) > EVERY_SUBSET_OF:
        sizes = (0, 1, 2, len(pending) - 2, len(pending) - 1, len(pending))
    for size in sizes:
        yield from map(set, itertools.combinations(sorted(pending), size))


def contents(record: Record, done: list[Change]) -> Iterator[dict[int, bytes]]:
    """What files may hold: what was synced, and the rest whole, absent, torn, or zeros."""
    synced, written = dict(record.contents), {}
    for change in done:
        if change.kind == "create":
            synced[change.inode] = b""
        elif change.kind == "symlink":  # it has no content beside its name
            synced[change.inode] = change.data
        elif change.kind == "write":
            written.setdefault(change.inode, []).append(change.data)
        elif change.kind == "sync":
            synced[change.inode] += b"".join(written.pop(change.inode, []))
    fates = {inode: remains(synced[inode], writes) for inode, writes in written.items()}
    if len(fates) <= 2:
        together: Iterable = itertools.product(*fates.values())
    else:  # all alike, or one otherwise than the rest
        whole = [fate[0] for fate in fates.values()]
        alike = zip(*fates.values(), strict=True)
        one = ([*whole[:i], x, *whole[i + 1 :]] for i, f in enumerate(fates.values()) for x in f)
        together = itertools.chain(alike, one)
    for fate in together:
        yield synced | dict(zip(fates, fate, strict=True))


def remains(synced: bytes, writes: list[bytes]) -> list[bytes]:
    """Of writes that no sync followed: all, none, a part, zeros, not the last, not the first."""
    text = b"".join(writes)
    first_zero = bytes(len(writes[0])) + text[len(writes[0]) :]
    last_lost = b"".join(writes[:-1])
    parts = [text, b"", text[: len(text) // 2], bytes(len(text)), last_lost, first_zero]
    return [synced + part for part in parts]


def tree(folders: dict, content: dict[int, bytes], inode: int = ROOT) -> tuple | bytes:
    """A folder as ((name, bytes or folder), ...)."""
    if inode not in folders:
        return content[inode]
    return tuple((name, tree(folders, content, i)) for name, i in sorted(folders[inode].items()))


def read(path: Path) -> tuple | bytes:
    """A real file, link or folder as ``tree`` has it."""
    if path.is_symlink():
        return LINK + os.readlink(path).encode()
    if not path.is_dir():
        return path.read_bytes()
    return tuple((entry.name, read(entry)) for entry in sorted(path.iterdir()))


def write(path: Path, content: tuple | bytes) -> None:
    if isinstance(content, bytes) and content.startswith(LINK):
        path.symlink_to(content.removeprefix(LINK).decode())
        return
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir()
    for name, below in content:
        write(path / name, below)


# --- What is recorded, and what is right to find after it


@dataclass
class Scenario:
    """A recorded piece of work and how to see what is left of it.

    ``outcomes``: what ``load`` finds before it, and after each return. ``names``: what they show is
    never a part.
    """

    record: Record
    load: Callable[[Path], Any]
    outcomes: list[Any]
    names: list[str]


def first_violation(
    scenario: Scenario, changes: list[Change], scratch: Path
) -> tuple[int, str | None]:
    """The number of different states, and what is wrong with the first that is; None: nothing."""
    shown = {name: shown_by(scenario.record, name) for name in scenario.names}
    known: dict[tuple, Any] = {}
    for until in range(len(changes) + 1):
        returns = sum(change.kind == "returned" for change in changes[:until])
        allowed = scenario.outcomes[returns : returns + 2]
        when = f"a power cut after {until} of {len(changes)} changes ({returns} returns)"
        for state in states(scenario.record, changes[:until]):
            if state not in known:
                known[state] = loaded(scenario, state, scratch / "state")
                for name, right in shown.items():
                    if below(state, name) not in right:
                        return len(known), f"{when}: {name} shows a part"
            if known[state] not in allowed:
                found, right = reprlib.repr(known[state]), " or ".join(map(reprlib.repr, allowed))
                return len(known), f"{when}: found {found} instead of {right}"
    return len(known), None


def shown_by(record: Record, name: str) -> set:
    """All that a name ever shows to those who look while the power stays on."""
    ends = range(len(record.changes) + 1)
    return {below(undisturbed(record, record.changes[:end]), name) for end in ends}


def undisturbed(record: Record, done: list[Change]) -> tuple:
    """What is there after ``done`` while the power stays on."""
    folders = _copied(record.folders)
    for change in done:
        _take_effect(folders, change)
    return tree(folders, next(contents(record, done)))


def below(state: tuple | bytes | None, name: str) -> tuple | bytes | None:
    for part in name.split("/"):
        state = dict(state).get(part) if isinstance(state, tuple) else None
    return state


def loaded(scenario: Scenario, state: tuple, folder: Path) -> Any:
    write(folder, state)
    try:
        return scenario.load(folder)
    finally:
        shutil.rmtree(folder)


def save(
    folder: Path, step: int, still_mine: Callable[[], None] = lambda: None, keep: int = 2,
    best: int = 0,
) -> None:  # fmt: skip
    value = float(step)
    weights = {"a": torch.full((3, 4), value), "b": torch.ones(2, dtype=torch.bfloat16)}
    snapshot = Snapshot(
        step,
        Share(weights, {"a/exp_avg": torch.full((3, 4), value)}),
        b'{"step": %d}' % step,
        {name: b"{}" for name in ("config.json", "generation_config.json", "tokenizer.json")},
        best_step=best,
    )
    saver = Saver(folder, ALONE, keep, "job.1", still_mine)
    saver.start(snapshot)
    assert saver.wait().problem is None


def newest(folder: Path) -> tuple:
    """Name and every byte of the checkpoint that a run resumes from; or why it does not.

    No link leads nowhere, before it looks and after.
    """
    if dangling(folder):
        return ("leads nowhere",)
    try:
        path = newest_whole(folder)
    except ConfigError as error:
        return "refused", str(error)
    assert not dangling(folder)
    return ("nothing", b"") if path is None else (path.name, read(path))


def dangling(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [p for p in found if p.is_symlink() and not p.is_dir() and p.name[0] != "."]


def holder(folder: Path) -> tuple:
    epoch, record = Lease(folder).holder()
    return ("nobody",) if record is None else (epoch, record["job"], "released" in record)


def a_save(folder: Path) -> Scenario:
    """Into a folder that holds two checkpoints; the older one is pruned after it."""
    save(folder, 1)
    save(folder, 2)
    return recorded_save(folder)


def a_save_that_prunes_the_best_one_of_before(folder: Path) -> Scenario:
    """It is a new best one, so that the link leaves what is pruned then."""
    save(folder, 1, best=1)
    save(folder, 2, best=1)
    assert os.readlink(folder / BEST) == "checkpoint-1"
    found = recorded_save(folder, best=3)
    assert os.readlink(folder / BEST) == os.readlink(folder / LATEST) == "checkpoint-3"
    return found


def a_save_over_a_damaged_one(folder: Path) -> Scenario:
    """Of a step that was damaged twice, beside what an attempt left that died while saving it."""
    for step in (1, 2, 3):
        save(folder, step, keep=3, best=step)
    (folder / "checkpoint-3/model.safetensors").write_bytes(b"torn")
    shutil.copytree(folder / "checkpoint-3", folder / "damaged-checkpoint-3")
    leftover = folder / ".checkpoint-3.job.1.tmp"
    leftover.mkdir()
    (leftover / "config.json").write_bytes(b"")
    return recorded_save(folder)


def recorded_save(folder: Path, best: int = 0) -> Scenario:
    before = read(folder)
    record = Record(folder)
    with files.watched_by(record):
        save(folder, 3, best=best)
        record.returned()
    second, third = (read(folder / f"checkpoint-{step}") for step in (2, 3))
    assert below(before, "checkpoint-2") == second
    assert [step for step, _ in checkpoints(folder)] == [3, 2]
    outcomes = [("checkpoint-2", second), ("checkpoint-3", third)]
    return Scenario(record, newest, outcomes, ["checkpoint-3"])


def the_first_save_of_a_run(folder: Path) -> Scenario:
    """In folders that are made for it: they have to last as well."""
    record, run = Record(folder), RunFolder(folder / "runs" / "new")
    lease = Lease(run.path)
    with files.watched_by(record):
        run.create()
        lease.take(Owner("1", 1))
        run.set_status("RUNNING")
        save(run.checkpoints, 1, lease.check)
        record.returned()
    first = ("checkpoint-1", read(run.checkpoints / "checkpoint-1"))
    name = "runs/new/checkpoints"
    outcomes = [("nothing", b""), first]
    return Scenario(record, lambda f: newest(f / name), outcomes, [f"{name}/checkpoint-1"])


def a_change_of_owner(folder: Path) -> Scenario:
    """The next attempt takes the folder over, looks whether it is its own, gives it back."""
    (folder / "lease").mkdir()
    Lease(folder).take(Owner("7", 1))
    record, lease = Record(folder), Lease(folder)
    with files.watched_by(record):
        lease.take(Owner("7", 2))
        record.returned()
        lease.check()
        lease.release()
        record.returned()
    outcomes = [(1, "7", False), (2, "7", False), (2, "7", True)]
    return Scenario(record, holder, outcomes, ["lease/1.json", "lease/2.json"])


def the_first_owner_of_a_run(folder: Path) -> Scenario:
    record, run = Record(folder), RunFolder(folder / "runs" / "new")
    with files.watched_by(record):
        run.create()
        Lease(run.path).take(Owner("7", 1))
        record.returned()
    outcomes = [("nobody",), (1, "7", False)]
    return Scenario(record, lambda f: holder(f / "runs/new"), outcomes, ["runs/new/lease/1.json"])


# --- Every state of each, and the real loader


SCENARIOS = [
    # what happens, and the number of different states below which the enumeration went wrong
    (a_save, 1000),
    (a_save_that_prunes_the_best_one_of_before, 1000),
    (a_save_over_a_damaged_one, 1000),
    (the_first_save_of_a_run, 800),
    (a_change_of_owner, 15),
    (the_first_owner_of_a_run, 15),
]
NAMES = [scenario.__name__ for scenario, _ in SCENARIOS]


@pytest.mark.parametrize(("scenario", "least"), SCENARIOS, ids=NAMES)
def test_whatever_a_power_cut_leaves_is_as_before_or_as_it_became(
    tmp_path, quick_folder, caplog, scenario, least
):
    caplog.set_level("ERROR", "trainstack")
    (tmp_path / "recorded").mkdir()
    found = scenario(tmp_path / "recorded")
    record = found.record
    unannounced = "something changed on the disk that was not announced"
    assert undisturbed(record, record.changes) == read(record.root), unannounced
    count, violation = first_violation(found, record.changes, quick_folder)
    print(f"{scenario.__name__}: {count:,} states")
    assert violation is None
    assert count >= least


# --- The enumeration itself, on protocols that were broken on purpose


def lost(kind: str, inode: int | None = None) -> Callable[[list[Change]], list[Change]]:
    """The record without its changes of a kind, of one file or folder or of all."""
    return lambda changes: [c for c in changes if c.kind != kind or inode not in (None, c.inode)]


def renamed_before_its_manifest(changes: list[Change]) -> list[Change]:
    rename = next(change for change in changes if change.kind == "rename")  # links follow
    rest = [change for change in changes if change is not rename]
    (manifest,) = (i for i, c in enumerate(rest) if c.here == (rename.inode, MANIFEST))
    return [*rest[:manifest], rename, *rest[manifest:]]


def manifest_not_synced_into_its_folder(changes: list[Change]) -> list[Change]:
    rename = next(change for change in changes if change.kind == "rename")  # links follow
    return lost("sync_folder", rename.inode)(changes)


def the_old_lease_removed_first(changes: list[Change]) -> list[Change]:
    (old,) = (c for c in changes if c.kind == "unlink" and c.gone[1] == "1.json")
    return [old, *(change for change in changes if change is not old)]


def links_not_synced_before_pruning(changes: list[Change]) -> list[Change]:
    last = max(i for i, change in enumerate(changes) if change.kind == "sync_folder")
    return changes[:last] + changes[last + 1 :]


FAULTS = {
    "the links are not synced before what they led to is pruned": (
        a_save_that_prunes_the_best_one_of_before, links_not_synced_before_pruning, "leads nowhere"
    ),
    "the folder of the checkpoints is not synced": (
        a_save, lost("sync_folder", ROOT), "found ('leads nowhere'"
    ),
    "the rename comes before the manifest": (
        a_save, renamed_before_its_manifest, "checkpoint-3 shows a part"
    ),
    "the folder that is published is not synced": (
        a_save, manifest_not_synced_into_its_folder, "checkpoint-3 shows a part"
    ),
    "no file is synced": (a_save, lost("sync"), "checkpoint-3 shows a part"),
    "the folder of the runs is not synced": (
        the_first_save_of_a_run, lost("sync_folder", ROOT), "(1 returns): found ('nothing'"
    ),
    "the folder of the lease is not synced": (
        a_change_of_owner, lost("sync_folder"), "found ('nobody',)"
    ),
    "the lease is not synced": (a_change_of_owner, lost("sync"), "lease/2.json shows a part"),
    "the old lease is removed first": (
        a_change_of_owner, the_old_lease_removed_first, "found ('nobody',)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_protocol_that_is_broken_on_purpose_is_found_out(tmp_path, quick_folder, caplog, fault):
    caplog.set_level("ERROR", "trainstack")
    scenario, broken, what = FAULTS[fault]
    (tmp_path / "recorded").mkdir()
    found = scenario(tmp_path / "recorded")
    changes = broken(found.record.changes)
    assert changes != found.record.changes
    count, violation = first_violation(found, changes, quick_folder)
    print(f"{fault}: {violation} ({count:,} states)")
    assert what in violation
