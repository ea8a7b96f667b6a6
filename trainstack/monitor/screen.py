"""What runs are doing: the Python half of monitor.sh, from run folders and squeue's lines alone."""

import argparse
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.checkpoint import names
from trainstack.processes import process_start
from trainstack.run.folder import RunFolder
from trainstack.run.lease import is_local_job
from trainstack.run.states import EXIT_CODES, RUNNING
from trainstack.storage import layout
from trainstack.units import NOTHING, age, duration, rounded

LOST_CAUSES = {  # state that the run did not write itself -> why it is shown
    "KILLED": "its processes are gone and did not report why; the same command continues it",
    "LOST": "Slurm no longer has its job, which did not report why; the same command continues it",
}
TAIL_BYTES = 1 << 16  # of metrics.jsonl: some 200 lines
SHOWN_EVENTS = 8


@dataclass(frozen=True)
class SlurmJob:
    """One line of squeue."""

    state: str
    left: str
    reason: str


NO_JOB = SlurmJob("", "", "")


@dataclass(frozen=True)
class View:
    """What is known of one run: what its folder says, and what Slurm says of its job."""

    run: RunFolder
    status: dict[str, Any]
    events: list[dict[str, Any]]
    state: str  # that holds now, which may differ from the one in status
    job_id: str | None
    job: SlurmJob
    measured: dict[str, Any]  # the last logged step; empty if there is none
    evaluated: dict[str, Any]  # the last evaluation; empty if there is none
    checkpoint: tuple[int, Path] | None

    @property
    def step(self) -> int:
        return max(self.status.get("step") or 0, self.measured.get("step", 0))

    @property
    def max_steps(self) -> int | None:
        return self.status.get("max_steps")

    @property
    def seconds_left(self) -> float | None:
        """Until the run ends, if it runs and its end is known."""
        if self.state != RUNNING or not self.max_steps or not self.measured:
            return None
        return (self.max_steps - self.step) * self.measured["step_seconds"]

    @property
    def cause(self) -> str | None:
        """Why the run is in its state."""
        is_own = self.state in EXIT_CODES
        return self.status.get("cause") if is_own else LOST_CAUSES.get(self.state)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainstack.monitor.screen", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument(
        "--queue", action="store_true", help="stdin has squeue's lines: id|state|time left|reason"
    )
    parser.add_argument("run", nargs="?")
    options = parser.parse_args(arguments)
    jobs = read_queue(sys.stdin.read()) if options.queue else None  # None: no Slurm here
    runs = [path.parent for path in sorted((options.home / "runs").glob("*/status.json"))]
    if not options.run:
        if not runs:
            print("monitor.sh: no runs yet; start one: bash submit.sh", file=sys.stderr)
        else:
            show_table(view_of(RunFolder(path), jobs) for path in runs)
        return 0
    run = RunFolder(layout.run_folder(options.home, options.run))
    if not run.path.is_dir():
        have = ", ".join(path.name for path in runs) or "none yet"
        print(f"monitor.sh: error: no run {options.run}; there are: {have}", file=sys.stderr)
        return 1
    show_run(view_of(run, jobs))
    return 0


def read_queue(text: str) -> dict[str, SlurmJob]:
    """Jobs by id from squeue's lines ``id|state|time left|reason``."""
    lines = (line.split("|") for line in text.splitlines())
    return {line[0]: SlurmJob(line[1], line[2], line[3]) for line in lines if len(line) == 4}


def view_of(run: RunFolder, jobs: dict[str, SlurmJob] | None) -> View:
    """Read one run's folder; ``jobs``: those that Slurm has, None without Slurm."""
    status, newest = run.status(), names.checkpoints(run.checkpoints)
    events = run.events()
    submitted = [event["job"] for event in events if event["event"] == "submitted"]
    job_id = status.get("job") or (submitted[-1] if submitted else None)
    job = (jobs or {}).get(job_id)
    logged = list(run.measurements(TAIL_BYTES))[::-1]
    return View(
        run=run, status=status, events=events, state=true_state(status, job, jobs), job_id=job_id,
        job=job or NO_JOB, measured=next((r for r in logged if "loss" in r), {}),
        evaluated=next((r for r in logged if "eval_loss" in r), {}),
        checkpoint=newest[0] if newest else None,
    )  # fmt: skip


