"""One checkpoint on its way to its name: ranks write their shares, rank 0 seals and renames.

The order is the protocol (doc/protocols.md, publish): every file is written and synced under a
temporary name; the manifest comes last; the lease is read again; then the rename makes it visible.
The links follow it, and only then what is not kept goes: no link ever leads nowhere.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from trainstack.checkpoint.names import BEST, LATEST, checkpoints, linked, point_to
from trainstack.checkpoint.snapshot import WEIGHTS, SaveError, Share, Snapshot
from trainstack.checkpoint.state import STATE
from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.distributed import World, from_main, gather
from trainstack.errors import Refused
from trainstack.storage import files, manifest
from trainstack.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

Entries = dict[str, dict]  # of a manifest, by the file's name


@dataclass(frozen=True)
class Publisher:
    """Publishes checkpoints into a folder, for one attempt of a run."""

    folder: Path
    attempt: str  # JOB.N
    world: World
    group: dist.ProcessGroup  # of its own: never the loop's
    keep: int  # newest checkpoints that stay, at least two; the best one stays beside them
    check_owner: Callable[[], None]  # raises Refused if another attempt owns the run now
    pause: Callable[[float], None]  # called after so many seconds of writing

    def publish(self, snapshot: Snapshot, share: Share | str) -> int:
        """Write, agree, seal, rename; the size in bytes. Collective within the group.

        ``share``: this rank's, or why it could not be copied. SaveError, on every rank, if any rank
        could not copy or write; Refused if the run is another's.
        """
        final = self.folder / f"checkpoint-{snapshot.step}"
        temporary = self.folder / f".{final.name}.{self.attempt}.tmp"
        problem, entries = None, {}
        if self.world.is_main:
            problem = problem_of(lambda: self._prepare(temporary), temporary)
        problem = from_main(problem, self.group)
        if problem is None and isinstance(share, str):
            problem = share
        elif problem is None:
            entries, problem = self._write(temporary, snapshot, share)
        answers = gather((entries, problem), self.group)
        problem = next((found for _, found in answers if found), None)
        whole = {name: entry for own, _ in answers for name, entry in own.items()}
        if self.world.is_main and problem is None:
            problem = problem_of(lambda: self._seal(temporary, final, whole, snapshot.step), final)
        problem = from_main(problem, self.group)
        if problem is not None:
            if self.world.is_main:
                manifest.remove_folder(temporary)
            raise problem if isinstance(problem, Refused) else SaveError(problem)
        if self.world.is_main:
            point_to(final, snapshot.best_step)
            kept = linked(self.folder, BEST), self.folder / f"checkpoint-{snapshot.best_step}"
            for _, path in checkpoints(self.folder)[max(2, self.keep) :]:
                if path not in kept:
                    manifest.remove_folder(path)
        return sum(entry["size"] for entry in whole.values())

    def _prepare(self, temporary: Path) -> None:
        self.check_owner()  # first: the leftovers may be the unfinished save of a newer attempt
        for leftover in self.folder.glob(".checkpoint-*.tmp"):  # of attempts killed while saving
            manifest.remove_folder(leftover)
        files.make_folder(temporary / "training")

    def _write(self, temporary: Path, snapshot: Snapshot, share: Share) -> tuple[Entries, str]:
        """Write this rank's files; their manifest entries, and the problem or None."""
        entries: Entries = {}
        need = sum(tensor.nbytes for _, tensor in share.tensors())

        def write() -> None:
            if self.world.is_main:
                for path in snapshot.synced_first:
                    files.sync_file(path)
                for name, data in snapshot.small_files.items():
                    files.make_folder((temporary / name).parent)
                    entries[name] = files.write_file(temporary / name, data)
            if share.weights:
                name = ADAPTER_WEIGHTS if ADAPTER_CONFIG in snapshot.small_files else WEIGHTS
                entries[name] = write_safetensors(temporary / name, share.weights, self.pause)
            if self.world.is_main:
                entries[STATE] = files.write_file(temporary / STATE, snapshot.state)
            if share.optimizer:
                name = f"training/optimizer-{self.world.rank}.safetensors"
                entries[name] = write_safetensors(temporary / name, share.optimizer, self.pause)

        problem = problem_of(write, temporary)
        if problem is not None:
            who = f"rank {self.world.rank} on {os.uname().nodename}"
            problem += f", {need / 1e9:.2f} GB needed by {who}"
        return entries, problem

    def _seal(self, temporary: Path, final: Path, entries: Entries, step: int) -> None:
        manifest.write_manifest(temporary, entries, kind="checkpoint", step=step)
        self.check_owner()  # the last look before the name: writing may have taken minutes
        if final.exists():  # damaged, and trained again since
            set_aside(final)
        files.rename(temporary, final)
        files.sync_folder(final.parent)


def problem_of(action: Callable[[], None], path: Path) -> str | Refused | None:
    """Run an action; what it raised as one line, since the other ranks wait for an answer."""
    try:
        action()
    except OSError as error:
        free = "free space unknown"
        with contextlib.suppress(OSError):  # what broke the one may break the other
            free = f"{files.free_bytes(path) / 1e9:.2f} GB free"
        return f"{error.filename or path}: {error.strerror or error} ({free})"
    except Refused as error:
        return error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that a person can look and no name promises too much."""
    for name in (LATEST, BEST):
        if linked(folder.parent, name) == folder:
            files.unlink(folder.parent / name)
            files.sync_folder(folder.parent)
    aside = folder.with_name(f"damaged-{folder.name}")
    manifest.remove_folder(aside)
    files.rename(folder, aside)
