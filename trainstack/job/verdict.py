"""How an attempt ended, and what follows: a restart in place, a requeue, or the end of the job."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainstack.checkpoint import names
from trainstack.errors import USAGE_ERROR
from trainstack.job.blame import blame, ranks_of, unreported
from trainstack.run.folder import TORCHRUN_GOT, RunFolder
from trainstack.run.lease import Lease, Owner, order_of
from trainstack.run.states import EXIT_CODES
from trainstack.units import counted

RESTART, REQUEUE, END = "restart", "requeue", "end"  # what the job's shell does next
RESTARTING = {"FAILED", "HANG"}  # states that another attempt may get past
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
STUCK = f"{MAX_ATTEMPTS_WITHOUT_PROGRESS} attempts without a newer checkpoint"
EXCUSES = {"preempted", "node_lost"}  # events
OUT_OF_MEMORY = re.compile(r"\bout of (GPU )?memory(:| \(host)")  # for certain
LOG_TAIL_BYTES = 1 << 14  # of metrics.jsonl: many lines


@dataclass(frozen=True)
class Ending:
    """What follows the end of an attempt, and what is written down about it."""

    verdict: str  # RESTART, REQUEUE or END
    code: int  # exit code of the job
    state: str | None = None  # for status.json; None: what is written there stays
    cause: str = ""  # of that state
    step: int | None = None  # that the attempt had reached
    lines: tuple[str, ...] = ()  # for people, before those of the state
    event: str | None = None  # for events.jsonl, before that of the state
    facts: dict[str, Any] = field(default_factory=dict)  # of that event


@dataclass(frozen=True)
class Told:
    """What the job's shell tells of an end."""

    code: int  # of srun or torchrun, which counts only if no rank reported
    stop_file: Path | None = None
    is_taken_back: bool = False  # Slurm has requeued the job
    is_preempted: bool = False  # Slurm wants its nodes for another job
    is_ending: bool = False  # the job ends whatever follows, so nothing restarts

    @property
    def is_stopped(self) -> bool:
        return self.stop_file is not None and self.stop_file.exists()


def decide(run: RunFolder, owner: Owner, told: Told) -> Ending:
    """How an attempt ended, and what follows. Writes nothing; the first that holds decides."""
    job, attempt, status = owner.job, owner.attempt, run.status()
    is_ours = status.get("job") == job and status.get("attempt") == attempt
    # The ranks wrote the end into status.json: that holds, whatever srun returned.
    if is_ours and status["state"] == "PAUSED" and is_stuck(run, job) and not told.is_preempted:
        cause = f"{STUCK}; the last one was paused: {status['cause']}"
        return Ending(END, EXIT_CODES["NO_PROGRESS"], "NO_PROGRESS", cause, status.get("step"))
    if is_ours and status["state"] in EXIT_CODES:
        verdict = REQUEUE if status["state"] == "PAUSED" else END
        return Ending(verdict, EXIT_CODES[status["state"]])
    # The next job of a chain may have begun at once, and the status be its own.
    ended = [e["event"].upper() for e in run.events() if is_of(e, owner)]
    is_left = not is_ours and not told.is_taken_back and not is_requeued(run, owner)
    if is_left and ended and ended[-1] in ("PAUSED", "DONE"):
        return Ending(REQUEUE if ended[-1] == "PAUSED" else END, EXIT_CODES[ended[-1]])
    # The run is another attempt's by now, and so is its status.
    if is_replaced(run, owner):
        line = f"REFUSED: attempt {attempt} of job {job} was replaced: another one owns the run"
        return Ending(END, EXIT_CODES["REFUSED"], lines=(line,))
    # Slurm starts the job again by itself, on other nodes.
    if told.is_taken_back:
        line = f"Slurm took the job back, a node failed; it resumes from {next_start(run)}"
        facts = {"job": job, "attempt": attempt}
        return Ending(END, EXIT_CODES["FAILED"], lines=(line,), event="node_lost", facts=facts)
    # A stop that came while the ranks were loading, before they could hear of it, is no failure.
    failure = blame(run, job, attempt)
    is_only_victim = failure is None or failure["is_victim"]
    if told.is_stopped and is_only_victim and not has_trained(run, owner):
        return pause_without_save(run, owner, told)
    failure = failure or unreported(run, job, attempt, told.code)
    return decide_failed(run, owner, failure, is_ours, told)


