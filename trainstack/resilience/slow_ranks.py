"""Which ranks take longer than the others for a while, by the own times that a step reduces.

All ranks wait for the slowest in each step, so one on a bad node slows the whole run, and nothing
fails. The same numbers on all ranks give the same answer on all.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

WINDOW_SECONDS = 20.0  # five, and half of the one in which it begins: named within two minutes
WINDOWS = 5  # in a row: something else that loads the machine for a minute is no slow rank
BLOCKS = 20  # of a window
FEWEST = 4  # blocks that tell what is usual, if a step takes longer than one
FACTOR = 1.5  # of the median of the others


class Change(NamedTuple):
    """A rank has become slow, or is no longer."""

    rank: int
    is_slow: bool
    seconds: float  # own time in a step
    others_seconds: float  # the median of that of the others

    def __str__(self) -> str:
        times = f"{self.seconds / self.others_seconds:.1f} times the others'"
        text = f"{self.seconds:.4f} s of its own in a step, {times} {self.others_seconds:.4f} s"
        return text if self.is_slow else f"no longer slow, {text}"


class SlowRanks:
    """Judges windows of time; a rank changes if WINDOWS in a row say so.

    The mean of a block counts pauses that hit few steps, as by a quota of CPU time; the median of
    blocks leaves out bursts.
    """

    def __init__(self, window_seconds: float = WINDOW_SECONDS):
        self.window_seconds = window_seconds
        self.slow: set[int] = set()
        self._contrary: Counter[int] = Counter()  # windows in a row that say otherwise
        self._steps: list[list[float]] = []  # of this block
        self._blocks: list[np.ndarray] = []
        self._block_at = self._window_at = None  # when they began, on the clock of rank 0

    def note(self, rank_seconds: list[float], clock: float) -> list[Change]:
        """Count a step, by the own time of each rank, and rank 0's clock; what has changed.

        Nearly all steps are only kept: they cost the loop least.
        """
        if self._block_at is None:
            self._block_at = self._window_at = clock
        self._steps.append(rank_seconds)
        if clock - self._block_at < self.window_seconds / BLOCKS:
            return []
        self._blocks.append(np.mean(self._steps, axis=0))
        self._steps, self._block_at = [], clock
        if clock - self._window_at < self.window_seconds or len(self._blocks) < FEWEST:
            return []
        usual = np.median(self._blocks, axis=0).tolist()
        self._blocks, self._window_at = [], clock
        return self._changes(usual)

    def _changes(self, usual: list[float]) -> list[Change]:
        """What follows from a window, by the usual own time of each rank in it."""
        changes, ordered = [], sorted(usual)  # once: there may be thousands
        for rank, seconds in enumerate(usual):
            others = median_without(ordered, seconds)
            is_slow, was_slow = seconds >= FACTOR * others, rank in self.slow
            self._contrary[rank] = (self._contrary[rank] + 1) * (is_slow != was_slow)
            if self._contrary[rank] == WINDOWS:
                self._contrary[rank] = 0
                self.slow ^= {rank}
                changes.append(Change(rank, is_slow, seconds, others))
        return changes


def median_of_others(seconds: list[float], rank: int) -> float:
    return median_without(sorted(seconds), seconds[rank])


def median_without(ordered: list[float], one: float) -> float:
    """The median of what is left of two or more, in their order, without one of them."""
    low, high = (len(ordered) - 2) // 2, (len(ordered) - 1) // 2  # in the middle of the others
    return (ordered[low + (one <= ordered[low])] + ordered[high + (one <= ordered[high])]) / 2
