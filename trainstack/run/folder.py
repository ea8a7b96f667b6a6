"""The files that say what a run is doing: status.json, events.jsonl, and the lease."""

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

from trainstack.run.states import CONTINUES, EXIT_CODES
from trainstack.storage import files
from trainstack.units import now

TORCHRUN_GOT = "torchrun got"  # how a stop file begins that launch.py wrote


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
