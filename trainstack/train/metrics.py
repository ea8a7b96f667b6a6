"""The formats of what a run reports: console lines, metrics.jsonl, samples.jsonl, TensorBoard."""

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from trainstack.storage import files
from trainstack.units import duration, rounded

log = logging.getLogger("trainstack")
HEADER = "           step    epoch     loss       lr    grad  tokens/s  mem GB  left"


class Metrics:
    """Writes one run's measurements; only rank 0 has one.

    ``resumed_step``: what earlier attempts wrote beyond it is dropped, since those steps come
    again; the files are one curve.
    """

    def __init__(self, run_folder: Path, report_to: list[str], resumed_step: int, attempt: str):
        self.file = run_folder / "metrics.jsonl"
        self.ledger = run_folder / "samples.jsonl"
        self.attempt = attempt
        self._hashes: list[str] = []
        if self.file.exists():
            lines = self.file.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= resumed_step]
            if len(kept) != len(lines):
                files.replace_file(self.file, b"".join(kept))
        self.tensorboard = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter  # 2 s; only rank 0 pays them

            self.tensorboard = SummaryWriter(
                run_folder / "tensorboard", purge_step=resumed_step + 1, flush_secs=30
            )

    def log_step(self, values: dict[str, Any], max_steps: int, memory_gb: float) -> None:
        """One logged step; ``values`` has the keys of metrics.jsonl."""
        files.append_line(self.file, values)
        left = (max_steps - values["step"]) * values["step_seconds"]
        log.info("%15s  %7.3f %8.4f %8.1e %7.2f %9s %7.2f  %s",
                 f"{values['step']:,}/{max_steps:,}", values["epoch"], values["loss"],
                 values["learning_rate"], values["grad_norm"],
                 f"{values['tokens_per_second']:,.0f}", memory_gb, duration(left))  # fmt: skip
        if self.tensorboard:
            for key in ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second"):
                self.tensorboard.add_scalar(f"train/{key}", values[key], values["step"])
        self.flush()

    def log_evaluation(
        self, step: int, results: dict[str, tuple[float, int]], is_mixture: bool
    ) -> None:
        """``results``: of each data set, mean loss in nats and number of held-out tokens."""
        tokens = sum(number for _, number in results.values())
        loss = sum(loss * number for loss, number in results.values()) / max(1, tokens)
        perplexity = perplexity_of(loss)
        values = {"step": step, "eval_loss": loss, "eval_perplexity": perplexity}
        values["eval_tokens"] = tokens
        if is_mixture:
            values["source_eval_loss"] = {label: own for label, (own, _) in results.items()}
        files.append_line(self.file, values)
        log.info("eval    step %s   loss %.4f   perplexity %s   (%s held-out tokens)",
                 f"{step:,}", loss, rounded(perplexity), f"{tokens:,}")  # fmt: skip
        for label, (own, number) in results.items() if is_mixture else ():
            log.info("        %s: loss %.4f   perplexity %s   (%s tokens)", label, own,
                     rounded(perplexity_of(own)), f"{number:,}")  # fmt: skip
        if self.tensorboard:
            self.tensorboard.add_scalar("eval/loss", loss, step)
            self.tensorboard.add_scalar("eval/perplexity", perplexity, step)

    def note_samples(self, step: int, samples_hash: str, at: float) -> None:
        """Remember what a step consumed, and when; kept also if the attempt is killed later."""
        record = {"step": step, "samples_hash": samples_hash, "attempt": self.attempt}
        record["at"] = round(at, 4)  # seconds since 1970
        self._hashes.append(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Bring the steps' hashes to disk, in one write."""
        if self._hashes:
            files.append_lines(self.ledger, "".join(self._hashes).encode())
            self._hashes.clear()

    def close(self) -> None:
        self.flush()
        if self.tensorboard:
            self.tensorboard.close()


def perplexity_of(loss: float) -> float:
    """e to the loss in nats, kept finite."""
    return math.exp(min(loss, 700))


def evaluations(file: Path) -> dict[int, float]:
    """The held-out loss of each evaluation in metrics.jsonl by its step; none without a file."""
    found = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line, or no evaluation
            values = json.loads(line)
            found[values["step"]] = values["eval_loss"]
    return found


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a torn line, left by a kill, counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