def titled(state: str, step: int | None, cause: str | None) -> str:
    """``FAILED at step 12: cause``; a cause that names a step has the better one."""
    where = "" if re.search(r"\bstep \d", cause or "") else f" at step {step or 0:,}"
    return f"{state}{where}: {cause}"


def is_of(event: dict[str, Any], owner: Owner) -> bool:
    """Whether it is a state that an attempt wrote down."""
    mine = (event.get("job"), event.get("attempt")) == (owner.job, owner.attempt)
    return mine and event["event"].upper() in EXIT_CODES


def decide_failed(
    run: RunFolder, owner: Owner, failure: dict[str, Any], is_ours: bool, told: Told
) -> Ending:
    """What follows a failure, by the report of the rank that is to blame."""
    state, code, cause = failure["state"], failure["exit_code"], failure["cause"]
    if isinstance(failure["rank"], int) and state != "DIVERGED":  # that is of all ranks alike
        cause = f"rank {failure['rank']} on {failure['host']}: {cause}"
    # Another job holds the run, and its status is that job's.
    if not is_ours and code == EXIT_CODES["REFUSED"] and Lease(run.path).holder()[1]:
        return Ending(END, code, lines=(f"REFUSED: {cause}",))
    named = re.search(r"(?:^|\bat )step ([\d,]+)", cause)  # the log may not have come so far
    step = max(last_step(run), int(named[1].replace(",", "")) if named else 0)
    # A wrong setting fails again; a divergence too, unless a rollback leaves out its data.
    may_pass = (state in RESTARTING and code != USAGE_ERROR) or failure.get("is_rollback")
    if not may_pass or told.is_ending or failure.get("is_final"):
        return Ending(END, code, state, cause, step)
    failed = titled(state, step, cause)
    # Asked to stop: another attempt here would only load, and stop again.
    if told.is_stopped and not is_false_stop(told.stop_file):
        return pause_without_save(run, owner, told, failed)
    lines = (failed, *(f"  {line}" for line in failure.get("traceback") or []))
    event, rank = state.lower(), failure["rank"]
    facts = {"job": owner.job, "attempt": owner.attempt, "cause": cause, "step": step, "rank": rank}
    # Three attempts without a newer checkpoint, for whatever reasons: a restart would not help.
    if is_stuck(run, owner.job):
        state, code = "NO_PROGRESS", EXIT_CODES["NO_PROGRESS"]
        cause = f"{STUCK}; the last one: {cause}"
        return Ending(END, code, state, cause, step, lines, event, facts)
    if failure.get("traceback") and came_before(run, owner, failure["cause"]):
        return Ending(END, code, state, f"{cause}; twice, before any step", step, lines[1:])
    if ran_out_before(run, owner, failure["cause"]):
        cause += "; twice, without a newer checkpoint"
        return Ending(END, code, state, cause, step, lines[1:])
    if failure.get("is_elsewhere"):
        return Ending(REQUEUE, EXIT_CODES["PAUSED"], "PAUSED", cause, step, lines, event, facts)
    again = (
        f"restarting in place from {next_start(run, step)} (attempt {owner.attempt} ended; "
        f"{MAX_ATTEMPTS_WITHOUT_PROGRESS} without a newer checkpoint would end the job)"
    )
    return Ending(RESTART, code, "RESTARTING", cause, step, (*lines, again), event, facts)


def pause_without_save(run: RunFolder, owner: Owner, told: Told, *lines: str) -> Ending:
    """The job was asked to end, and its ranks were gone before they could save, or even begin."""
    has_begun = ranks_of(run, owner.job, owner.attempt)
    when = "before the ranks had saved" if has_begun else "before training began"
    cause = f"{told.stop_file.read_text().strip()}, {when}"
    return Ending(REQUEUE, EXIT_CODES["PAUSED"], "PAUSED", cause, lines=lines)


def is_false_stop(stop_file: Path | None) -> bool:
    """Whether a stop file only says that srun ended the other nodes, since one had failed.

    If Slurm wants the job to end as well, the job's shell itself hears of it.
    """
    is_there = stop_file is not None and stop_file.exists()
    return is_there and stop_file.read_text().startswith(TORCHRUN_GOT)


