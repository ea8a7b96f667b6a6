"""What a run lived through: its lives, and the steps that each executed.

A life is what ran between an ``attempt`` event of the job's shell (by hand: a ``start`` event of
the ranks) and its end. It goes on from a checkpoint, so that what earlier lives had executed beyond
that is executed again. What is left then is the effective history.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from trainstack.checkpoint import names
from trainstack.errors import ConfigError
from trainstack.storage import layout

Event = dict[str, Any]
RECORD = b'{"step"'  # how each line of samples.jsonl begins


class Execution(NamedTuple):
    """One line of samples.jsonl: a life executed a step."""

    step: int
    samples_hash: str
    attempt: str  # JOB.N
    at: float  # seconds since 1970: its gradients were done


@dataclass
class Life:
    """One life; ``events`` are what was written while it was the newest one."""

    attempt: str  # JOB.N
    begins_at: float  # seconds since 1970
    events: list[Event] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    redone_above: float = math.inf  # what it executed beyond this step does not count

    @property
    def first_step(self) -> float:
        """The step from which it went on; infinite where it did not come to train."""
        resumed = [event["step"] for event in self.events if event["event"] == "training"]
        return min([*resumed, *(e.step - 1 for e in self.executions)], default=math.inf)

    def effective(self) -> list[Execution]:
        """What it executed and no later life did again."""
        return [e for e in self.executions if e.step <= self.redone_above]


def add_run_arguments(parser: argparse.ArgumentParser, home: str | None) -> None:
    """The arguments of a command about one run, for ``find_run``."""
    parser.add_argument("run", metavar="RUN", help="name or folder of a run")
    parser.add_argument(
        "--home", type=Path, default=home, help="$SHARED_DIR/$PROJECT_NAME; env.sh sets it"
    )


def find_run(run: str, home: Path | None) -> Path:
    """The folder of a run by its name below ``home``, or by its path; ConfigError if none is it."""
    named = [layout.run_folder(home, run)] if home and "/" not in run else []
    for path in (*named, Path(run).expanduser()):
        if (path / "events.jsonl").is_file() or (path / "samples.jsonl").is_file():
            return path.resolve()
    if named:
        have = sorted(path.parent.name for path in home.glob("runs/*/events.jsonl"))
        there = ", ".join(have) or "none yet"
        raise ConfigError(f"no run {run} in {home / 'runs'}; there are: {there}")
    by_name = "" if "/" in run else "; to find a run by its name: source env.sh, or pass --home"
    raise ConfigError(f"{run} is no run folder (that has an events.jsonl){by_name}")


def read_executions(path: Path) -> list[Execution]:
    """The lines of samples.jsonl in their order; empty where there is no such file.

    A life that was cut off may leave its last line torn, and the next life's first one then stands
    on the same line: that one counts.
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


def lives_of(events: Iterable[Event], executions: Iterable[Execution]) -> list[Life]:
    """The lives of a run in their order, each with its events and what it executed."""
    lives: list[Life] = []
    for event in events:
        if _begins_life(event, lives):
            lives.append(Life(_attempt(event), seconds(event["at"])))
        if lives:
            lives[-1].events.append(event)
    by_name: dict[str, list[Life]] = {}
    for life in lives:
        by_name.setdefault(life.attempt, []).append(life)
    for execution in executions:
        if execution.attempt not in by_name:  # the event of its beginning is lost
            by_name[execution.attempt] = [_insert_life(lives, execution)]
        same = by_name[execution.attempt]  # several where a process id was used again
        begun = (life for life in reversed(same) if life.begins_at <= execution.at)
        next(begun, same[0]).executions.append(execution)
    redone_above = math.inf
    for life in reversed(lives):
        life.redone_above = redone_above
        redone_above = min(redone_above, life.first_step)
    return lives


def _begins_life(event: Event, lives: list[Life]) -> bool:
    if event["event"] == "attempt":
        return True
    if event["event"] != "start":
        return False
    is_begun = bool(lives) and lives[-1].attempt == _attempt(event)
    return not is_begun or any(earlier["event"] == "start" for earlier in lives[-1].events)


def _attempt(event: Event) -> str:
    return f"{event['job']}.{event['attempt']}"


def _insert_life(lives: list[Life], execution: Execution) -> Life:
    life = Life(execution.attempt, execution.at)
    later = [index for index, other in enumerate(lives) if other.begins_at > execution.at]
    lives.insert(later[0] if later else len(lives), life)
    return life


def last_durable_step(status: dict[str, Any], checkpoints: Path) -> int:
    """The step up to which nothing can be lost: of the newest checkpoint, or of the run's end."""
    newest, _ = names.newest_checkpoint(checkpoints)
    return max(newest, status.get("step", 0)) if status.get("state") == "DONE" else newest


def seconds(stamp: str) -> float:
    """Seconds since 1970 of an event's time."""
    return datetime.fromisoformat(stamp).timestamp()
