"""One run as it is now: what its folder says, and what Slurm says of its job."""

import contextlib
import functools
import math
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from trainstack.checkpoint import names
from trainstack.history.attempts import Interruption, interruptions
from trainstack.job.resources import minutes_in
from trainstack.processes import process_start
from trainstack.run.folder import RunFolder, tail_of
from trainstack.run.lease import user
from trainstack.run.queue import NO_JOB, Job
from trainstack.run.states import (
    EXIT_CODES,
    NOT_SUBMITTED,
    QUEUED,
    RESTARTING,
    RUNNING,
    STARTING,
    is_local_job,
    new_run_command,
    resume_command,
)

UNKNOWN = "UNKNOWN"
LOST_CAUSES = {  # state that the run did not write itself -> why it is shown
    "KILLED": "its processes are gone and did not report why",
    "LOST": "Slurm no longer has its job, which did not report why",
}
TAIL_BYTES = 1 << 18  # of metrics.jsonl: some 800 lines
EVALUATION_BYTES = 1 << 20  # of it, in which evaluations are looked for
LOG_BYTES = 1 << 14  # of the log of a job, whose last line is told
SPOILED = 2  # times the least usual loss, from which a checkpoint is no good start
SPAN = 10  # logged steps, whose median is the usual loss
BEGINS_SECONDS = 60  # from the checks of submit.sh --local to its job


@dataclass(frozen=True)
class View:
    """What is known of one run."""

    run: RunFolder
    status: dict[str, Any]
    events: list[dict[str, Any]]
    state: str  # that holds now, which may differ from the one in status
    job_id: str | None
    job: Job
    logged: list[dict[str, Any]]  # the last logged steps, newest first
    evaluations: list[dict[str, Any]]  # the last evaluations, newest first
    checkpoint: tuple[int, Path] | None

    @property
    def measured(self) -> dict[str, Any]:
        """The last logged step; empty if there is none."""
        return next(iter(self.logged), {})

    @property
    def evaluated(self) -> dict[str, Any]:
        """The last evaluation; empty if there is none."""
        return next(iter(self.evaluations), {})

    @property
    def attempts(self) -> int:
        """How often its processes began, of all its jobs."""
        return sum(event["event"] == "attempt" for event in self.events)

    @property
    def has_trained(self) -> bool:
        """Whether the newest attempt has come to its first step."""
        for event in reversed(self.events):
            if event["event"] in ("attempt", "training"):
                return event["event"] == "training"
        return True  # of a run whose history is lost

    @property
    def slow_ranks(self) -> list[dict[str, Any]]:
        """The events that named the ranks which are slow now."""
        slow: dict[int, dict[str, Any]] = {}
        for event in self.events:
            if event["event"] == "attempt":
                slow.clear()
            elif event["event"] == "slow_rank":
                slow[event["rank"]] = event
            elif event["event"] == "slow_rank_over":
                slow.pop(event["rank"], None)
        return list(slow.values())

    @property
    def incidents(self) -> list[Interruption]:
        """What ended its attempts, or what they trained on after, oldest first."""
        running = (self.status.get("job"), self.status.get("attempt"))  # it has not ended
        return interruptions(self.events, (None, None) if self.state in LOST_CAUSES else running)

    @property
    def last_sign_at(self) -> float:
        """When it wrote something, in seconds since 1970."""
        names = ("status.json", "events.jsonl", "metrics.jsonl")
        return max(written_at(self.run.path / name) for name in names)

    @property
    def step(self) -> int:
        return max(self.status.get("step") or 0, self.measured.get("step", 0))

    @property
    def max_steps(self) -> int | None:
        return self.status.get("max_steps")

    @property
    def share(self) -> float | None:
        """Of the run's steps that are done; None if their number is not known."""
        return self.step / self.max_steps if self.max_steps else None

    @property
    def is_live(self) -> bool:
        """Whether something works on it, or will without anybody's doing."""
        return self.job.is_live or self.state in (QUEUED, STARTING, RUNNING, RESTARTING)

    @property
    def jobs_left(self) -> int | None:
        """How many jobs it takes after this one; None if that is not known."""
        limit, left = minutes_in(self.job.limit), minutes_in(self.job.left)
        if self.seconds_left is None or not limit or left is None:
            return None
        return math.ceil(max(0.0, self.seconds_left / 60 - left) / limit)

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
        if written := tail_of(self.run.logs / f"{self.job_id}.out", LOG_BYTES).strip():
            return f"its log ends with: {shorten(written.splitlines()[-1], 200)}"
        return f"the job wrote nothing: is {self.run.path} visible there?"

    @functools.cached_property
    def spoiled_loss(self) -> tuple[float, float] | None:
        """The usual loss before the newest checkpoint and the least one, if they are far apart."""
        step = self.checkpoint[0] if self.checkpoint else 0
        logged = (r for r in self.run.overview() if r["step"] <= step)
        losses = [r["loss"] for r in logged if math.isfinite(r["loss"])]
        parts = [losses[i : i + SPAN] for i in range(0, len(losses), SPAN)]
        usual = [statistics.median(part) for part in parts]
        is_spoiled = bool(usual) and usual[-1] > SPOILED * min(usual)
        return (usual[-1], min(usual)) if is_spoiled else None

    @property
    def next_action(self) -> str | None:
        """What a person does now."""
        if self.job.never_starts:
            return f"scancel {self.job_id}, then submit without what Slurm names"
        if self.job.is_live:
            return None
        if self.state in LOST_CAUSES:
            return f"to resume: {resume_command(self.run.path.name, self.status.get('job'))}"
        if self.state == "DIVERGED" and (loss := self.spoiled_loss):
            again = new_run_command(self.run.path.name, self.status.get("job"))
            told = f"(loss {loss[0]:.3g}, once {loss[1]:.3g})"
            return (
                f"{self.checkpoint[1].name} has diverged too {told}: fix the cause, then: {again}"
            )
        if self.state == "DONE" and self.checkpoint is None:
            return "its checkpoints are gone"
        return self.status.get("next_action")


def unreadable(run: RunFolder, why: Exception) -> View:
    """A run of which nothing can be told, such as the private one of a colleague."""
    status = {"cause": f"{type(why).__name__}: {why}"}
    return View(run, status, [], UNKNOWN, None, NO_JOB, [], [], None)


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
        logged=[r for r in logged if "loss" in r],
        evaluations=list(run.evaluations(EVALUATION_BYTES))[::-1],
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
    state = status.get("state", UNKNOWN)
    if state == UNKNOWN:  # it cannot be read, or is torn
        return state
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
        began_at = written_at(run.path / "status.json")
        return state if time.time() - began_at < BEGINS_SECONDS else "KILLED"
    if state != QUEUED and is_local_job(status.get("job")):
        if status.get("host") != socket.gethostname():
            return state  # only its own host could tell
        return state if process_start(status["pid"]) else "KILLED"
    if not is_slurm_heard or (not job.state and may_be_hidden(run, status, events)):
        return state
    return "LOST"


def written_at(path: Path) -> float:
    """When a file was, in seconds since 1970; 0 if that cannot be told."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def may_be_hidden(run: RunFolder, status: dict[str, Any], events: list[dict[str, Any]]) -> bool:
    """Whether a job may be there though Slurm does not show it: sites hide the jobs of others."""
    owners = [event.get("user", user()) for event in events if event["event"] == "submitted"]
    is_others = bool(owners) and owners[-1] != user()
    is_waiting = is_others and status.get("state") == QUEUED
    return is_waiting or run.is_beating(status.get("job") or "")
