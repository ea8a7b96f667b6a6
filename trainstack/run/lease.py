"""Who owns a run folder: one attempt of one job at a time."""

import contextlib
import json
import os
import pwd
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainstack.errors import Refused
from trainstack.processes import is_dead, process_start
from trainstack.run.states import is_local_job
from trainstack.storage import files
from trainstack.units import now
from trainstack.waits import OWNED_SECONDS, TAKEOVER_SECONDS


@dataclass(frozen=True)
class Owner:
    """One attempt of one job: ``attempt`` counts from 1 within ``job``.

    ``restarts``: how often Slurm had requeued the job. A node that Slurm lost may still run, and
    its shell may begin further attempts: they must not win over those of the requeued job.
    """

    job: str
    attempt: int
    restarts: int = 0


def order_of(holder: dict[str, Any]) -> tuple[int, int]:
    """By the record of a holder, or of an Owner: of one job, a later attempt has a greater one."""
    return holder.get("restarts", 0), holder["attempt"]


class Lease:
    """Ownership of a run folder: files ``lease/<number>.json``, the highest number owns.

    Taken by exclusive creation, not flock: run folders are on shared file systems, where flock may
    exclude nobody. A holder that sees a higher number than its own has been replaced and must not
    publish (the fencing of Kleppmann, "How to do distributed locking", 2016).
    """

    def __init__(self, folder: Path):
        self.folder = folder / "lease"
        self.number = 0
        self._checked_at = 0.0

    def take(self, owner: Owner, gone: str | None = None) -> None:
        """Own the folder from now on, or raise Refused naming who does.

        Replaced are: one that gave it back, an earlier attempt of the same job, the job ``gone``
        (which Slurm says has ended, or does not show and has no heartbeat), and a process of this
        host that has ended.
        """
        number, holder = self.holder()
        if holder and holder.get("released"):
            holder = None
        if holder and not may_replace(holder, owner, gone):
            raise Refused(
                f"job {holder['job']} (attempt {holder['attempt']}) on {holder['host']} works in "
                f"{self.folder.parent}; wait for it or end it, or, if it surely has ended, remove "
                f"{self._file(number)}"
            )
        self.record = {
            **asdict(owner), "user": user(), "host": socket.gethostname(), "pid": os.getpid(),
            "process_started": process_start(os.getpid()), "taken_at": now(),
        }  # fmt: skip
        if not files.create_file(self._file(number + 1), json.dumps(self.record).encode()):
            raise Refused(f"another job took {self.folder.parent} at this moment; try again")
        self.number = number + 1
        if holder and may_still_run(holder, owner):
            time.sleep(TAKEOVER_SECONDS)  # it writes until it looks at the lease again
        for old in self._numbers():
            if old < self.number:
                files.unlink(self._file(old))

    def check(self) -> None:
        """Refused if another attempt has taken over: asked before every publish.

        By the names alone, so that a record that cannot be read hides nobody. A name made here
        first brings the listing up to date if a client of NFS would answer from its cache.
        """
        probe = self.folder / f".look.{os.getpid()}"
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            probe.touch()
            probe.unlink(missing_ok=True)
        if max(self._numbers(), default=0) != self.number:
            _, holder = self.holder()
            raise Refused(f"job {(holder or {}).get('job')} took over {self.folder.parent}")

    def check_often(self) -> None:
        """``check``, at most once in OWNED_SECONDS; nothing on a rank that did not take the lease.

        Asked before anything is written.
        """
        if self.number and time.monotonic() > self._checked_at + OWNED_SECONDS:
            self.check()
            self._checked_at = time.monotonic()

    def release(self) -> None:
        """Let the next job take over without asking; does nothing if another already did."""
        if self.number and self.holder()[0] == self.number:
            record = {**self.record, "released": True}
            files.replace_file(self._file(self.number), json.dumps(record).encode())

    def holder(self) -> tuple[int, dict[str, Any] | None]:
        """The highest number and its record; (0, None) if nobody ever took it."""
        numbers = self._numbers()
        for number in sorted(numbers, reverse=True):
            with contextlib.suppress(OSError, ValueError):
                return number, json.loads(self._file(number).read_bytes())
        return max(numbers, default=0), None

    def unreleased(self) -> dict[str, Any] | None:
        """The record of who took the folder last, if it was not given back."""
        _, holder = self.holder()
        return None if holder and holder.get("released") else holder

    def _numbers(self) -> list[int]:
        return [int(p.stem) for p in self.folder.glob("[0-9]*.json") if p.stem.isdigit()]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.json"


def may_replace(holder: dict[str, Any], owner: Owner, gone: str | None) -> bool:
    """Whether a holder that did not give the folder back has no right to it any more."""
    if holder["job"] == owner.job:
        return order_of(holder) < order_of(vars(owner))
    if holder["job"] == gone:
        return True
    return is_known_here(holder) and is_dead(holder)


def may_still_run(holder: dict[str, Any], owner: Owner) -> bool:
    """Whether a holder may still run on a node that Slurm has lost."""
    is_in_place = holder["job"] == owner.job and holder.get("restarts", 0) == owner.restarts
    return not is_in_place and not is_known_here(holder)


def is_known_here(holder: dict[str, Any]) -> bool:
    """Whether this host can tell if a holder is alive: a job of its own, without Slurm."""
    return is_local_job(holder["job"]) and holder["host"] == socket.gethostname()


def user() -> str:
    """The name of this account, or its number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
