"""Who owns a run folder: one attempt of one job at a time."""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.errors import Refused
from trainstack.processes import is_dead, process_start
from trainstack.storage import files
from trainstack.units import now

OWNED_SECONDS = 1.0  # for which an owner may write without looking at the lease again
TAKEOVER_SECONDS = 3.0  # after which an owner that lives on has noticed that it was replaced


class LeaseHeld(Refused):
    """Another job owns the run folder; the message names it."""


@dataclass(frozen=True)
class Owner:
    """One life of one job: ``attempt`` counts from 1 within ``job``.

    ``restarts``: how often Slurm had requeued the job. A node that Slurm lost may live on, and its
    shell may begin further attempts: they must not win over those of the requeued job.
    """

    job: str
    attempt: int
    restarts: int = 0


class Lease:
    """Ownership of a run folder: files ``lease/<epoch>.json``, the highest epoch owns.

    Taken by exclusive creation, not flock: run folders lie on shared file systems, where flock may
    exclude nobody. A holder that sees a higher epoch than its own has been replaced and must not
    publish (the fencing of Kleppmann, "How to do distributed locking", 2016).
    """

    def __init__(self, folder: Path):
        self.folder = folder / "lease"
        self.epoch = 0
        self._checked_at = 0.0

    def take(self, owner: Owner, gone: str | None = None) -> None:
        """Own the folder from now on, or raise LeaseHeld naming who does.

        A released lease, one of an earlier attempt of the same job, one of the job ``gone`` (which
        Slurm no longer knows) and one of a dead process of this host are taken over.
        """
        epoch, holder = self.holder()
        if holder and not holder.get("released") and not self._may_replace(holder, owner, gone):
            raise LeaseHeld(
                f"job {holder['job']} (attempt {holder['attempt']}) on {holder['host']} works in "
                f"{self.folder.parent}; wait for it or end it, or, if it surely has ended, remove "
                f"{self._file(epoch)}"
            )
        record = {
            "job": owner.job,
            "attempt": owner.attempt,
            "restarts": owner.restarts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process_start(os.getpid()),
            "taken_at": now(),
        }
        self.record = record
        if not files.create_file(self._file(epoch + 1), json.dumps(record).encode()):
            raise LeaseHeld(f"another job took {self.folder.parent} at this moment; try again")
        self.epoch = epoch + 1
        if holder and not holder.get("released") and _may_live_on(holder, owner):
            time.sleep(TAKEOVER_SECONDS)
        for old in self._epochs():
            if old < self.epoch:
                files.unlink(self._file(old))

    def check(self) -> None:
        """LeaseHeld where another life has taken over: asked before every publish.

        By the names alone, so that a record that cannot be read hides nobody. A name made here
        first brings the listing up to date where a client of NFS would answer from its cache.
        """
        probe = self.folder / f".look.{os.getpid()}"
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            probe.touch()
            probe.unlink(missing_ok=True)
        if max(self._epochs(), default=0) != self.epoch:
            _, holder = self.holder()
            raise LeaseHeld(f"job {(holder or {}).get('job')} took over {self.folder.parent}")

    def must_own(self) -> None:
        """``check``, at most once in OWNED_SECONDS; nothing on a rank that did not take the lease.

        Asked before anything is written.
        """
        if self.epoch and time.monotonic() > self._checked_at + OWNED_SECONDS:
            self.check()
            self._checked_at = time.monotonic()

    def release(self) -> None:
        """Let the next job take over without asking; nothing where another already did."""
        if self.epoch and self.holder()[0] == self.epoch:
            record = {**self.record, "released": True}
            files.replace_file(self._file(self.epoch), json.dumps(record).encode())

    def holder(self) -> tuple[int, dict[str, Any] | None]:
        """The highest epoch and its record; (0, None) where nobody ever took it."""
        epochs = self._epochs()
        for epoch in sorted(epochs, reverse=True):
            with contextlib.suppress(OSError, ValueError):
                return epoch, json.loads(self._file(epoch).read_bytes())
        return max(epochs, default=0), None

    def _epochs(self) -> list[int]:
        return [int(p.stem) for p in self.folder.glob("[0-9]*.json") if p.stem.isdigit()]

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.json"

    @staticmethod
    def _may_replace(holder: dict[str, Any], owner: Owner, gone: str | None) -> bool:
        if holder["job"] == owner.job:
            theirs = (holder.get("restarts", 0), holder["attempt"])
            return theirs < (owner.restarts, owner.attempt)
        if holder["job"] == gone:
            return True
        return is_known_here(holder) and is_dead(holder)


def _may_live_on(holder: dict[str, Any], owner: Owner) -> bool:
    """Whether a holder may still run on a node that Slurm has lost."""
    is_in_place = holder["job"] == owner.job and holder.get("restarts", 0) == owner.restarts
    return not is_in_place and not is_known_here(holder)


def is_known_here(holder: dict[str, Any]) -> bool:
    """Whether this host can tell if a holder lives: a job of its own, without Slurm."""
    return is_local_job(holder["job"]) and holder["host"] == socket.gethostname()


def is_local_job(job: str) -> bool:
    """Whether a job ran without Slurm: only of those does this host know whether they live."""
    return job.startswith("local")
