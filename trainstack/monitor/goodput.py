"""Where a run's wall time went, by cause, from its first submission to its last record.

Command line: ``python -m trainstack goodput RUN [--home HOME]``; RUN is a run's name or its folder.

Read from events.jsonl and samples.jsonl. Every moment has one cause, so the causes add up to the
wall time. Goodput is the time in steps that count: those that no later life did again. Of a run
that was killed and has not gone on yet, the steps beyond its newest checkpoint still count.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from trainstack.errors import ConfigError
from trainstack.monitor import history
from trainstack.monitor.history import Event, Life
from trainstack.run.folder import RunFolder
from trainstack.run.states import RUNNING
from trainstack.units import duration

SPEAKER = "goodput"
CAUSES = {
    "training": "steps that count: the goodput",
    "evaluation": "on held-out documents",
    "save": "training stood still for a checkpoint",
    "redone": "steps that an interruption undid",
    "start": "of a life: imports, meeting, loading, compiling",
    "stop": "from the last step to PAUSED or DONE",
    "down": "from the end of a life to the next one, or its submission",
    "queue": "submitted or requeued, and waiting for Slurm",
}
CARVED = ("evaluation", "save")  # known by their length, out of the time of what they interrupt
ENDS = ("paused", "done")
BY_SHELL = ("attempt", "submitted", "failed", "hang", "diverged", "no_progress")  # no sign of life


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack goodput", description=__doc__)
    history.add_run_arguments(parser, os.environ.get("TRAINSTACK_HOME"))
    options = parser.parse_args(arguments)
    try:
        run = RunFolder(history.find_run(options.run, options.home))
    except ConfigError as error:
        print(error.report(SPEAKER), file=sys.stderr)
        return error.code
    show(run)
    return 0


def show(run: RunFolder) -> None:
    """Print the table of one run."""
    events, status = run.events(), run.status()
    lives = history.lives_of(events, history.read_executions(run.path / "samples.jsonl"))
    state = status.get("state", "no status")
    if state != RUNNING:  # what lies beyond the newest checkpoint is lost
        durable = history.last_durable_step(status, run.checkpoints)
        for life in lives:
            life.redone_above = min(life.redone_above, durable)
    if not events and not lives:
        print(f"run {run.path.name}: {state}; nothing is on record yet")
        return
    begin, end = bounds(events, lives)
    spent = account(events, lives, failure_times(run, lives))
    wall = sum(spent.values())
    print(f"run {run.path.name}: {state}, lives: {len(lives)}")
    print(f"  wall time {wall:,.1f} s = {duration(wall)}, {clock(begin)} to {clock(end)}")
    print(f"  {'cause':<11} {'seconds':>12} {'percent':>8}")
    for cause, seconds in spent.items():
        print(f"  {cause:<11} {seconds:12,.1f} {percent(seconds, wall):8.1f}  {CAUSES[cause]}")
    print(f"  {'all':<11} {wall:12,.1f} {percent(wall, wall):8.1f}")
    goodput, running = percent(spent["training"], wall), wall - spent["queue"]
    aside = f", {percent(spent['training'], running):.1f} % of that outside the queue"
    print(f"  goodput {goodput:.1f} % of the wall time{aside if spent['queue'] else ''}")


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def failure_times(run: RunFolder, lives: Iterable[Life]) -> list[float]:
    """When ranks said that they failed; not of hangs, which they say much later."""
    names = {tuple(life.attempt.rsplit(".", 1)) for life in lives}
    names.add(("local", "1"))  # started by hand, which gives ranks no job
    records = [record for job, attempt in names for record in run.failures(job, int(attempt))]
    return [history.seconds(record["at"]) for record in records if record["state"] != "HANG"]


def bounds(events: Iterable[Event], lives: Iterable[Life]) -> tuple[float, float]:
    """First and last moment on record, in seconds since 1970."""
    stamps = [history.seconds(event["at"]) for event in events]
    stamps += [execution.at for life in lives for execution in life.executions]
    return min(stamps), max(stamps)


class Timeline:
    """Goes through time once and gives every stretch of it to one cause, so that all adds up.

    A moment that lies before the last one, or beyond ``limit``, adds nothing.
    """

    def __init__(self, begin: float):
        self.now, self.limit = begin, begin
        self.spent = dict.fromkeys(CAUSES, 0.0)
        self.owed = dict.fromkeys(CARVED, 0.0)

    def until(self, moment: float, cause: str) -> None:
        """Give the time up to ``moment`` to a cause, less what is owed to evaluation and save."""
        left = max(0.0, min(moment, self.limit) - self.now)
        self.now += left
        for carved in CARVED:
            part = min(left, self.owed[carved])
            self.spent[carved] += part
            self.owed[carved] -= part
            left -= part
        self.spent[cause] += left


def account(
    events: Sequence[Event], lives: Sequence[Life], failures: Sequence[float]
) -> dict[str, float]:
    """Seconds by cause; ``failures``: when ranks said that they failed, seconds since 1970."""
    begin, end = bounds(events, lives)
    timeline = Timeline(begin)
    submitted = [history.seconds(e["at"]) for e in events if e["event"] == "submitted"]
    ended, is_paused = begin, False
    next_begins = [*(life.begins_at for life in lives), math.inf][1:]
    for life, next_begin in zip(lives, next_begins, strict=True):
        timeline.limit = end
        wait_for(timeline, life.begins_at, submitted, ended, is_paused and is_attempt(life))
        timeline.limit = min(end, max(timeline.now, next_begin))
        failed = [moment for moment in failures if life.begins_at <= moment < next_begin]
        is_paused = live(timeline, life, min(failed, default=timeline.now))
        ended, timeline.owed = timeline.now, dict.fromkeys(CARVED, 0.0)
    timeline.limit = end
    wait_for(timeline, end, submitted, ended, False)
    return timeline.spent


def wait_for(
    timeline: Timeline, begin: float, submitted: Sequence[float], ended: float, is_requeued: bool
) -> None:
    """The time between two lives: nobody had asked for the next one, or Slurm let it wait."""
    between = [moment for moment in submitted if ended <= moment <= begin]
    if not is_requeued or between:
        timeline.until(min(between, default=begin), "down")
    timeline.until(begin, "queue")


def is_attempt(life: Life) -> bool:
    """Whether a job's shell began it; what is started by hand waits in no queue."""
    return any(event["event"] == "attempt" for event in life.events)


