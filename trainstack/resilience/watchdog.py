"""A step that never ends is an error: stacks of every thread to a file, an account, the end."""

import contextlib
import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from trainstack.run.folder import RunFolder
from trainstack.run.states import EXIT_CODES, Phase

log = logging.getLogger("trainstack")
MEDIANS = 10  # a step may take this many times the median step
RECENT = 64  # steps the median is taken over
START_SECONDS = 900  # loading, connecting, compiling: before the first step there is no median
SAVE_SECONDS = 1800  # the last save of a life, to a slow file system
TICKS_SECONDS = 1.0
STOPPED_SECONDS = 5.0
LOCKED_SECONDS = 5.0  # less than launch.py waits before it kills
MAY_COMPILE = 2  # steps of a life at each place


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


class Watch:
    """The watchdog as the loop speaks with it: a step and the name of a place."""

    def __init__(
        self, run: RunFolder, job: str | None, attempt: int, rank: int, seconds: float | None
    ):
        self.position = [0, 0]
        self._steps: dict[Phase, set[int]] = {}  # of this life, by place; the first few only

        def account(place: str, stalled: float) -> None:
            cause = f"no progress for {stalled:.0f} s at {place}"
            log.error("HANG    %s; stacks: %s", cause, stacks)
            run.add_failure(
                job, attempt, rank, "HANG", EXIT_CODES["HANG"], cause, False,
                position=self.position,
            )  # fmt: skip

        stacks = run.stacks_file(job, attempt, rank)
        self.dog = Watchdog(seconds, stacks, account, EXIT_CODES["HANG"])

    def at(self, step: int, phase: Phase, extra_seconds: float = 0) -> None:
        """Say where the loop is. The first two steps and the first evaluations may compile."""
        steps = self._steps.setdefault(phase, {step})
        if len(steps) <= MAY_COMPILE:
            steps.add(step)
        if len(steps) <= MAY_COMPILE:
            extra_seconds = max(extra_seconds, START_SECONDS)
        self.position = [step, list(Phase).index(phase)]
        self.dog.at(f"step {step:,}, {phase.value}", extra_seconds)
