"""What runs are doing: the Python half of monitor.sh, from run folders and squeue's lines alone."""

import argparse
import contextlib
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from trainstack.checkpoint import names
from trainstack.processes import process_start, run_command
from trainstack.run.folder import RunFolder
from trainstack.run.lease import is_local_job, user
from trainstack.run.queue import NO_JOB, Job, meaning, read_queue
from trainstack.run.states import (
    EXIT_CODES,
    NOT_SUBMITTED,
    QUEUED,
    RUNNING,
    STARTING,
    resume_command,
)
from trainstack.storage import layout
from trainstack.units import NOTHING, age, duration, rounded

LOST_CAUSES = {  # state that the run did not write itself -> why it is shown
    "KILLED": "its processes are gone and did not report why",
    "LOST": "Slurm no longer has its job, which did not report why",
}
TAIL_BYTES = 1 << 16  # of metrics.jsonl: some 200 lines
SHOWN_EVENTS = 8
BEGINS_SECONDS = 60  # from the checks of submit.sh --local to its job


@dataclass(frozen=True)
class View:
    """What is known of one run: what its folder says, and what Slurm says of its job."""

    run: RunFolder
    status: dict[str, Any]
    events: list[dict[str, Any]]
    state: str  # that holds now, which may differ from the one in status
    job_id: str | None
    job: Job
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
        if self.state not in LOST_CAUSES:
            return self.status.get("cause")
        if self.job.state:  # of a job that has ended: Slurm remembers it for some minutes
            where = f" on {self.job.nodes}" if self.job.nodes else ""
            reason = f" ({self.job.reason})" if self.job.reason not in ("", "None") else ""
            return f"Slurm says {self.job.state}{reason}{where}, and {self.silent_end}"
        return LOST_CAUSES[self.state]

    @property
    def silent_end(self) -> str:
        """What a job that ended without a word may have lacked."""
        if self.job.state == "CANCELLED":
            return "somebody cancelled it"
        if any(event["event"] == "attempt" for event in self.events):
            return "the job did not report why"
        with contextlib.suppress(OSError):
            written = (self.run.logs / f"{self.job_id}.out").read_text(errors="replace").split("\n")
            if last := [line.strip() for line in written if line.strip()]:
                return f"its log ends with: {shorten(last[-1], 200)}"
        return f"the job wrote nothing: is {self.run.path} visible there?"

    @property
    def next_action(self) -> str | None:
        """What a person does now."""
        if self.job.never_starts:
            return f"scancel {self.job_id}, then submit without what Slurm names"
        if self.job.is_live:
            return None
        if self.state in LOST_CAUSES:
            return f"to resume: {resume_command(self.run.path.name, self.status.get('job'))}"
        if self.state == "DONE" and self.checkpoint is None:
            return "its checkpoints are gone"
        return self.status.get("next_action")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainstack.monitor.screen", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument(
        "--queue", action="store_true", help="stdin has squeue's lines, as run/queue.py has them"
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


def view_of(run: RunFolder, jobs: dict[str, Job] | None) -> View:
    """Read one run's folder; ``jobs``: those that Slurm has, None without Slurm."""
    status, newest = run.status(), names.checkpoints(run.checkpoints)
    events = run.events()
    job_id = job_of(status, events, jobs or {})
    job = (jobs or {}).get(job_id, NO_JOB)
    logged = list(run.measurements(TAIL_BYTES))[::-1]
    return View(
        run=run, status=status, events=events, job_id=job_id, job=job,
        state=true_state(run, status, events, job, is_slurm_heard=jobs is not None),
        measured=next((r for r in logged if "loss" in r), {}),
        evaluated=next((r for r in logged if "eval_loss" in r), {}),
        checkpoint=newest[0] if newest else None,
    )  # fmt: skip


def job_of(
    status: dict[str, Any], events: list[dict[str, Any]], jobs: dict[str, Job]
) -> str | None:
    """The job of a run that is shown: the one that runs, else the next, else the last."""
    submitted = [event["job"] for event in events if event["event"] == "submitted"]
    own = [status["job"]] if status.get("job") else []
    for is_wanted in (lambda job: job.is_started, lambda job: job.is_live):
        for job_id in (*own, *submitted):
            if is_wanted(jobs.get(job_id, NO_JOB)):
                return job_id
    return next(iter(own or submitted[-1:]), None)


def true_state(
    run: RunFolder, status: dict[str, Any], events: list[dict[str, Any]], job: Job,
    is_slurm_heard: bool,
) -> str:  # fmt: skip
    """The state that holds now: a job that waits, starts or was killed could not write it."""
    state = status.get("state", "UNKNOWN")
    if job.is_waiting:
        waits = "HELD" if job.is_held else "BLOCKED" if job.never_starts else QUEUED
        return f"{state}, {waits}" if state in EXIT_CODES else waits
    if job.state in ("SUSPENDED", "STOPPED"):
        return "SUSPENDED"
    if job.is_started:
        return STARTING if state == QUEUED else state
    if state in EXIT_CODES or state == NOT_SUBMITTED:
        return state
    if state == STARTING and not status.get("job"):  # of this machine, and it has not begun
        return state if age_of(run.path / "status.json") < BEGINS_SECONDS else "KILLED"
    if state != QUEUED and is_local_job(status.get("job") or ""):
        if status.get("host") != socket.gethostname():
            return state  # only its own host could tell
        return state if process_start(status["pid"]) else "KILLED"
    if not is_slurm_heard or (not job.state and may_be_hidden(run, status, events)):
        return state
    return "LOST"


def age_of(path: Path) -> float:
    """Seconds since a file was written."""
    return time.time() - path.stat().st_mtime


def may_be_hidden(run: RunFolder, status: dict[str, Any], events: list[dict[str, Any]]) -> bool:
    """Whether a job may be there though Slurm does not show it: sites hide the jobs of others."""
    owners = [event.get("user", user()) for event in events if event["event"] == "submitted"]
    is_others = bool(owners) and owners[-1] != user()
    is_waiting = is_others and status.get("state") == QUEUED
    return is_waiting or run.is_beating(status.get("job") or "")


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
        "JOB LEFT": view.job.left if view.job.is_started else NOTHING,
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
        shown, whole = min(len(view.events), SHOWN_EVENTS), len(view.events)
        print(f"  history     the last {shown} of {whole} in events.jsonl")
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
    if view.next_action:
        yield "next", view.next_action
    if view.job_id:
        yield "job", job_text(view)
    if view.job.is_started:
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
        bits = evaluated.get("eval_bits_per_byte")
        exact = f", {bits:.4f} bits per byte" if bits else ""
        yield "held out", f"{loss}, perplexity {perplexity}{exact} at {at_step}"
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
    if view.job.is_waiting:
        text += f" ({meaning(view.job.reason, view.job_id)})"
    return text


if __name__ == "__main__":
    run_command(main)
