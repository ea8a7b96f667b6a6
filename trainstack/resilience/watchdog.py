"""A phase of the loop that never ends is an error: all stacks, a failure report, the end."""

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque

from trainstack import distributed
from trainstack.run.folder import RunFolder
from trainstack.run.states import EXIT_CODES, Phase
from trainstack.waits import (
    COMPILE_SECONDS,
    CONNECT_SECONDS,
    LOCKED_SECONDS,
    STOPPED_SECONDS,
    TICKS_SECONDS,
)

log = logging.getLogger("trainstack")
MEDIANS = 10  # a step may take this many times the median step
RECENT = 64  # steps the median is taken over
MAY_COMPILE = 2  # the first steps of an attempt in each phase, which may take COMPILE_SECONDS more


class Watch:
    """Watches this process from a thread; ends it as HANG if it no longer moves.

    Before that it leaves a failure report: by it the rank that holds up the others is found. A
    thread of Python cannot run while another one holds the interpreter's lock, so faulthandler's
    own thread, in C, watches this one. It writes the stacks too, and launch.py ends this process
    by them: the clock of faulthandler runs on while Slurm suspends the job, launch.py's does not.
    """

    def __init__(
        self, run: RunFolder, job: str | None, attempt: int, rank: int, least_seconds: float | None
    ):
        """``least_seconds``: beyond which a phase may be a hang; None: nothing is watched."""
        self.run, self.job, self.attempt, self.rank = run, job, attempt, rank
        self.least_seconds = least_seconds
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._first_steps: dict[Phase, set[int]] = {}  # of this attempt
        self._position, self._extra = (0, Phase.CONNECT), CONNECT_SECONDS
        self._at = time.monotonic()
        self._is_over = threading.Event()
        if least_seconds is None:
            return
        # Started by hand, a new run has no folder yet: it is made once the run is owned.
        self._has_file = run.logs.is_dir()
        self._file = run.stacks_file(job, attempt, rank).open("w") if self._has_file else sys.stderr
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, step: int, phase: Phase, extra_seconds: float = 0) -> None:
        """Say where the loop is; ``extra_seconds``: what this phase may take beyond a step."""
        first_steps = self._first_steps.setdefault(phase, set())
        if len(first_steps) < MAY_COMPILE:
            first_steps.add(step)
        if step in first_steps and not phase.is_start:
            extra_seconds = max(extra_seconds, COMPILE_SECONDS)
        self._position, self._extra, self._at = (step, phase), extra_seconds, time.monotonic()

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
            if late > LOCKED_SECONDS:
                self._woke(late)
            ticked = time.monotonic()
            limit, position, at = self.limit_seconds(), self._position, self._at
            stalled = time.monotonic() - at
            if stalled > limit:
                self._end(*position, stalled)
            if self._is_over.is_set():
                return
            # Renewed at each tick. Started by hand, nobody watches this process: it ends itself.
            faulthandler.dump_traceback_later(
                limit + LOCKED_SECONDS, exit=self.job is None, file=self._file
            )

    def _woke(self, late: float) -> None:
        """This thread could not run for a while, in which faulthandler may have written stacks."""
        faulthandler.cancel_dump_traceback_later()
        if self._has_file:
            with contextlib.suppress(OSError):
                self._file.seek(0)
                self._file.truncate()
        if late > STOPPED_SECONDS:  # the whole process was stopped, by Ctrl-Z or by Slurm
            self._at += late
            log.info("stopped  for %.0f s as a whole, by Slurm or Ctrl-Z; nothing hangs", late)
            with contextlib.suppress(OSError):
                self.run.stopped_mark(self.job, self.attempt, self.rank).touch()

    def _end(self, step: int, phase: Phase, seconds: float) -> None:
        where = f"while {phase.value}" if phase.is_start else f"at step {step:,}, {phase.value}"
        cause = f"no progress for {seconds:.0f} s {where}"
        with contextlib.suppress(Exception):
            log.error("HANG    %s; stacks: %s", cause, self._file.name)
            who = (self.job, self.attempt, self.rank)
            report = (*who, "HANG", EXIT_CODES["HANG"], cause, False)
            self.run.add_failure(*report, position=[step, phase.number])
            # Then, for it may hang itself.
            record, collective = distributed.flight_record()
            self.run.add_failure(*report, position=[step, phase.number], collective=collective)
            self.run.collectives_file(*who).write_text(record)
        # Last, for launch.py ends a rank whose stacks stay.
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        os._exit(EXIT_CODES["HANG"])