def is_replaced(run: RunFolder, owner: Owner) -> bool:
    """Whether another attempt owns the run by now: of this job, requeued by Slurm, or of another.

    A node that Slurm lost may still run, and the job's shell on it: status and restarts no longer
    belong to that shell.
    """
    _, holder = Lease(run.path).holder()
    if not holder:
        return False
    if holder["job"] == owner.job:
        return is_requeued(run, owner)
    return bool(ranks_of(run, owner.job, owner.attempt))  # it was ours once


def is_requeued(run: RunFolder, owner: Owner) -> bool:
    """Whether a later attempt of the same job has the run: Slurm had lost the node of this one."""
    _, holder = Lease(run.path).holder()
    return bool(holder) and holder["job"] == owner.job and order_of(holder) > order_of(vars(owner))


def is_stuck(run: RunFolder, job: str, attempts: int = MAX_ATTEMPTS_WITHOUT_PROGRESS) -> bool:
    """Whether the last attempts of a job all ended without a newer checkpoint, in whatever way.

    Those do not count that Slurm ended for its own reasons before they had trained.
    """
    last = [event for event in attempts_of(run, job) if not event["is_excused"]]
    last = last[-attempts:]
    if len(last) < attempts:
        return False
    newest, _ = names.newest_checkpoint(run.checkpoints)
    # The least of them: a damaged checkpoint may have been the newest once, and is set aside.
    return newest <= min(event["newest"] for event in last)


def has_trained(run: RunFolder, owner: Owner) -> bool:
    """Whether an attempt came as far as its first step."""
    own = [e for e in attempts_of(run, owner.job) if e["attempt"] == owner.attempt]
    return bool(own) and own[-1]["has_trained"]


def attempts_of(run: RunFolder, job: str) -> list[dict[str, Any]]:
    """The events by which the attempts of a job began, oldest first, with what came of each.

    ``has_trained``: it came as far as its first step. ``is_excused``: it did not, for Slurm
    preempted it or lost a node.
    """
    found: list[dict[str, Any]] = []
    for event in run.events():
        if event["event"] == "attempt" and event["job"] == job:
            found.append({**event, "has_trained": False, "is_excused": False})
        elif event["event"] == "training" and found:
            found[-1]["has_trained"] = True
        elif event["event"] in EXCUSES and event["job"] == job and found:
            found[-1]["is_excused"] = not found[-1]["has_trained"]
    return found


def came_before(run: RunFolder, owner: Owner, cause: str) -> bool:
    """Whether the attempt before ended by the same error, and none of the two made a step."""
    from_step, _ = names.newest_checkpoint(run.checkpoints)
    is_same = any(told.endswith(cause) for told in failures_of(run, owner)[-1:])  # of any rank
    return is_same and last_step(run) <= from_step


def ran_out_before(run: RunFolder, owner: Owner, cause: str) -> bool:
    """Whether memory ran out now and at the failure before, and nothing was saved since.

    It would run out a third time: what a step needs does not change.
    """
    causes = [*failures_of(run, owner)[-1:], cause]
    ran_out = len(causes) == 2 and all(map(OUT_OF_MEMORY.search, causes))
    return ran_out and is_stuck(run, owner.job, attempts=2)


def failures_of(run: RunFolder, owner: Owner) -> list[str]:
    """The causes of failures of a job that are on record, oldest first."""
    told = (e for e in run.events() if e["event"] == "failed" and e.get("job") == owner.job)
    return [event.get("cause", "") for event in told]


def next_start(run: RunFolder, step: int | None = None) -> str:
    """Where the next attempt begins, and how many steps it has to do again.

    ``step``: that an attempt had reached which ended without saving; None: it ended in order.
    """
    from_step, newest = names.newest_checkpoint(run.checkpoints)
    redo = (last_step(run) if step is None else step) - from_step
    again = "nothing to redo" if step is None else "no step on record to redo"
    if redo > 0:
        again = f"{counted(redo, 'step')} to redo"
    return f"{newest.name if newest else 'the beginning'}: {again}"


def last_step(run: RunFolder) -> int:
    """The last step that is known: by the status, which is seconds old, or the last log line."""
    logged = (record["step"] for record in run.measurements(LOG_TAIL_BYTES))
    return max([run.status().get("step") or 0, *logged])