def true_state(
    status: dict[str, Any], job: SlurmJob | None, jobs: dict[str, SlurmJob] | None
) -> str:
    """The state that holds now: a job that was killed could not write that it ended."""
    state = status.get("state", "UNKNOWN")
    if state in EXIT_CODES:
        return state if job is None or job.state != "PENDING" else f"{state}, QUEUED"
    if job is not None:
        return "QUEUED" if job.state == "PENDING" else state
    if state != "QUEUED" and is_local_job(status.get("job") or ""):
        if status.get("host") != socket.gethostname():
            return state  # only its own host could tell
        return state if process_start(status["pid"]) else "KILLED"
    return state if jobs is None else "LOST"


def show_table(views: Iterable[View]) -> None:
    """Print one line for each run, of which there is at least one, in columns."""
    cells = [cells_of(view) for view in views]
    rows = [cells[0].keys(), *(row.values() for row in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def cells_of(view: View) -> dict[str, str]:
    """The cells of one run by the titles of their columns, in order."""
    measured = view.measured
    loss = f"{measured['loss']:.3f}" if measured else NOTHING
    speed = f"{measured['tokens_per_second']:,.0f}" if measured else NOTHING
    is_of_slurm = bool(view.job_id) and not is_local_job(view.job_id)
    return {
        "RUN": view.run.path.name,
        "JOB": view.job_id if is_of_slurm else NOTHING,
        "SLURM": view.job.state or NOTHING,
        "STATE": view.state,
        "STEP": steps(view),
        "LOSS": loss,
        "TOK/S": speed if view.state == RUNNING else NOTHING,
        "JOB LEFT": view.job.left or NOTHING,
        "RUN ETA": duration(view.seconds_left),
        "CHECKPOINT": newest_checkpoint(view),
    }


def steps(view: View) -> str:
    total = f"/{view.max_steps:,}" if view.max_steps else ""
    return f"{view.step:,}{total}" if view.step or total else NOTHING


def newest_checkpoint(view: View) -> str:
    if view.checkpoint is None:
        return NOTHING
    step, path = view.checkpoint
    return f"step {step:,}, {age(time.time() - path.stat().st_mtime)} old"


def show_run(view: View) -> None:
    """Print one screen: what the run does, how it learns, where to look, what happened."""
    print(f"run {view.run.path.name}")
    for label, text in rows_of(view):
        print(f"  {label:<11} {text}")
    if view.events:
        print("  history")
    for event in view.events[-SHOWN_EVENTS:]:
        step = f" step {event['step']:,}" if event.get("step") is not None else ""
        cause = f": {event['cause']}" if event.get("cause") else ""
        print(f"    {event['at'][:19]}Z  {event['event']}{step}{cause}")


def rows_of(view: View) -> Iterator[tuple[str, str]]:
    """State and job, loss and speed, where to look: each a label and a text."""
    yield "state", view.state
    yield "step", steps(view)
    if view.cause:
        yield "cause", view.cause
    if view.status.get("next_action"):
        yield "next", view.status["next_action"]
    if view.job_id:
        yield "job", job_text(view)
    if view.job.left:
        yield "job left", view.job.left
    if view.status.get("nodes"):
        yield "nodes", ", ".join(view.status["nodes"])
    if measured := view.measured:
        speed = f"{measured['tokens_per_second']:,.0f} tokens/s"
        yield "loss", f"{measured['loss']:.4f} at step {measured['step']:,}"
        yield "speed", f"{speed}, {measured['step_seconds']:.2f} s per step"
        yield "seen", f"{measured['tokens_seen']:,} tokens, epoch {measured['epoch']:.3f}"
    if evaluated := view.evaluated:
        perplexity, at_step = rounded(evaluated["eval_perplexity"]), f"step {evaluated['step']:,}"
        loss = f"loss {evaluated['eval_loss']:.4f}"
        yield "held out", f"{loss}, perplexity {perplexity} at {at_step}"
    if view.seconds_left is not None:
        yield "run ETA", duration(view.seconds_left)
    yield "checkpoint", newest_checkpoint(view)
    yield "folder", str(view.run.path)
    logs = sorted(view.run.logs.glob("*.out")) or sorted(view.run.logs.glob("*.rank0.log"))
    if logs:
        yield "log", str(max(logs, key=lambda path: path.stat().st_mtime))


def job_text(view: View) -> str:
    text = f"{view.job_id}, attempt {view.status.get('attempt') or 1}"
    if view.job.state:
        text += f", Slurm says {view.job.state}"
    if view.job.state == "PENDING":
        text += f" ({view.job.reason})"
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
