"""How a run is left: paused or done, recorded durably, with what to do next."""

import logging
import math
from pathlib import Path

from trainstack.checkpoint.names import BEST, linked, newest_checkpoint, point_to
from trainstack.checkpoint.state import TrainState
from trainstack.run.states import EXIT_CODES, is_local_job, resume_command
from trainstack.storage import layout
from trainstack.train.attempt import Attempt
from trainstack.units import counted, duration

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


def is_over(attempt: Attempt, state: TrainState) -> bool:
    """Whether all steps are made, or eval.patience is used up."""
    patience = attempt.config.eval.patience or math.inf
    return state.step >= attempt.max_steps or state.evaluations_without_better >= patience


def complete(attempt: Attempt, state: TrainState, seconds: float) -> str:
    """The last step is on disk, ``seconds`` after the loop began."""
    if attempt.world.is_main:
        run, name, step = attempt.run, attempt.run.path.name, state.step
        _, newest = newest_checkpoint(run.checkpoints)
        look, taken, model, cause = f"bash monitor.sh {name}", duration(seconds), newest, None
        if attempt.config.eval.keep_best and newest:
            point_to(newest, state.best_step)  # an evaluation that a stop put off had no save
            model = run.checkpoints / BEST if linked(run.checkpoints, BEST) else newest
        if step < attempt.max_steps:
            why = early_stop(state)
            run.add_event("early_stop", step=step, best_step=state.best_step, cause=why,
                          evaluations=state.evaluations_without_better)  # fmt: skip
            cause = f"stopped early: {why}"
        code = EXIT_CODES["DONE"]
        facts = {"job": attempt.owner.job, "attempt": attempt.owner.attempt, "exit_code": code}
        run.set_status("DONE", step=step, **facts, cause=cause, next_action=f"its model: {model}")
        run.add_event("done", step=step, job=attempt.owner.job, attempt=attempt.owner.attempt)
        log.info("%s: DONE at step %s after %s. Checkpoint: %s", name, f"{step:,}", taken, newest)
        if state.updates < step:
            log.info("      %s of its %s updates were not made, since a loss or gradient was not "
                     "finite, or a spike", f"{step - state.updates:,}", f"{step:,}")  # fmt: skip
        if cause:
            log.info("      %s; to go further raise eval.patience, or set it null", cause)
        if gone := best_before(state, run.checkpoints):
            log.info("      %s", gone)
        log.info("      look: %s", look)
        log.info("      use:  %s", how_to_load(attempt, model))
        best = "@best" if model and model.name == BEST else ""
        log.info('      give: source env.sh; "$TRAINSTACK_PYTHON" -m trainstack export %s%s --to '
                 "FOLDER", name, best)  # fmt: skip
        attempt.lease.release()
    return "DONE"


def early_stop(state: TrainState) -> str:
    """Why a run ends before its last step."""
    lowest = "infinity" if state.best_loss is None else f"{state.best_loss:.4f}"
    count = counted(state.evaluations_without_better, "evaluation")
    at = f" of step {state.best_step:,}" if state.best_step else ""
    return f"{count} without a held-out loss below {lowest}{at}"


def how_to_load(attempt: Attempt, checkpoint: Path | None) -> str:
    """The line of Python that loads what was trained."""
    config, of_folder = attempt.config, 'AutoModelForCausalLM.from_pretrained("{}")'
    if not config.adapter.type:
        return of_folder.format(checkpoint)
    base = layout.model_folder(attempt.run.path.parents[1], config.model.name)
    return f'peft.PeftModel.from_pretrained({of_folder.format(base)}, "{checkpoint}")'


def best_before(state: TrainState, checkpoints: Path) -> str:
    """A line if the held-out loss was lower at an earlier evaluation than at the last one."""
    if not (state.best_step and state.evaluations_without_better):
        return ""
    where = checkpoints / f"checkpoint-{state.best_step}"
    kept = f"kept in {where}" if where.exists() else "not kept (eval.keep_best=true keeps it)"
    loss = f"{state.best_loss:.4f}"
    return f"the held-out loss was lowest at step {state.best_step:,}, {loss}: {kept}"
