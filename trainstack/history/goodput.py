"""Where a run's wall time went, by cause, from its first submission to its last record.

Command line: ``python -m trainstack goodput RUN [--home HOME]``; RUN is a run's name or its folder.

Read from events.jsonl and samples.jsonl. Every moment has one cause, so the causes add up to the
wall time. Goodput is the time in steps that count: those that no later attempt executed again. If a
run was killed and has not resumed yet, the steps beyond its newest checkpoint still count.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from trainstack.history.attempts import (
    Attempt,
    Event,
    attempts_of,
    last_durable_step,
    read_executions,
)
from trainstack.options import parse, parser_of
from trainstack.run.folder import RunFolder, find_run
from trainstack.run.states import RUNNING, is_local_job
from trainstack.units import duration, seconds_of

CAUSES = {
    "training": "steps that count: the goodput",
    "evaluation": "on held-out documents",
    "save": "training waited for a checkpoint",
    "redone": "steps that were lost and do not count",
    "start": "of an attempt: imports, meeting, loading, compiling",
    "stop": "from the last step to PAUSED or DONE",
    "down": "from the end of an attempt to the next one, or its submission",
    "queue": "submitted or requeued, and waiting for Slurm",
}
INTERRUPTIONS = ("evaluation", "save")  # their length is on record: taken from what they interrupt
ENDS = ("paused", "done")
BY_SHELL = ("attempt", "submitted", "failed", "hang", "diverged", "no_progress")  # not by the ranks


def main(arguments: list[str]) -> int:
    parser = parser_of("goodput", __doc__)
    parser.add_argument("run", metavar="RUN", help="name or folder of a run")
    options = parse(parser, arguments, needs_home=False)
    show(RunFolder(find_run(options.run, options.home)))
    return 0


def show(run: RunFolder) -> None:
    """Print the table of one run."""
    events, state = run.events(), run.status().get("state", "no status")
    attempts = attempts_of(events, read_executions(run.path / "samples.jsonl"))
    if not events and not attempts:
        print(f"run {run.path.name}: {state}; nothing is on record yet")
        return
    begin, end = bounds(events, attempts)
    spent = timeline_of_run(run, events, attempts).spent
    wall = sum(spent.values())
    print(f"run {run.path.name}: {state}, attempts: {len(attempts)}")
    print(f"  wall time {wall:,.1f} s = {duration(wall)}, {clock(begin)} to {clock(end)}")
    print(f"  {'cause':<11} {'seconds':>12} {'percent':>8}")
    for cause, seconds in spent.items():
        print(f"  {cause:<11} {seconds:12,.1f} {percent(seconds, wall):8.1f}  {CAUSES[cause]}")
    print(f"  {'all':<11} {wall:12,.1f} {percent(wall, wall):8.1f}")
    goodput = f"goodput {percent(spent['training'], wall):.1f} % of the wall time"
    if spent["queue"]:
        outside = percent(spent["training"], wall - spent["queue"])
        goodput += f", {outside:.1f} % of that outside the queue"
    print(f"  {goodput}")


def timeline_of_run(
    run: RunFolder, events: Sequence[Event], attempts: Sequence[Attempt]
) -> "Timeline":
    """The timeline of a run as it is now; ``events`` and ``attempts``, not both empty, are its own.

    Unless it runs, the steps beyond its newest checkpoint are lost: the attempts are told so.
    """
    status = run.status()
    if status.get("state") != RUNNING:
        durable = last_durable_step(status, run.checkpoints)
        for attempt in attempts:
            attempt.redone_above = min(attempt.redone_above, durable)
    return timeline_of(events, attempts, failure_times(run, attempts))


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def failure_times(run: RunFolder, attempts: Iterable[Attempt]) -> list[float]:
    """When ranks reported that they failed, in seconds since 1970.

    Hangs are left out: they are reported long after they began.
    """
    names = {tuple(attempt.name.rsplit(".", 1)) for attempt in attempts}
    names.add(("local", "1"))  # started by hand, which gives ranks no job
    records = [record for job, number in names for record in run.failures(job, int(number))]
    return [seconds_of(record["at"]) for record in records if record["state"] != "HANG"]


def bounds(events: Iterable[Event], attempts: Iterable[Attempt]) -> tuple[float, float]:
    """First and last moment on record, in seconds since 1970."""
    stamps = [seconds_of(event["at"]) for event in events]
    stamps += [execution.at for attempt in attempts for execution in attempt.executions]
    return min(stamps), max(stamps)


class Timeline:
    """Goes through time once and gives every stretch of it to one cause, so that all adds up.

    A moment before the last one, or beyond ``limit``, adds nothing.
    """

    def __init__(self, begin: float):
        self.now, self.limit = begin, begin
        self.spent = dict.fromkeys(CAUSES, 0.0)
        self.rows: list[list[tuple[str, float, float]]] = []  # of each attempt: cause, begin, end
        self.owed = dict.fromkeys(INTERRUPTIONS, 0.0)  # seconds on record, not given to them yet

    def until(self, moment: float, cause: str) -> None:
        """Give the time up to ``moment`` to a cause, less what is owed to interruptions."""
        left = max(0.0, min(moment, self.limit) - self.now)
        parts = dict.fromkeys(INTERRUPTIONS, 0.0)
        for interruption in INTERRUPTIONS:
            parts[interruption] = min(left, self.owed[interruption])
            self.owed[interruption] -= parts[interruption]
            left -= parts[interruption]
        # A save held up what came after it; an evaluation has just ended.
        self._add("save", parts["save"])
        self._add(cause, left)
        self._add("evaluation", parts["evaluation"])

    def _add(self, cause: str, seconds: float) -> None:
        if seconds:
            begin, self.now, row = self.now, self.now + seconds, self.rows[-1]
            self.spent[cause] += seconds
            if row and row[-1][0] == cause:
                begin = row.pop()[1]
            row.append((cause, begin, self.now))


def timeline_of(
    events: Sequence[Event], attempts: Sequence[Attempt], failures: Sequence[float]
) -> Timeline:
    """Time by cause; ``failures``: when ranks reported that they failed, seconds since 1970.

    The wait for an attempt is in its row; that after the last one is in a row of its own.
    """
    begin, end = bounds(events, attempts)
    timeline = Timeline(begin)
    submitted = [seconds_of(e["at"]) for e in events if e["event"] == "submitted"]
    ended_at, is_paused = begin, False
    next_begins = [*(attempt.begins_at for attempt in attempts), math.inf][1:]
    for attempt, next_begin in zip(attempts, next_begins, strict=True):
        timeline.limit = end
        timeline.rows.append([])
        # An attempt on this machine, or by hand instead of by a job's shell, waits in no queue.
        began = [event["job"] for event in attempt.events if event["event"] == "attempt"]
        is_requeued = is_paused and bool(began) and not is_local_job(began[0])
        add_wait(timeline, attempt.begins_at, submitted, ended_at, is_requeued)
        timeline.limit = min(end, max(timeline.now, next_begin))
        failed = [moment for moment in failures if attempt.begins_at <= moment < next_begin]
        is_paused = add_attempt(timeline, attempt, min(failed, default=timeline.now))
        ended_at, timeline.owed = timeline.now, dict.fromkeys(INTERRUPTIONS, 0.0)
    timeline.limit = end
    timeline.rows.append([])
    add_wait(timeline, end, submitted, ended_at, is_requeued=False)
    return timeline


def add_wait(
    timeline: Timeline, begin: float, submitted: Sequence[float], ended_at: float, is_requeued: bool
) -> None:
    """The time between two attempts: nobody had submitted the next one, or Slurm let it wait."""
    between = [moment for moment in submitted if ended_at <= moment <= begin]
    if not is_requeued or between:
        timeline.until(min(between, default=begin), "down")
    timeline.until(begin, "queue")


def add_attempt(timeline: Timeline, attempt: Attempt, failed_at: float) -> bool:
    """The time of one attempt, from its begin to its last sign; True if it was paused or done."""
    stalls = {e["step"]: e["stall_seconds"] for e in attempt.events if e["event"] == "checkpoint"}
    is_ended = any(event["event"] in ENDS for event in attempt.events)
    last_step = max((e.step for e in attempt.executions), default=attempt.first_step)

    def cause_after(step: int) -> str:
        if is_ended and step >= last_step:
            return "stop"
        return "training" if step + 1 <= attempt.redone_above else "redone"

    cause = "start"
    for at, kind, sign in signs_of(attempt):
        timeline.owed["evaluation"] = sign["seconds"] if kind == "evaluation" else 0.0
        timeline.until(at, cause)
        if kind in ENDS:
            return True
        if kind in ("training", "step"):
            cause = cause_after(sign["step"])
        if kind == "step":
            timeline.owed["save"] += stalls.get(sign["step"], 0.0)
    timeline.owed["evaluation"] = 0.0
    timeline.until(failed_at, cause)  # in steps whose record the failure prevented
    return False


def signs_of(attempt: Attempt) -> list[tuple[float, str, dict[str, Any]]]:
    """Signs that an attempt ran, in the order of time: its ranks' events, and its steps.

    Each is (seconds since 1970, kind, the event or the step).
    """
    events = [event for event in attempt.events if event["event"] not in BY_SHELL]
    signs = [(seconds_of(event["at"]), event["event"], event) for event in events]
    signs += [(e.at, "step", {"step": e.step}) for e in attempt.executions]
    return sorted(signs, key=lambda sign: sign[0])
