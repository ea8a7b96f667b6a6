"""How a run is left: paused or done, recorded durably, with what to do next."""

import logging

from trainstack.checkpoint.names import newest_checkpoint
from trainstack.model.strategy import Strategy
from trainstack.run.states import CONTINUES, EXIT_CODES
from trainstack.train.evaluate import generate_text
from trainstack.train.job import Job
from trainstack.units import duration

log = logging.getLogger("trainstack")


def pause(job: Job, step: int, reason: str | None) -> str:
    """Everything is saved; ``reason``: why this rank stopped, None if another one asked for it."""
    if job.world.is_main:
        cause, name = reason or "another rank was asked to stop", job.run.path.name
        job.run.pause(job.owner.job, job.owner.attempt, cause, step=step)
        log.info("%s: PAUSED at step %s (%s); %s", name, f"{step:,}", cause, CONTINUES)
        job.lease.release()
    return "PAUSED"


def complete(job: Job, step: int, seconds: float) -> str:
    """The last step is on disk, ``seconds`` after the loop began."""
    if job.world.is_main:
        run, name = job.run, job.run.path.name
        _, newest = newest_checkpoint(run.checkpoints)
        look, taken = f"bash monitor.sh {name}", duration(seconds)
        code = EXIT_CODES["DONE"]
        run.set_status("DONE", step=step, exit_code=code, cause=None, next_action=look)
        run.add_event("done", step=step, job=job.owner.job, attempt=job.owner.attempt)
        log.info("%s: DONE at step %s after %s. Checkpoint: %s", name, f"{step:,}", taken, newest)
        log.info("      look: %s", look)
        log.info('      use:  AutoModelForCausalLM.from_pretrained("%s")', newest)
        job.lease.release()
    return "DONE"


def show_sample(job: Job, strategy: Strategy) -> None:
    """Print what the trained model says; rank 0 generates, the others have nothing left to do."""
    section, run = job.config.eval, job.run
    if not job.world.is_main or section.sample_prompt is None:
        return
    try:
        from transformers import AutoTokenizer

        _, newest = newest_checkpoint(run.checkpoints)
        tokenizer = AutoTokenizer.from_pretrained(newest, local_files_only=True)
        text = generate_text(
            strategy.causal_lm, tokenizer, section.sample_prompt, section.sample_tokens,
            job.config.run.seed,
        )  # fmt: skip
        log.info("sample  %s", text.replace("\n", "\\n"))
        (run.path / "sample.txt").write_text(text + "\n")
    except Exception as error:  # the run is complete all the same
        log.warning("sample  could not be made: %s: %s", type(error).__name__, error)
