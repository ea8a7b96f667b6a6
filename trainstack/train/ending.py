"""How a run is left: paused or done, recorded durably, with what to do next."""

import logging
from pathlib import Path

from trainstack.chat.template import load_tokenizer
from trainstack.checkpoint.names import newest_checkpoint
from trainstack.checkpoint.snapshot import GENERATION, ends_in
from trainstack.checkpoint.state import TrainState
from trainstack.evaluation.samples import answer
from trainstack.model.strategy import Strategy
from trainstack.run.folder import RunFolder
from trainstack.run.lease import is_local_job
from trainstack.run.states import EXIT_CODES, resume_command
from trainstack.storage.files import read_object
from trainstack.train.attempt import Attempt
from trainstack.units import duration

log = logging.getLogger("trainstack")


def pause(attempt: Attempt, reason: str | None, step: int | None = None) -> str:
    """Everything is saved, or, without a ``step``, nothing was loaded yet.

    ``reason``: why this rank stopped, None if another one asked for it.
    """
    if attempt.world.is_main:
        cause, facts, where = reason or "another rank was asked to stop", {}, ""
        if step is None:
            cause += ", before training began"
        else:
            facts, where = {"step": step}, f" at step {step:,}"
        attempt.run.pause(attempt.owner.job, attempt.owner.attempt, cause, **facts)
        name = attempt.run.path.name
        resume = resume_command(name, attempt.owner.job)
        how = "to resume" if is_local_job(attempt.owner.job) else "to resume, if nothing is queued"
        log.info("%s: PAUSED%s (%s); %s: %s", name, where, cause, how, resume)
        attempt.lease.release()
    return "PAUSED"


def complete(attempt: Attempt, state: TrainState, seconds: float) -> str:
    """The last step is on disk, ``seconds`` after the loop began."""
    if attempt.world.is_main:
        run, name, step = attempt.run, attempt.run.path.name, state.step
        _, newest = newest_checkpoint(run.checkpoints)
        look, taken = f"bash monitor.sh {name}", duration(seconds)
        code = EXIT_CODES["DONE"]
        facts = {"job": attempt.owner.job, "attempt": attempt.owner.attempt, "exit_code": code}
        run.set_status("DONE", step=step, **facts, cause=None, next_action=f"its model: {newest}")
        run.add_event("done", step=step, job=attempt.owner.job, attempt=attempt.owner.attempt)
        log.info("%s: DONE at step %s after %s. Checkpoint: %s", name, f"{step:,}", taken, newest)
        if state.updates < step:
            log.info("      %s of its %s updates were not made, since a loss or gradient was not "
                     "finite, or a spike", f"{step - state.updates:,}", f"{step:,}")  # fmt: skip
        if gone := best_before(run, newest):
            log.info("      %s", gone)
        log.info("      look: %s", look)
        log.info('      use:  AutoModelForCausalLM.from_pretrained("%s")', newest)
        attempt.lease.release()
    return "DONE"


def best_before(run: RunFolder, newest: Path | None) -> str:
    """A line if the held-out loss was lower at an earlier evaluation than at the last one."""
    found = run.eval_losses()
    best = min(found, key=found.get, default=None)
    if best is None or best == max(found) or newest is None:
        return ""
    where = newest.with_name(f"checkpoint-{best}")
    kept = f"kept in {where}" if where.exists() else "not kept (checkpoint.save_total_limit)"
    return f"the held-out loss was lowest at step {best:,}, {found[best]:.4f}: {kept}"


def show_sample(attempt: Attempt, strategy: Strategy, is_chat: bool) -> None:
    """Print what the trained model says; rank 0 generates, the others have nothing left to do."""
    section, run = attempt.config.eval, attempt.run
    if not attempt.world.is_main or not section.prompts:
        return
    try:
        step, newest = newest_checkpoint(run.checkpoints)
        tokenizer = load_tokenizer(newest)
        ends = ends_in(read_object(newest / GENERATION).get("eos_token_id"))
        seed, seq_len = attempt.config.run.seed, attempt.config.data.seq_len
        with strategy.loss_model.autocast():  # flash attention knows no fp32
            text, end = answer(strategy.causal_lm, tokenizer, section, is_chat, ends, seed, seq_len)
        text = f"{section.prompts[0]} -> {text}" if is_chat else text
        log.info("sample  %s", text.replace("\n", "\n        "))
        log.info("        %s", end)
        (run.path / "sample.txt").write_text(text + "\n")
        run.add_event("sample", step=step, text=text)
        if "tensorboard" in attempt.config.log.report_to:
            from torch.utils.tensorboard import SummaryWriter  # 2 s

            with SummaryWriter(run.path / "tensorboard") as writer:
                writer.add_text("sample", text, step)
    except Exception as error:  # the run is complete all the same
        log.warning("sample  could not be made: %s: %s", type(error).__name__, error)
