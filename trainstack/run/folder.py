"""The folder of a run: status.json, events.jsonl, failure reports, and what was left out."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack.checkpoint.names import named_checkpoint
from trainstack.errors import ConfigError
from trainstack.run.states import EXIT_CODES, resume_command
from trainstack.storage import files, layout
from trainstack.storage.files import record_in
from trainstack.units import age, now, seconds_of, time_of
from trainstack.waits import ALIVE_SECONDS, VISIBLE_SECONDS

# How a stop file begins that launch.py wrote, on a signal to torchrun. One by the job's shell says
# that the job shall end; this one may only say that srun ended the other nodes, since one failed.
TORCHRUN_GOT = "torchrun got"
OVERVIEW_BYTES = 1 << 21  # of metrics.jsonl, up to which an overview has all of it
OVERVIEW_PARTS, OVERVIEW_PART_BYTES = 400, 1 << 12  # else so many parts, which hold a few lines


class RunFolder:
    """A run's folder; rank 0 and the job's shell write here, each rank its own failure report."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.status_before = path / ".status.before"  # a submission, which sbatch may refuse

    def create(self) -> None:
        for folder in (self.checkpoints, self.logs, self.path / "lease"):
            files.make_folder(folder)
        # Whoever made them: a checkpoint lasts no longer than the names of the folders above it.
        for folder in (self.path, *self.path.parents[:2]):
            files.sync_folder(folder)

    # --- What the run is doing: status.json

    def status(self) -> dict[str, Any]:
        """The last status; empty if none was written or it cannot be read."""
        return files.object_in(self.path / "status.json")

    def set_status(self, state: str, **facts: Any) -> None:
        """Write the state; ``facts`` replace those of before, the others stay."""
        status = {**self.status(), **facts, "state": state, "updated_at": now()}
        status["run"] = self.path.name
        text = json.dumps(status, indent=1) + "\n"
        files.replace_file(self.path / "status.json", text.encode())

    def pause(self, job: str, attempt: int, cause: str, **facts: Any) -> None:
        """Record that an attempt ended in order, and how the run is resumed."""
        action = f"to resume: {resume_command(self.path.name, job)}"
        facts |= {"job": job, "attempt": attempt, "cause": cause}
        self.set_status("PAUSED", **facts, exit_code=EXIT_CODES["PAUSED"], next_action=action)
        self.add_event("paused", **facts)

    # --- What happened: events.jsonl

    def add_event(self, event: str, **facts: Any) -> None:
        """Append to the history: what happened, when, on which host."""
        record = {"event": event, "at": now(), "host": socket.gethostname(), **facts}
        files.append_line(self.path / "events.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        """The history, oldest first."""
        return [r for r in self._records("events.jsonl") if "event" in r and "at" in r]

    def last_time(self, since: str, until: str) -> str:
        """`` (9 s last time)``: how long it was from one event to another; empty at first."""
        began, found = None, 0.0
        with contextlib.suppress(OSError):  # a log line is not worth an attempt
            for event in self.events():
                job = event.get("job")
                if event["event"] == since:
                    began = event
                elif began and event["event"] == until and job in (None, began.get("job")):
                    began, found = None, seconds_of(event["at"]) - seconds_of(began["at"])
                elif event["event"] == "attempt":
                    began = None
        return f" ({age(found)} last time)" if found else ""

    # --- What the run has logged: metrics.jsonl, of which train/report.py has the format

    def measurements(self, size: int | None = None) -> Iterator[dict[str, Any]]:
        """Steps and evaluations, oldest first; ``size``: within the last so many bytes."""
        return (r for r in self._records("metrics.jsonl", size) if "step" in r)

    def evaluations(self, size: int | None = None) -> Iterator[dict[str, Any]]:
        """The evaluations, oldest first; ``size``: within the last so many bytes."""
        with contextlib.suppress(OSError), (self.path / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - (size or 1 << 60)))
            for line in file:  # of a million, few are parsed
                if b'"eval_loss"' in line and "eval_loss" in (record := record_in(line)):
                    yield record

    def eval_losses(self) -> dict[int, float]:
        """The held-out losses that were measured, by step."""
        return {r["step"]: r["eval_loss"] for r in self.evaluations()}

    def overview(self) -> Iterator[dict[str, Any]]:
        """Logged steps, oldest first: of a long file some hundred that are spread over it."""
        path = self.path / "metrics.jsonl"
        with contextlib.suppress(OSError):
            if (size := path.stat().st_size) <= OVERVIEW_BYTES:
                yield from (r for r in self.measurements() if "loss" in r)
                return
            with path.open("rb") as file:
                for part in range(OVERVIEW_PARTS):
                    file.seek(part * size // OVERVIEW_PARTS)
                    records = map(record_in, file.read(OVERVIEW_PART_BYTES).splitlines())
                    if record := next((r for r in records if "loss" in r), {}):
                        yield record

    def _records(self, name: str, size: int | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a file, one a line; not what is torn, or cut by ``size``."""
        # The end of a file is only shown: what keeps it from being read ends nothing.
        unreadable = contextlib.suppress(FileNotFoundError if size is None else OSError)
        with unreadable, (self.path / name).open("rb") as file:
            if size is not None:
                file.seek(max(0, file.seek(0, 2) - size))
            for line in file.read().splitlines():
                if record := record_in(line):
                    yield record

    # --- The ranks beside each other: ranks.json

    def show_ranks(self, **facts: Any) -> None:
        """Replace what ``rank_seconds`` reads; not synced, since it is only shown."""
        temporary = self.path / ".ranks.json.tmp"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"at": now(), **facts}))
            files.rename(temporary, self.path / "ranks.json")

    def rank_seconds(self) -> dict[str, Any]:
        """What rank 0 showed last: ``step``, ``at``; by rank ``hosts``, ``seconds``; or empty."""
        return files.object_in(self.path / "ranks.json")

    # --- The heartbeat of a job: logs/<job>.alive, which the launchers of its nodes touch

    def beat(self, job: str) -> None:
        with contextlib.suppress(OSError):
            (self.logs / f"{job}.alive").touch()

    def silence(self, job: str) -> float | None:
        """Seconds since a job's last heartbeat; None if there never was one."""
        try:
            return max(0.0, time.time() - (self.logs / f"{job}.alive").stat().st_mtime)
        except OSError:
            return None

    def is_beating(self, job: str) -> bool:
        """Whether the job is alive, by its heartbeat."""
        silence = self.silence(job)
        return silence is not None and silence < ALIVE_SECONDS

    # --- Why an attempt failed: logs/<job>.<attempt>.*

    def add_failure(
        self, job: str | None, attempt: int, rank: int | str, state: str, code: int, cause: str,
        is_victim: bool, **facts: Any,
    ) -> None:  # fmt: skip
        """Leave one rank's failure report.

        ``is_victim``: it only lost a peer, or fails as all do and rank 0 tells.
        """
        record = {
            "at": now(), **facts, "rank": rank, "host": socket.gethostname(), "state": state,
            "exit_code": code, "cause": cause, "is_victim": is_victim,
        }  # fmt: skip
        path = self._log(job, attempt, f"rank{rank}.failure.json")
        with contextlib.suppress(OSError):  # the disk may be the very cause
            files.replace_file(path, json.dumps(record).encode())
            self.failed_mark(job, attempt).touch()

    def failures(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """All failure reports of an attempt, by time; those of victims last."""
        paths = sorted(self.logs.glob(f"{job}.{attempt}.rank*.failure.json"))
        records = filter(None, map(files.object_in, paths))
        # Before victims come aborts: NCCL does that to ranks that wait.
        return sorted(records, key=lambda r: (r["is_victim"], r.get("is_abort", False), r["at"]))

    def failed_mark(self, job: str | None, attempt: int) -> Path:
        """A file that is there once any rank of an attempt has failed: cheap to look for."""
        return self._log(job, attempt, "failed")

    def stopped_mark(self, job: str | None, attempt: int, rank: int) -> Path:
        """A file whose time says when a rank that was stopped ran again."""
        return self._log(job, attempt, f"rank{rank}.stopped")

    def woke_at(self, job: str, attempt: int, rank: int | str) -> str:
        """That time, as reports have it; empty if the rank was never stopped."""
        with contextlib.suppress(OSError, TypeError):
            return time_of(self.stopped_mark(job, attempt, rank).stat().st_mtime)
        return ""

    def add_evidence(self, job: str, attempt: int, rank: int, text: str) -> None:
        """Leave what a slow rank found on its host, a line."""
        with contextlib.suppress(OSError):
            files.replace_file(self._log(job, attempt, f"rank{rank}.slow"), text.encode())

    def evidence(self, job: str, attempt: int, rank: int) -> str:
        """That; empty if the rank was never slow."""
        with contextlib.suppress(OSError, ValueError):
            return self._log(job, attempt, f"rank{rank}.slow").read_text()
        return ""

    def meeting(self, job: str, attempt: int) -> Path:
        """The folder where the nodes of an attempt tell each other their addresses."""
        return self.path / ".meeting" / f"{job}.{attempt}"

    def stacks_file(self, job: str | None, attempt: int, rank: int) -> Path:
        """Where a rank's watchdog writes what its threads were doing."""
        return self._log(job, attempt, f"rank{rank}.stacks")

    def collectives_file(self, job: str | None, attempt: int, rank: int) -> Path:
        """What torch's flight recorder knows of the last collectives of a rank that hung."""
        return self._log(job, attempt, f"rank{rank}.collectives.json")

    def rank_log(self, job: str, attempt: int, rank: int) -> Path:
        return self._log(job, attempt, f"rank{rank}.log")

    def _log(self, job: str | None, attempt: int, name: str) -> Path:
        return self.logs / f"{job or 'local'}.{attempt}.{name}"

    # --- Data that a rollback leaves out: left_out.json

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

    # --- Whether all nodes see one folder

    def has_lease(self, number: int) -> bool:
        """Whether the lease that rank 0 took shows up here, waiting out a slow file system."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not (self.path / "lease" / f"{number}.json").exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def lines_until(path: Path, step: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The records of steps up to one, each with its line; no torn one."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if (record := record_in(line)).get("step", math.inf) <= step:
                yield record, line.rstrip(b"\n") + b"\n"


def find_run(run: str, home: Path | None) -> Path:
    """The folder of a run by its name below ``home``, or by its path; ConfigError if neither is."""
    named = [layout.run_folder(home, run)] if home and "/" not in run else []
    for path in (*named, Path(run).expanduser()):
        if (path / "events.jsonl").is_file() or (path / "samples.jsonl").is_file():
            return path.resolve()
    if named:
        have = sorted(path.parent.name for path in home.glob("runs/*/events.jsonl"))
        there = ", ".join(have) or "none yet"
        raise ConfigError(f"no run {run} in {home / 'runs'}; there are: {there}")
    by_name = "" if "/" in run else "; to find a run by its name: source env.sh, or pass --home"
    raise ConfigError(f"{run} is not a run folder: it has no events.jsonl{by_name}")


def find_checkpoint(text: str, home: Path | None) -> tuple[RunFolder, Path]:
    """The run and its checkpoint that RUN, RUN@STEP, RUN@best or a checkpoint's folder names.

    ConfigError if there is none.
    """
    folder = Path(text).expanduser().resolve()
    if folder.is_dir() and folder.parent.name == "checkpoints":
        return RunFolder(folder.parents[1]), folder
    name, _, which = text.rpartition("@")
    if not name or "/" in which:  # no @, or one of a folder
        name, which = text, ""
    run = RunFolder(find_run(name, home))
    return run, named_checkpoint(run.checkpoints, which)


def numbers_in(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl, named as curves: train/loss, eval/loss."""
    group = "eval" if "eval_loss" in line else "train"
    for key, value in line.items():
        name = f"{group}/{key.removeprefix('source_').removeprefix('eval_')}"
        parts = value if isinstance(value, dict) else {"": value}
        for label, part in parts.items():
            if key != "step" and isinstance(part, int | float):
                yield f"{name}/{label}".rstrip("/"), part


def tail_of(path: Path, size: int) -> str:
    """The text in the last so many bytes of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        return file.read().decode(errors="replace")
    return ""
