"""A step that never ends is an error: stacks of every thread to a file, an account, the end."""

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

MEDIANS = 10  # a step may take this many times the median step
RECENT = 64  # steps the median is taken over
START_SECONDS = 900  # loading, connecting, compiling: before the first step there is no median
SAVE_SECONDS = 1800  # the last save of a life, to a slow file system
TICKS_SECONDS = 1.0
STOPPED_SECONDS = 5.0
LOCKED_SECONDS = 5.0  # less than launch.py waits before it kills


class Watchdog:
    """Watches this process's loop from a thread; where it stands still, ends it with ``code``.

    ``account(place, seconds)`` is called once, before the process ends: it leaves the record by
    which the rank that holds up the others is found. A thread of Python cannot run where another
    holds the interpreter's lock, so faulthandler's own thread, in C, stands behind this one.
    """

    def __init__(
        self,
        least_seconds: float | None,
        stacks: Path,
        account: Callable[[str, float], None],
        code: int,
    ):
        self.least_seconds, self.account, self.code = least_seconds, account, code
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._extra, self._place, self._at = START_SECONDS, "the start", time.monotonic()
        self._is_over = threading.Event()
        if least_seconds is None:
            return
        self._file = stacks.open("w")
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, place: str, extra_seconds: float = 0) -> None:
        """Say where the loop is now; ``extra_seconds``: what this place may take beyond a step."""
        self._place, self._extra, self._at = place, extra_seconds, time.monotonic()

    def note_step(self, seconds: float) -> None:
        self._recent.append(seconds)

    def limit_seconds(self) -> float:
        """How long the loop may stay at its present place."""
        return max(self.least_seconds or 0, MEDIANS * self.median_seconds()) + self._extra

    def median_seconds(self) -> float:
        """The median of the last steps; 0 before the first."""
        return statistics.median(self._recent) if self._recent else 0.0

    def close(self) -> None:
        """Watch no longer."""
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(TICKS_SECONDS, self.least_seconds / 4)
        ticked = time.monotonic()
        while not self._is_over.wait(tick):
            late = time.monotonic() - ticked - tick
            if late > STOPPED_SECONDS:  # the whole process was stopped, by Ctrl-Z or by Slurm
                self._at += late
            ticked = time.monotonic()
            limit, place, at = self.limit_seconds(), self._place, self._at
            stalled = time.monotonic() - at
            if stalled > limit:
                self._end(place, stalled)
            if self._is_over.is_set():
                return
            # Fires by itself if this thread is not let to renew it; later than the threads of the
            # ranks that wait for this one, so that their stacks are written as well.
            faulthandler.dump_traceback_later(limit + LOCKED_SECONDS, exit=True, file=self._file)

    def _end(self, place: str, seconds: float) -> None:
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        with contextlib.suppress(Exception):
            self.account(place, seconds)
        os._exit(self.code)
