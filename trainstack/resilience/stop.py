"""When to save and stop: the end of the job, a stop file, or a signal; one flag for the loop."""

import signal
import time
from pathlib import Path

from trainstack.waits import MARGIN_SECONDS


class Stop:
    """Asked once a step; the loop reduces the answer over ranks, so that all act at one step.

    Rank 0 looks at the stop file and the clock, every rank at its signals. A signal handler sets a
    flag and does nothing else: it may run between any two bytecodes.
    """

    def __init__(self, stop_file: Path | None, ends_at: float | None, is_main: bool):
        self.stop_file, self.ends_at, self.is_main = stop_file, ends_at, is_main
        self.save_seconds = 0.0  # of the last save, or what is expected of the first
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, _frame) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def is_wanted(self, step_seconds: float, saves: int = 1) -> bool:
        """Whether this rank has a reason to stop; notes the first one in ``reason``.

        ``saves``: how many have to be waited for, one more if one is under way.
        """
        if self.is_main and self.reason is None:
            found = self._from_stop_file() or self._from_clock(step_seconds, saves)
            if found is not None:  # else a signal may have set one meanwhile
                self.reason = found
        return self.reason is not None

    def _from_stop_file(self) -> str | None:
        if self.stop_file is None or not self.stop_file.exists():
            return None
        return self.stop_file.read_text().strip() or "stop file"

    def _from_clock(self, step_seconds: float, saves: int) -> str | None:
        if self.ends_at is None:
            return None
        needed, left = step_seconds + saves * self.save_seconds, self.ends_at - time.time()
        # The flag is read one step later, hence another step.
        if step_seconds + needed + MARGIN_SECONDS <= left:
            return None
        end = f"{max(0, left):.0f} s to the end of the job"
        return f"{end}, a step and a save take {needed:.0f} s"
