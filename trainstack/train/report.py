"""What the loop says of itself: log lines, files and status of steps, evaluations and saves."""

import logging
import time

import numpy as np

from trainstack.checkpoint.interval import Interval
from trainstack.checkpoint.snapshot import Saved
from trainstack.resilience.guard import Diverged
from trainstack.run.lease import OWNED_SECONDS
from trainstack.run.states import RUNNING
from trainstack.train.metrics import HEADER, Metrics
from trainstack.train.numbers import Pace, StepResult, is_due, peak_memory_gb
from trainstack.train.state import Parts, Resumed

log = logging.getLogger("trainstack")
STATUS_SECONDS = 2  # between two writes of status.json, which is synced to disk


class Report:
    """Reads each step's numbers, the same on every rank; rank 0 writes them down."""

    def __init__(self, parts: Parts, resumed: Resumed, rate_at, pace: Pace):
        self.parts, self.rate_at, self.pace = parts, rate_at, pace
        self.skips_in_a_row = resumed.skips_in_a_row
        self.drawn = None  # sequences, by data set of a mixture
        if len(parts.corpus.stores) > 1:
            self.drawn = np.array(resumed.drawn or [0] * len(parts.corpus.stores))
        self.metrics = None
        self._status_at = self._checked_at = 0.0
        self._stall_seconds, self._saved_at = 0.0, time.monotonic()
        section = parts.config.checkpoint
        self.interval = None
        if parts.world.is_main:
            attempt = f"{parts.owner.job}.{parts.owner.attempt}"
            report_to = parts.config.log.report_to
            self.metrics = Metrics(parts.run.path, report_to, resumed.step, attempt)
            if section.save_steps == "auto":
                events = parts.run.events()
                expected = parts.stop.save_seconds
                self.interval = Interval(section.failure_hours, events, expected, time.monotonic())
            log.info("%s", HEADER)

    def begins(self, step: int) -> None:
        """The loop is about to begin."""
        if self.metrics:
            self.parts.run.add_event("training", step=step)
        self.pace.restart()

    def must_own(self) -> None:
        """Refused where another life owns the run: asked by rank 0 before it writes anything."""
        if self.metrics and time.monotonic() > self._checked_at + OWNED_SECONDS:
            self.parts.lease.check()
            self._checked_at = time.monotonic()

    def draws(self, step: int) -> None:
        """Count from which data set the sequences of a step (from 0) come, of all ranks."""
        if self.drawn is not None:
            samples = self.parts.sampler.all_samples_at(step)
            sources = self.parts.corpus.train.sources_of(samples)
            self.drawn += np.bincount(sources, minlength=len(self.drawn))

    def wants_save(self) -> bool:
        """Rank 0's wish where save_steps is auto; asked once a step."""
        return self.interval is not None and self.interval.is_due(time.monotonic())

    def step(self, result: StepResult | None) -> tuple[bool, bool]:
        """Note one step's numbers; whether a rank wants to stop, and to save. Raises Diverged."""
        if result is None:
            return False, False
        self.pace.note(result.sent_at)
        self.parts.watch.dog.note_step(self.pace.step_seconds)
        is_scaling = self.parts.scaler.is_enabled() and np.isfinite(result.loss)  # fp16, too far
        if result.is_withheld and not is_scaling:
            self._withheld(result)
        else:
            self.skips_in_a_row = 0
        if self.metrics:
            self.metrics.note_samples(result.step, result.samples_hash, result.at)
        steps = self.parts.config.log.logging_steps
        if result.step == 1 or is_due(result.step, steps, self.parts.max_steps):
            self._log(result)
        return result.is_stop_wanted, result.is_save_wanted

    def _withheld(self, result: StepResult) -> None:
        """An update that was bad and did not happen: go on, go back, or give up."""
        section = self.parts.config.guard
        what = "a spike of" if result.is_finite else "not finite:"
        numbers = f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        text = f"step {result.step}: {what} {numbers}"
        self.skips_in_a_row += 1
        if section.on_divergence == "rollback":
            raise Diverged(result.step, text, is_rollback=True)
        if section.on_divergence == "skip" and self.skips_in_a_row <= section.max_skips:
            if self.metrics:
                log.warning("skip    %s; its update was left out (%d in a row, at most %d)",
                            text, self.skips_in_a_row, section.max_skips)  # fmt: skip
                self.parts.run.add_event("skip", step=result.step, cause=text)
            return
        rate = self.parts.config.optim.learning_rate
        tried = f"; {section.max_skips} updates in a row were skipped before" * (
            section.on_divergence == "skip"
        )
        raise Diverged(
            result.step,
            f"{text}{tried}; lower optim.learning_rate (now {rate:g}), or look at the data",
        )

    def _log(self, result: StepResult) -> None:
        step_seconds, data_seconds = self.pace.read()
        if self.metrics is None:
            return
        self.must_own()
        parts, plan = self.parts, self.parts.plan
        samples_seen = result.step * plan.global_batch_size
        values = {
            "step": result.step,
            "loss": result.loss,
            "learning_rate": self.rate_at(result.step),
            "grad_norm": result.grad_norm,
            "tokens_seen": samples_seen * plan.seq_len,
            "samples_seen": samples_seen,
            "epoch": samples_seen / parts.sampler.total_samples,
            "tokens_per_second": plan.tokens_per_step / step_seconds,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "samples_hash": result.samples_hash,
        }
        if self.drawn is not None:
            values["source_tokens"] = self._source_tokens()
        self.metrics.log_step(values, parts.max_steps, peak_memory_gb(parts.world.device))
        if time.monotonic() - self._status_at > STATUS_SECONDS:
            self._status_at = time.monotonic()
            parts.run.set_status(RUNNING, step=result.step)

    def _source_tokens(self) -> dict[str, int]:
        """What each data set of a mixture gave so far, in tokens."""
        tokens = self.drawn * self.parts.plan.seq_len
        return dict(zip(self.parts.corpus.stores, tokens.tolist(), strict=True))

    def evaluation(self, step: int, results: dict[str, tuple[float, int]], seconds: float) -> None:
        """``results``: of each data set, the mean loss and the number of its held-out targets."""
        self.must_own()
        if self.metrics:
            self.metrics.log_evaluation(step, results, is_mixture=self.drawn is not None)
            self.parts.run.add_event("evaluation", step=step, seconds=round(seconds, 3))

    def saving(self) -> None:
        """A save begins: its steps are never without their hashes."""
        self.must_own()
        if self.metrics:
            self.metrics.flush()
        if self.interval:
            self.interval.saving(time.monotonic())

    def stalled(self, seconds: float) -> None:
        """The loop stood still for a save."""
        self._stall_seconds += seconds

    def saved(self, saved: Saved | None) -> None:
        """A save ended; ``saved.problem`` is an error only for who needs it."""
        if saved is None:
            return
        parts, stall, self._stall_seconds = self.parts, self._stall_seconds, 0.0
        if saved.problem is None:
            parts.stop.save_seconds = saved.seconds
        if not parts.world.is_main:
            return
        self.must_own()
        if saved.problem is not None:
            step = f"{saved.step:,}"
            log.error("save    step %s failed: %s; the next one is tried", step, saved.problem)
            parts.run.add_event(
                "save_failed", step=saved.step, cause=saved.problem,
                stall_seconds=round(stall, 3),
            )  # fmt: skip
            return
        if self.interval:
            self.interval.saved(stall, saved.seconds)
        log.info("saved   %s (%.2f GB in %.1f s; training waited %.2f s)",
                 saved.path.name, saved.size / 1e9, saved.seconds, stall)  # fmt: skip
        hours, self._saved_at = (time.monotonic() - self._saved_at) / 3600, time.monotonic()
        parts.run.set_status(RUNNING, checkpoint=saved.path.name, checkpoint_at=time.time())
        parts.run.add_event(
            "checkpoint", step=saved.step, save_seconds=round(saved.seconds, 3),
            stall_seconds=round(stall, 3), train_hours=round(hours, 6),
        )  # fmt: skip

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
