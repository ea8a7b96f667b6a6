"""Writes down what the loop does: log lines, files, and the run's status."""

import logging
import time
from collections.abc import Callable

from trainstack.checkpoint.snapshot import Saved
from trainstack.resilience.guard import describe_bad
from trainstack.run.states import RUNNING
from trainstack.train.attempt import Attempt
from trainstack.train.metrics import HEADER, Metrics
from trainstack.train.numbers import StepResult, peak_memory_gb

log = logging.getLogger("trainstack")
STATUS_SECONDS = 2  # between two writes of status.json, which is synced to disk


class Report:
    """Rank 0 writes; on the other ranks every method does nothing.

    Before it writes it makes sure that this attempt still owns the run (LeaseHeld if not).
    """

    def __init__(
        self, attempt: Attempt, rate_at: Callable[[int], float], samples: int, first_step: int
    ):
        """``samples``: of an epoch. ``first_step``: the step from which this attempt trains."""
        self.attempt, self.rate_at, self.samples = attempt, rate_at, samples
        self._status_at, self._saved_at = 0.0, time.monotonic()
        self.metrics = None
        if attempt.world.is_main:
            self.metrics = Metrics(
                attempt.run.path, attempt.config.log.report_to, first_step, attempt.id
            )
            log.info("%s", HEADER)

    def begins(self, step: int) -> None:
        """Put the first step of this attempt on record: goodput counts from here."""
        if self.metrics:
            self.attempt.run.add_event("training", step=step)

    def consumed(self, result: StepResult) -> None:
        """A step's samples were used, for the ledger; written with the next line or save."""
        if self.metrics:
            self.metrics.note_samples(result.step, result.samples_hash, result.at)

    def skipped(self, result: StepResult, skips_in_a_row: int) -> None:
        """A bad update was withheld, and the run continues."""
        if self.metrics:
            text = describe_bad(result.step, result.loss, result.grad_norm)
            log.warning("skip    %s; its update was left out (%d in a row, at most %d)",
                        text, skips_in_a_row, self.attempt.config.guard.max_skips)  # fmt: skip
            self.attempt.run.add_event("skip", step=result.step, cause=text)

    def step(
        self,
        result: StepResult,
        step_seconds: float,
        data_seconds: float,
        source_tokens: dict[str, int] | None,
    ) -> None:
        """A line for a logged step; ``source_tokens``: what each data set of a mixture gave."""
        if self.metrics is None:
            return
        self.attempt.lease.check_often()
        plan = self.attempt.plan
        samples_seen = result.step * plan.global_batch_size
        values = {
            "step": result.step,
            "loss": result.loss,
            "learning_rate": self.rate_at(result.step),
            "grad_norm": result.grad_norm,
            "tokens_seen": samples_seen * plan.seq_len,
            "samples_seen": samples_seen,
            "epoch": samples_seen / self.samples,
            "tokens_per_second": plan.tokens_per_step / step_seconds,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "samples_hash": result.samples_hash,
        }
        if source_tokens is not None:
            values["source_tokens"] = source_tokens
        memory_gb = peak_memory_gb(self.attempt.world.device)
        self.metrics.log_step(values, self.attempt.max_steps, memory_gb)
        if time.monotonic() - self._status_at > STATUS_SECONDS:
            self._status_at = time.monotonic()
            self.attempt.run.set_status(RUNNING, step=result.step)

    def evaluation(self, step: int, results: dict[str, tuple[float, int]], seconds: float) -> None:
        """``results``: of each data set, the mean loss and the number of its held-out targets."""
        if self.metrics:
            self.attempt.lease.check_often()
            is_mixture = len(self.attempt.config.data.sources) > 1
            self.metrics.log_evaluation(step, results, is_mixture)
            self.attempt.run.add_event("evaluation", step=step, seconds=round(seconds, 3))

    def save_begins(self) -> None:
        """The hashes of the steps it will contain reach the disk before it."""
        if self.metrics:
            self.attempt.lease.check_often()
            self.metrics.flush()

    def save_ended(self, saved: Saved, stall_seconds: float) -> None:
        """``stall_seconds``: for which the loop stood still because of it."""
        if self.metrics is None:
            return
        self.attempt.lease.check_often()
        stall = round(stall_seconds, 3)
        if saved.problem is not None:
            step = f"{saved.step:,}"
            log.error("save    step %s failed: %s; the next one is tried", step, saved.problem)
            self.attempt.run.add_event(
                "save_failed", step=saved.step, cause=saved.problem, stall_seconds=stall
            )
            return
        log.info("saved   %s (%.2f GB in %.1f s; training waited %.2f s)", saved.path.name,
                 saved.size / 1e9, saved.seconds, stall_seconds)  # fmt: skip
        hours, self._saved_at = (time.monotonic() - self._saved_at) / 3600, time.monotonic()
        self.attempt.run.set_status(RUNNING, checkpoint=saved.path.name, checkpoint_at=time.time())
        self.attempt.run.add_event(
            "checkpoint", step=saved.step, save_seconds=round(saved.seconds, 3),
            stall_seconds=stall, train_hours=round(hours, 6),
        )  # fmt: skip

    def close(self) -> None:
        """Write what is still in memory."""
        if self.metrics:
            self.metrics.close()
