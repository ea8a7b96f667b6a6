"""A phase of the loop that never ends is an error: all stacks, a failure report, the end."""

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
from trainstack.waits import LOCKED_SECONDS, START_SECONDS, STOPPED_SECONDS, TICKS_SECONDS

log = logging.getLogger("trainstack")
MEDIANS = 10  # a step may take this many times the median step
RECENT = 64  # steps the median is taken over
MAY_COMPILE = 2  # the first steps of an attempt in each phase, which may take START_SECONDS more


class Watchdog:
    """Watches this process's loop from a thread; ends it with ``code`` if it no longer moves.

    ``report(phase, seconds)`` is called once, before the process ends: by that record the rank that
    holds up the others is found. A thread of Python cannot run while another one holds the
    interpreter's lock, so faulthandler's own thread, in C, watches this one.
    """

    def __init__(
        self,
        least_seconds: float | None,
        stacks: Path,
        report: Callable[[str, float], None],
        code: int,
    ):
        self.least_seconds, self.report, self.code = least_seconds, report, code
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._extra, self._at = START_SECONDS, time.monotonic()
        self._phase = Phase.START.value
        self._is_over = threading.Event()
        if least_seconds is None:
            return
        self._file = stacks.open("w")
        threading.Thread(target=self._watch, daemon=True).start()

    def moved_to(self, phase: str, extra_seconds: float = 0) -> None:
        """Say where the loop is now, in words for people."""
        self._phase, self._extra, self._at = phase, extra_seconds, time.monotonic()

    def note_step(self, seconds: float) -> None:
        self._recent.append(seconds)

    def limit_seconds(self) -> float:
        """How long the loop may stay in its present phase."""
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
            limit, phase, at = self.limit_seconds(), self._phase, self._at
            stalled = time.monotonic() - at
            if stalled > limit:
                self._end(phase, stalled)
            if self._is_over.is_set():
                return
            # Renewed at each tick; if this thread cannot run, it ends the process by itself.
            faulthandler.dump_traceback_later(limit + LOCKED_SECONDS, exit=True, file=self._file)

    def _end(self, phase: str, seconds: float) -> None:
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        with contextlib.suppress(Exception):
            self.report(phase, seconds)
        os._exit(self.code)


class Watch(Watchdog):
    """The watchdog as the loop uses it: told the step and its phase, it reports a hang."""

    def __init__(
        self, run: RunFolder, job: str | None, attempt: int, rank: int, seconds: float | None
    ):
        self.position = [0, Phase.START.number]
        self._first_steps: dict[Phase, set[int]] = {}  # of this attempt

        def report(phase: str, stalled: float) -> None:
            cause = f"no progress for {stalled:.0f} s at {phase}"
            log.error("HANG    %s; stacks: %s", cause, stacks)
            run.add_failure(
                job, attempt, rank, "HANG", EXIT_CODES["HANG"], cause, False,
                position=self.position,
            )  # fmt: skip

        stacks = run.stacks_file(job, attempt, rank)
        super().__init__(seconds, stacks, report, EXIT_CODES["HANG"])

    def at(self, step: int, phase: Phase, extra_seconds: float = 0) -> None:
        """Say where the loop is; ``extra_seconds``: what this phase may take beyond a step."""
        first_steps = self._first_steps.setdefault(phase, set())
        if len(first_steps) < MAY_COMPILE:
            first_steps.add(step)
        if step in first_steps:
            extra_seconds = max(extra_seconds, START_SECONDS)
        self.position = [step, phase.number]
        self.moved_to(f"step {step:,}, {phase.value}", extra_seconds)
