"""Who wants to stop, or to save, at a step: asked on every rank, reduced by the loop."""

import time
from typing import NamedTuple

from trainstack.checkpoint.interval import Interval
from trainstack.checkpoint.snapshot import Saved
from trainstack.resilience.stop import Stop


class Requested(NamedTuple):
    """What one rank requests; after the reduction, what any rank did."""

    stop: bool
    save: bool


class Requests:
    """Stop: the clock, the stop file or a signal. Save: checkpoint.save_steps=auto says so."""

    def __init__(self, stop: Stop, interval: Interval | None):
        """``interval``: on rank 0 if save_steps is auto, else None."""
        self.stop, self.interval = stop, interval

    def now(self, step_seconds: float, saves: int) -> Requested:
        """This rank's requests; asked once a step.

        ``step_seconds``: what a step takes; ``saves``: how many a stop would have to wait for.
        """
        is_save_due = self.interval is not None and self.interval.is_due(time.monotonic())
        return Requested(self.stop.is_wanted(step_seconds, saves), is_save_due)

    def save_begins(self) -> None:
        if self.interval:
            self.interval.saving(time.monotonic())

    def save_ended(self, saved: Saved, stall_seconds: float) -> None:
        """Plan with what this save took; one that failed says nothing about the next."""
        if saved.problem is None:
            self.stop.save_seconds = saved.seconds
            if self.interval:
                self.interval.saved(stall_seconds, saved.seconds)
