"""The files that say what a run is doing: status.json, events.jsonl, and the lease."""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.errors import Refused
from trainstack.storage import files

# State of a run -> exit code of its job. torchrun swallows codes: the truth is in status.json.
EXIT_CODES = {
    "DONE": 0,
    "FAILED": 1,
    "PAUSED": 75,
    "NO_PROGRESS": 76,
    "REFUSED": 78,
    "DIVERGED": 79,
    "HANG": 81,
}
QUEUED, STARTING, RUNNING = "QUEUED", "STARTING", "RUNNING"
CONTINUES = "the same command continues it"
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


class RunFolder:
    """A run's folder; only rank 0 and the job's shell write here."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"

    def create(self) -> None:
        for folder in (self.checkpoints, self.logs, self.path / "lease"):
            files.make_folder(folder)
        # Whoever made them: a checkpoint lasts no longer than the names of the folders above it.
        for folder in (self.path, *self.path.parents[:2]):
            files.sync_folder(folder)

    def status(self) -> dict[str, Any]:
        """The last status; empty where none was written or it cannot be read."""
        try:
            return json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def set_status(self, state: str, **facts: Any) -> None:
        """Write the state; ``facts`` replace those of before, the others stay."""
        status = {**self.status(), **facts, "state": state, "updated_at": now()}
        status["run"] = self.path.name
        text = json.dumps(status, indent=1) + "\n"
        files.replace_file(self.path / "status.json", text.encode())

    def pause(self, job: str, attempt: int, cause: str, **facts: Any) -> None:
        """Record that a life left in order; the same command continues the run."""
        facts |= {"job": job, "attempt": attempt, "cause": cause}
        code = EXIT_CODES["PAUSED"]
        self.set_status("PAUSED", **facts, exit_code=code, next_action=CONTINUES)
        self.add_event("paused", **facts)

    def add_event(self, event: str, **facts: Any) -> None:
        """Append to the history: what happened, when, where."""
        record = {"event": event, "at": now(), "host": socket.gethostname(), **facts}
        files.append_line(self.path / "events.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        """The history; a torn last line is left out."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "events.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def add_failure(
        self,
        job: str | None,
        attempt: int,
        rank: int | str,
        state: str,
        code: int,
        cause: str,
        is_victim: bool,
        **facts: Any,
    ) -> None:
        """Leave one rank's account of why it ended; ``is_victim``: it only lost a peer."""
        record = {
            "at": now(),
            **facts,
            "rank": rank,
            "host": socket.gethostname(),
            "state": state,
            "exit_code": code,
            "cause": cause,
            "is_victim": is_victim,
        }
        name = f"{job or 'local'}.{attempt}.rank{rank}.failure.json"
        with contextlib.suppress(OSError):  # the disk may be the very cause
            files.replace_file(self.logs / name, json.dumps(record).encode())
            self.failed_mark(job, attempt).touch()

    def stacks_file(self, job: str | None, attempt: int, rank: int) -> Path:
        """Where a rank's watchdog writes what its threads were doing."""
        return self.logs / f"{job or 'local'}.{attempt}.rank{rank}.stacks"

    def failed_mark(self, job: str | None, attempt: int) -> Path:
        """A file that is there once any rank of a life has failed: cheap to look for."""
        return self.logs / f"{job or 'local'}.{attempt}.failed"

    def failures(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """All accounts of one life, the first that was no victim's first."""
        records = []
        for path in self.logs.glob(f"{job}.{attempt}.rank*.failure.json"):
            with contextlib.suppress(OSError, ValueError):
                records.append(json.loads(path.read_bytes()))
        # An abort is what NCCL does to those who wait: any other account comes first.
        order = lambda r: (r["is_victim"], r.get("is_abort", False), r["at"])  # noqa: E731
        return sorted(records, key=order)

    def left_out(self) -> list[dict[str, int]]:
        """Windows of samples that rollbacks left out, oldest first.

        Each ``{"after": step, "steps": n}``: beyond step ``after`` the data runs n steps ahead.
        """
        try:
            return json.loads((self.path / "left_out.json").read_bytes())
        except FileNotFoundError:
            return []

    def leave_out(self, after: int, until: int) -> None:
        """Record durably that what steps ``after`` + 1 to ``until`` consumed is not used again."""
        assert until > after
        windows = self.left_out()
        steps = until - after + sum(w["steps"] for w in windows if after <= w["after"] < until)
        kept = [w for w in windows if w["after"] < after]
        self.set_left_out([*kept, {"after": after, "steps": steps}])

    def set_left_out(self, windows: list[dict[str, int]]) -> None:
        files.replace_file(self.path / "left_out.json", json.dumps(windows).encode())

    def has_lease(self, epoch: int) -> bool:
        """Whether the lease that rank 0 took shows up here, waiting out a slow file system."""
        for _ in range(100):
            if (self.path / "lease" / f"{epoch}.json").exists():
                return True
            time.sleep(0.1)
        return False


class Lease:
    """Ownership of a run folder: files ``lease/<epoch>.json``, the highest epoch owns.

    Taken by exclusive creation, not flock: run folders lie on shared file systems, where flock may
    exclude nobody. A holder that sees a higher epoch than its own has been replaced and must not
    publish (the fencing of Kleppmann, "How to do distributed locking", 2016).
    """

    def __init__(self, folder: Path):
        self.folder = folder / "lease"
        self.epoch = 0

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
    return is_local_job(holder) and holder["host"] == socket.gethostname()


def is_local_job(holder: dict[str, Any]) -> bool:
    """Whether a job ran without Slurm: only of those does this host know whether they live."""
    return str(holder["job"]).startswith("local")


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of this host that took a lease has ended (or its pid was used again)."""
    return process_start(holder["pid"]) != holder["process_started"]


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot with the boot's id; None where it ended.

    Field 22 of /proc/<pid>/stat, counted behind the command's closing parenthesis (proc(5)).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def now() -> str:
    """The time of day in UTC, to the millisecond."""
    return time_of(time.time())


def time_of(seconds: float) -> str:
    """A moment, in seconds since 1970, as it stands in the records."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int(seconds * 1000) % 1000:03d}Z"
