"""The attempts of a run, and the steps that each of them executed.

An attempt begins with an ``attempt`` event of the job's shell (by hand: with a ``start`` event of
the ranks). It resumes from a checkpoint and executes again what earlier attempts had executed
beyond it. The effective history is what no later attempt executed again.

What ended an attempt before the run was done is an interruption; so is what one trained on after.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainstack.checkpoint import names
from trainstack.run.branch import branch_of
from trainstack.units import seconds_of

Event = dict[str, Any]
RECORD = b'{"step"'  # how each line of samples.jsonl begins
ENDS = ("failed", "hang", "diverged", "refused", "no_progress", "paused", "preempted", "node_lost",
        "done", "not_submitted")  # fmt: skip
PASSED = ("skip", "save_failed", "slow_rank")  # after which an attempt trained on


class Execution(NamedTuple):
    """One line of samples.jsonl: an attempt executed a step."""

    step: int
    samples_hash: str
    attempt: str  # JOB.N
    at: float  # seconds since 1970: its gradients were done


@dataclass
class Attempt:
    """One attempt; ``events`` are what was written while it was the newest one."""

    name: str  # JOB.N
    begins_at: float  # seconds since 1970
    events: list[Event] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    redone_above: float = math.inf  # a later attempt executed the steps beyond this one again

    @property
    def first_step(self) -> float:
        """The step from which it resumed; infinite if it ended before it trained."""
        resumed = [event["step"] for event in self.events if event["event"] == "training"]
        return min([*resumed, *(e.step - 1 for e in self.executions)], default=math.inf)

    def effective(self) -> list[Execution]:
        """What it executed and no later attempt executed again."""
        return [e for e in self.executions if e.step <= self.redone_above]


def read_executions(path: Path) -> list[Execution]:
    """The lines of samples.jsonl in their order; empty if there is no such file.

    An attempt that was killed may leave its last line torn. The first record of the next attempt is
    then on the same line, and that record counts.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        found = (_execution(line) for line in file)
        return [execution for execution in found if execution is not None]


def _execution(line: bytes) -> Execution | None:
    for start in (0, line.rfind(RECORD)):
        try:
            record = json.loads(line[max(0, start) :])
            attempt = sys.intern(record["attempt"])
            return Execution(record["step"], record["samples_hash"], attempt, record["at"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def attempts_of(events: Sequence[Event], executions: Iterable[Execution]) -> list[Attempt]:
    """The attempts of a run in their order, each with its events and what it executed.

    What a branch has of its parent is of none: see ``of_parent``.
    """
    attempts: list[Attempt] = []
    first = branch_of(events).get("step", 0)
    executions = [execution for execution in executions if execution.step > first]
    for event in events:
        if _begins_attempt(event, attempts):
            attempts.append(Attempt(_name_of(event), seconds_of(event["at"])))
        if attempts:
            attempts[-1].events.append(event)
    _add_executions(attempts, executions)
    redone_above = math.inf
    for attempt in reversed(attempts):
        attempt.redone_above = redone_above
        redone_above = min(redone_above, attempt.first_step)
    return attempts


def of_parent(events: Sequence[Event], executions: Iterable[Execution]) -> list[Attempt]:
    """The steps that a branch has of its parent, as if one attempt had made them; else none."""
    if not (event := branch_of(events)):
        return []
    of_it = [execution for execution in executions if execution.step <= event["step"]]
    name = f"{event['parent']}@{event['step']}"
    return [Attempt(name, 0.0, [], of_it)]


def _begins_attempt(event: Event, attempts: list[Attempt]) -> bool:
    if event["event"] == "attempt":
        return True
    if event["event"] != "start":
        return False
    is_begun = bool(attempts) and attempts[-1].name == _name_of(event)
    return not is_begun or any(earlier["event"] == "start" for earlier in attempts[-1].events)


def _name_of(event: Event) -> str:
    return f"{event['job']}.{event['attempt']}"


def _add_executions(attempts: list[Attempt], executions: Iterable[Execution]) -> None:
    """Give every execution to its attempt; insert an attempt whose first event is lost."""
    by_name: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_name.setdefault(attempt.name, []).append(attempt)
    for execution in executions:
        if execution.attempt not in by_name:
            found = Attempt(execution.attempt, execution.at)
            later = [i for i, other in enumerate(attempts) if other.begins_at > found.begins_at]
            attempts.insert(later[0] if later else len(attempts), found)
            by_name[found.name] = [found]
        same = by_name[execution.attempt]  # several if a process id was used again
        begun = (attempt for attempt in reversed(same) if attempt.begins_at <= execution.at)
        next(begun, same[0]).executions.append(execution)


def last_durable_step(status: dict[str, Any], checkpoints: Path) -> int:
    """The step up to which nothing can be lost: of the newest checkpoint, or of the run's end."""
    newest, _ = names.newest_checkpoint(checkpoints)
    return max(newest, status.get("step", 0)) if status.get("state") == "DONE" else newest


@dataclass(frozen=True)
class Interruption:
    """What ended an attempt, or what it trained on after."""

    job: str
    attempt: int
    begin: Event  # of the attempt; empty if none had begun
    event: Event  # that tells it; empty if the end is not on record
    events: Sequence[Event]  # of the run
    index: int  # of the last event that is not after it
    times: int  # in this attempt

    def next(self, name: str) -> Event:
        """The first event of a name after it; empty if there is none."""
        later = itertools.islice(self.events, self.index + 1, None)
        return next((event for event in later if event["event"] == name), {})

    @property
    def is_requeued(self) -> bool:
        """Whether Slurm started the same job again."""
        following = self.next("attempt")
        is_same = following.get("job") == self.job
        return is_same and following.get("restarts", 0) > self.begin.get("restarts", 0)


def interruptions(events: Sequence[Event], running: tuple[Any, Any]) -> list[Interruption]:
    """All, in the order of events; ``running``: job and attempt of what did not end yet."""
    begun: dict[tuple[Any, Any], int] = {}  # job and attempt -> index of its first event
    found: dict[Any, tuple[int, int]] = {}  # job, attempt, kind -> index of its event, how often
    for index, event in enumerate(events):
        name, key = event["event"], (event.get("job"), event.get("attempt"))
        if name in ("attempt", "start"):
            begun.setdefault(key, index)
        elif name in (*ENDS, *PASSED):
            if key not in begun:  # it names its job alone, or nothing
                key = next((k for k in reversed(begun) if key[0] in (None, k[0])), key)
            is_end = name in ENDS and name != "not_submitted"
            what = (*key, "end" if is_end else f"{name} {event.get('rank', '')}")
            found[what] = index, 1 if is_end else found.get(what, (0, 0))[1] + 1
    for key, index in begun.items():
        if (*key, "end") not in found and key != running:
            following = (i for i in begun.values() if i > index)
            found[*key, ""] = min(following, default=len(events)) - 1, 1

    def order(item: Any) -> tuple[int, bool]:  # what ended without a record, after what it passed
        return item[1][0], not item[0][-1]

    told = []
    for (job, attempt, kind), (index, times) in sorted(found.items(), key=order):
        begin = events[begun[job, attempt]] if (job, attempt) in begun else {}
        event = events[index] if kind else {}
        if event.get("event") != "done":
            told.append(Interruption(job or "", attempt or 1, begin, event, events, index, times))
    return told
