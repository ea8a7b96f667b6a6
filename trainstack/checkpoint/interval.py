"""How often to save: the interval that loses least, from what a save costs and how often jobs die.

Young, "A first order approximation to the optimum checkpoint interval" (1974), and Daly (2006): the
best time between checkpoints is sqrt(2 d M), with d the cost of a save and M the mean time between
failures.
"""

import math
from typing import Any

from trainstack.checkpoint.names import BYTES_PER_PARAMETER

PRIOR_HOURS = 24.0  # between failures, before anything was observed
LEAST_STEPS, MOST_SECONDS = 10, 1800.0
FIRST_SAVE_RATE = 200e6  # bytes per second
OVERLAP_COST = 0.1  # share of an overlapped save's duration by which steps may be slower meanwhile


class Interval:
    """Decides, on rank 0, when the next checkpoint is due if save_steps is ``auto``."""

    def __init__(
        self,
        failure_hours: float | None,
        events: list[dict[str, Any]],
        save_seconds: float,
        now: float,
    ):
        """``save_seconds``: what a save is expected to take; ``now``: in seconds, any origin."""
        self.failure_seconds = 3600 * (failure_hours or observed_hours(events))
        self.saved(0.0, save_seconds)
        self._since, self._steps = now, 0

    def is_due(self, now: float) -> bool:
        """Asked once a step, with the time in seconds."""
        self._steps += 1
        return self._steps >= LEAST_STEPS and now - self._since >= self.seconds

    def saving(self, now: float) -> None:
        """A save begins."""
        self._since, self._steps = now, 0

    def saved(self, stall_seconds: float, save_seconds: float) -> None:
        """What the last save cost: how long the loop stood still, how long it took in all."""
        cost = stall_seconds + OVERLAP_COST * save_seconds
        best = math.sqrt(2 * cost * self.failure_seconds)
        # Twice the duration: else one save would wait for the one before.
        self.seconds = max(min(best, MOST_SECONDS), 2 * save_seconds)


def first_save_seconds(parameters: int) -> float:
    """What a save is expected to take before there was one."""
    return 1 + parameters * BYTES_PER_PARAMETER / FIRST_SAVE_RATE


def observed_hours(events: list[dict[str, Any]]) -> float:
    """Mean hours between failures of this run so far, with one in PRIOR_HOURS assumed before."""
    failures, is_open = 0, False
    for event in events:
        if event["event"] == "attempt":  # the one before did not report, or reported a failure
            failures += is_open
            is_open = True
        elif event["event"] in ("paused", "done"):
            is_open = False
    hours = sum(event.get("train_hours", 0.0) for event in events)
    return (PRIOR_HOURS + hours) / (1 + failures)
