"""A branch: a run that begins as a checkpoint of another one, its parent.

The files of the checkpoint get a second name in the branch, and what the parent has logged up to
there is copied. So the branch needs nothing of it: the parent may continue, prune, or be removed.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack.checkpoint import names
from trainstack.checkpoint.state import read_state
from trainstack.config.schema import Config
from trainstack.errors import ConfigError, Refused
from trainstack.run.folder import RunFolder, lines_until
from trainstack.run.identity import check_identity, identity_beside
from trainstack.storage import files, manifest


def branch_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The event that names the ``parent`` of a run and its ``step``; empty if it is no branch."""
    return next((event for event in events if event["event"] == "branch"), {})


def origin(run: RunFolder, config: Config) -> Path | None:
    """The checkpoint that a run is to begin as; None if it is no branch, or has begun already.

    ConfigError if it is not there or damaged; Refused if the run is another one, or would learn
    from other data than its parent.
    """
    if config.run.parent is None:
        return None
    (parent, step), wanted = config.run.parent, f"run.branch_from={config.run.branch_from}"
    events, name = run.events(), run.path.name
    begun = branch_of(events)
    if begun and (begun["parent"], begun["step"]) != (parent, step):
        is_of = f"{begun['parent']}@{begun['step']}"
        raise Refused(f"{wanted}: run {name} is a branch of {is_of}; choose another run.name")
    has_begun = bool(names.by_name(run.checkpoints)) or any(
        e["event"] == "checkpoint" for e in events
    )
    if begun and has_begun:
        return None
    if has_begun or (not begun and any(e["event"] in ("attempt", "start") for e in events)):
        raise Refused(
            f"{wanted}: run {name} is there, and no branch of it; choose another run.name"
        )
    found = names.named_checkpoint(run.path.with_name(parent) / "checkpoints", str(step))
    if problem := next(manifest.damage(found, names.STATE_BYTES), None):
        raise ConfigError(f"{wanted}: that checkpoint is damaged ({problem}); choose another one")
    saved = read_state(found).identity
    own = found.parents[1] / "config.yaml"
    fix = f"begin with its settings: bash submit.sh {own} run.branch_from={parent}@{step} ..."
    wanted = identity_beside(config, saved)
    check_identity(saved, wanted, f"{name}, a branch of {parent},", fix)
    return found


@contextlib.contextmanager
def as_begun(run: RunFolder, config: Config) -> Iterator[RunFolder]:
    """The run as it will be, for those who look at its checkpoints; nothing is made for good."""
    with tempfile.TemporaryDirectory() as folder:
        if found := origin(run, config):
            run = RunFolder(run.path)
            run.checkpoints = Path(folder)
            for name in files_of(found):
                link = run.checkpoints / found.name / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(found / name)
        yield run


def logged(run: RunFolder, config: Config) -> RunFolder:
    """Whose log a run continues: its own; of a branch that is not made yet its parent's."""
    is_new = config.run.parent and not run.events()
    return RunFolder(run.path.with_name(config.run.parent[0])) if is_new else run


def begin(path: Path, config: Config) -> None:
    """Make a branch in the folder of a run, unless it is none or has begun.

    Its checkpoint comes last: until that is there, the next submission makes all of it again.
    """
    run = RunFolder(path)
    if (found := origin(run, config)) is None:
        return
    parent, step = RunFolder(found.parents[1]), config.run.parent[1]
    run.create()
    if not run.events():
        cause = f"it begins as that of run {parent.path.name}"
        run.add_event("branch", parent=parent.path.name, step=step, cause=cause)
    metrics = (line for _, line in lines_until(parent.path / "metrics.jsonl", step))
    files.replace_file(run.path / "metrics.jsonl", b"".join(metrics))
    executed = executed_until(parent.path / "samples.jsonl", step)
    files.replace_file(run.path / "samples.jsonl", b"".join(executed))
    if windows := [window for window in parent.left_out() if window["after"] <= step]:
        run.set_left_out(windows)
    temporary = run.checkpoints / f".{found.name}.branch.tmp"
    manifest.remove_folder(temporary)
    for name in files_of(found):
        files.make_folder((temporary / name).parent)
        files.give_second_name(found / name, temporary / name)
    if problem := next(manifest.damage(temporary, names.STATE_BYTES), None):
        raise ConfigError(
            f"run {parent.path.name} has just changed {found.name} ({problem}); again"
        )
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        files.sync_folder(folder)
    final = run.checkpoints / found.name
    files.rename(temporary, final)
    files.sync_folder(run.checkpoints)
    names.point_to(final, 0)


def files_of(checkpoint: Path) -> list[str]:
    return [*manifest.read_manifest(checkpoint)["files"], manifest.MANIFEST]


def executed_until(path: Path, step: int) -> list[bytes]:
    """Lines of samples.jsonl up to a step: of each those of the last attempt that executed it."""
    last: dict[int, tuple[str, list[bytes]]] = {}
    for record, line in lines_until(path, step):
        attempt, lines = last.get(record["step"], ("", []))
        kept = lines if attempt == record["attempt"] else []
        last[record["step"]] = record["attempt"], [*kept, line]
    return [line for _, lines in last.values() for line in lines]