def live(timeline: Timeline, life: Life, failed_at: float) -> bool:
    """One life, from its begin to its last sign; whether it ended in order."""
    stalls = {e["step"]: e["stall_seconds"] for e in life.events if e["event"] == "checkpoint"}
    is_ended = any(event["event"] in ENDS for event in life.events)
    last_step = max((e.step for e in life.executions), default=life.first_step)

    def cause_after(step: int) -> str:
        if is_ended and step >= last_step:
            return "stop"
        return "training" if step + 1 <= life.redone_above else "redone"

    cause = "start"
    for at, kind, sign in signs_of(life):
        timeline.owed["evaluation"] = sign["seconds"] if kind == "evaluation" else 0.0
        timeline.until(at, cause)
        if kind in ENDS:
            return True
        if kind in ("training", "step"):
            cause = cause_after(sign["step"])
        if kind == "step":
            timeline.owed["save"] += stalls.get(sign["step"], 0.0)
    timeline.owed["evaluation"] = 0.0
    timeline.until(failed_at, cause)  # in steps that did not come to be put on record
    return False


def signs_of(life: Life) -> list[tuple[float, str, dict[str, Any]]]:
    """Signs of a life in the order of time: what its ranks wrote down, and its steps."""
    events = [event for event in life.events if event["event"] not in BY_SHELL]
    signs = [(history.seconds(event["at"]), event["event"], event) for event in events]
    signs += [(e.at, "step", {"step": e.step}) for e in life.executions]
    return sorted(signs, key=lambda sign: sign[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
