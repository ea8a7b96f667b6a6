"""Writes down what the loop does: log lines, files, and the run's status.

The formats of metrics.jsonl, samples.jsonl and TensorBoard are here.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from trainstack.checkpoint.snapshot import Saved
from trainstack.evaluation.held_out import Evaluation, overall
from trainstack.evaluation.samples import Said
from trainstack.resilience.guard import MOST_OVERFLOWS, describe_bad
from trainstack.run.folder import RunFolder, lines_until, numbers_in
from trainstack.run.states import RUNNING
from trainstack.storage import files
from trainstack.train.attempt import Attempt
from trainstack.train.numbers import StepResult, peak_memory_gb
from trainstack.train.ranks import Ranks
from trainstack.units import duration

log = logging.getLogger("trainstack")
HEADER = "%*s  epoch    loss    mean      lr   grad  tokens/s%s mem GB  left"
STATUS_SECONDS = 2  # between two writes of status.json, which is synced to disk


class Report:
    """Rank 0 writes; the other ranks only leave evidence if they are slow. Collective to create.

    Before it writes it makes sure that this attempt still owns the run (Refused if not).
    """

    def __init__(
        self, attempt: Attempt, rate_at: Callable[[int], float], first_step: int,
        ideal_seconds: float | None,
    ):  # fmt: skip
        """``ideal_seconds``: of a token at the peak rate of all GPUs.

        ``first_step``: the step from which this attempt trains. What earlier attempts wrote beyond
        it is dropped, since those steps come again.
        """
        self.attempt, self.rate_at = attempt, rate_at
        self.ideal_seconds, self.ranks = ideal_seconds, Ranks(attempt)
        self.width = len(f"{attempt.max_steps:,}/{attempt.max_steps:,}")  # of a log line's step
        self.is_main, self.metrics = attempt.world.is_main, attempt.run.path / "metrics.jsonl"
        self._status_at, self._saved_at = 0.0, time.monotonic()
        self._hashes: list[str] = []  # lines for samples.jsonl
        self._tensorboard = None
        if not self.is_main:
            return
        drop_beyond(first_step, attempt.run)
        if "tensorboard" in attempt.config.log.report_to:
            self._tensorboard = open_tensorboard(attempt, purge_step=first_step + 1)
        log.info(HEADER, self.width, "step", "    MFU" if ideal_seconds else "")

    def warms_up(self) -> None:
        """What was to be loaded is; compiling may follow."""
        if self.is_main:
            if self.attempt.config.train.torch_compile:
                log.info("compiling%s", self.attempt.run.last_time("loaded", "training"))
            self.attempt.run.add_event("loaded")

    def begins(self, step: int) -> None:
        """Put the first step of this attempt on record: goodput counts from here."""
        if self.is_main:
            self.attempt.run.add_event("training", step=step)

    def consumed(self, result: StepResult) -> None:
        """A step was made: its ranks are judged, its samples kept for the ledger's next write."""
        self.ranks.note(result)
        if self.is_main:
            # By hand, as json would write it, for it is written in each step; "at": since 1970.
            self._hashes.append(
                f'{{"step": {result.step}, "samples_hash": "{result.samples_hash}", '
                f'"attempt": {json.dumps(self.attempt.id)}, "at": {result.at:.4f}}}\n'
            )

    def skipped(self, result: StepResult, skips_in_a_row: int) -> None:
        """A bad update was withheld, and the run continues."""
        if self.is_main:
            text = describe_bad(result.step, result.loss, result.grad_norm)
            is_fp16 = self.attempt.config.train.precision == "fp16"
            is_scaled = is_fp16 and math.isfinite(result.loss)
            most = MOST_OVERFLOWS - 1 if is_scaled else self.attempt.config.guard.max_skips
            scaled = "; fp16's scale is halved" if is_scaled else ""
            log.warning("skip    %s; its update was left out (%d in a row, at most %d)%s",
                        text, skips_in_a_row, most, scaled)  # fmt: skip
            self.attempt.run.add_event("skip", step=result.step, cause=text)

    def step(
        self, result: StepResult, mean_loss: float, step_seconds: float, data_seconds: float,
        by_source: dict[str, dict[str, float]],
    ) -> None:  # fmt: skip
        """A line, with means since the last one; ``by_source``: of a mixture's data sets."""
        slowest = self.ranks.read(result.step, data_seconds)
        if not self.is_main:
            return
        self.attempt.lease.check_often()
        step, plan, max_steps = result.step, self.attempt.plan, self.attempt.max_steps
        samples_seen = step * plan.global_batch_size
        values = {
            "step": step,
            "loss": result.loss,
            "mean_loss": mean_loss,
            "token_accuracy": result.token_accuracy,
            "learning_rate": self.rate_at(step),
            "grad_norm": result.grad_norm,
            "tokens_seen": samples_seen * plan.seq_len,
            "samples_seen": samples_seen,
            "epoch": samples_seen / self.attempt.samples,
            "tokens_per_second": plan.tokens_per_step / step_seconds,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "peak_memory_gb": round(peak_memory_gb(self.attempt.world.device), 3),
            "samples_hash": result.samples_hash,
            **slowest,
            **by_source,
        }
        mfu = ""
        if self.ideal_seconds:
            values["mfu"] = values["tokens_per_second"] * self.ideal_seconds
            mfu = f"  {values['mfu']:5.1%}"
        files.append_line(self.metrics, values)
        log.info("%*s %6.3f %7.4f %7.4f %7.1e %6.2f %9s%s %6.2f  %s",
                 self.width, f"{step:,}/{max_steps:,}", values["epoch"], result.loss, mean_loss,
                 values["learning_rate"], result.grad_norm,
                 f"{values['tokens_per_second']:,.0f}", mfu, values["peak_memory_gb"],
                 duration((max_steps - step) * step_seconds))  # fmt: skip
        self._draw(values)
        self._flush()
        if time.monotonic() - self._status_at > STATUS_SECONDS:
            self._status_at = time.monotonic()
            self.attempt.run.set_status(RUNNING, step=step)

    def evaluation(
        self, step: int, results: dict[str, Evaluation] | None, said: list[Said] | None,
        seconds: float,
    ) -> None:  # fmt: skip
        """``results``: of each data set; ``said``: to each prompt; ``seconds``: for both."""
        if not self.is_main or not (results or said):
            return
        self.attempt.lease.check_often()
        if results:
            self._held_out(step, results)
        if said:
            self._said(step, said)
        self.attempt.run.add_event("evaluation", step=step, seconds=round(seconds, 3))

    def _held_out(self, step: int, results: dict[str, Evaluation]) -> None:
        sources = results if len(self.attempt.config.data.sources) > 1 else {}
        whole = overall(results.values())
        values: dict[str, Any] = {"step": step, **whole.record()}
        for name in ("loss", "token_accuracy") if sources else ():
            values[f"source_eval_{name}"] = {s: getattr(part, name) for s, part in sources.items()}
        files.append_line(self.metrics, values)
        log.info("eval    step %s   %s", f"{step:,}", whole)
        for label, part in sources.items():
            log.info("        %s: %s", label, part)
        self._draw(values)

    def _said(self, step: int, said: list[Said]) -> None:
        """The lines of a sample, its event, and sample.txt, which has the last ones."""
        for number, one in enumerate(said, start=1):
            if one.problem:
                log.warning("sample  %s: could not be made: %s", one.prompt, one.problem)
                continue
            log.info("sample  %s", one.text.replace("\n", "\n        "))
            log.info("        %s", one.end)
            self.attempt.run.add_event("sample", step=step, prompt=one.prompt, text=one.text)
            if self._tensorboard:
                self._tensorboard.add_text(f"sample/{number}", one.text, step)
        texts = "\n\n".join(one.text for one in said if not one.problem)
        files.replace_file(self.attempt.run.path / "sample.txt", f"{texts}\n".encode())

    def save_begins(self) -> None:
        """The hashes of the steps it will contain reach the disk before it."""
        if self.is_main:
            self.attempt.lease.check_often()
            self._flush()

    def save_ended(self, saved: Saved, stall_seconds: float) -> None:
        """``stall_seconds``: for which the loop stood still because of it."""
        if not self.is_main:
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
            stall_seconds=stall, train_hours=round(hours, 6), bytes=saved.size,
        )  # fmt: skip

    def close(self) -> None:
        """Write what is still in memory."""
        self._flush()
        if self._tensorboard:
            self._tensorboard.close()

    def _draw(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl as points of TensorBoard's curves."""
        for name, value in numbers_in(values) if self._tensorboard else ():
            self._tensorboard.add_scalar(name, value, values["step"])

    def _flush(self) -> None:
        """Bring the steps' hashes to disk, in one write."""
        if self._hashes:
            path = self.attempt.run.path / "samples.jsonl"
            files.append_lines(path, "".join(self._hashes).encode())
            self._hashes.clear()


def open_tensorboard(attempt: Attempt, purge_step: int):
    """A writer that tells the settings; what is there from ``purge_step`` on is no longer shown."""
    from torch.utils.tensorboard import SummaryWriter  # 2 s; only rank 0 pays them
    from torch.utils.tensorboard.summary import hparams

    settings = {  # numbers, texts and booleans, as TensorBoard takes them
        f"{section}.{key}": value if isinstance(value, int | float) else str(value)
        for section, keys in attempt.config.model_dump().items() for key, value in keys.items()
    }  # fmt: skip
    folder = attempt.run.path / "tensorboard"
    writer = SummaryWriter(folder, purge_step=purge_step, flush_secs=30)
    for summary in hparams(settings, {"train/loss": 0, "eval/loss": 0}):
        writer.file_writer.add_summary(summary)
    return writer


def drop_beyond(step: int, run: RunFolder) -> None:
    """Leave lines up to a step in metrics.jsonl, so that the file is one curve; no torn one."""
    path = run.path / "metrics.jsonl"
    if not path.exists():
        return
    kept = b"".join(line for _, line in lines_until(path, step))
    if len(kept) < path.stat().st_size:
        files.replace_file(path, kept)
