"""Train a language model: config -> process group -> DDP model, sampler, checkpoints -> the loop.

Started once per GPU by torchrun (see train.slurm); ``python train.py --config config.yaml`` is a
world of one. Everything durable goes to the run folder; the same command again continues the run.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from trainstack import distributed
from trainstack.checkpoint import names
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import SaveError, Snapshot, small_files
from trainstack.config.batch import IGNORED_LABEL, batch_plan, steps_for
from trainstack.config.load import load
from trainstack.data import feed, order
from trainstack.data.corpus import enough_samples, open_corpus
from trainstack.data.split import Split
from trainstack.distributed import is_agreed
from trainstack.model.causal_lm import build_causal_lm, count_parameters, saved_weights
from trainstack.model.ddp import compute_gradients, update, warm_up, wrap_ddp
from trainstack.model.loss import CausalLMLoss
from trainstack.optim import adamw, schedule
from trainstack.resilience.failure import explain
from trainstack.resilience.faults import Faults, parse
from trainstack.resilience.guard import Diverged, Guard, withhold
from trainstack.resilience.stop import Stop
from trainstack.resilience.watchdog import SAVE_SECONDS, START_SECONDS, Watch
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.run.states import CONTINUES, EXIT_CODES, RUNNING
from trainstack.storage import layout
from trainstack.train import announce, startup
from trainstack.train import evaluate as evaluation
from trainstack.train.numbers import Pace, StepNumbers, is_due
from trainstack.train.report import Report
from trainstack.train.state import Parts, Resumed
from trainstack.units import duration

log = logging.getLogger("trainstack")


def main(options: argparse.Namespace, config) -> str:
    """Build everything, train, and return the state in which the run was left."""
    world = distributed.start(options.expect_world_size)
    plan = batch_plan(config, world.world_size)
    run = RunFolder(layout.run_folder(options.home, config.run.name))
    corpus = open_corpus(options.home, config)
    model_folder = layout.model_folder(options.home, config.model.name)
    owner, lease = startup.own_run_folder(run, options, config, corpus, world)
    stop = Stop(options.stop_file, options.ends_at, world.is_main)
    if is_agreed(stop.is_wanted(0), world):  # loading may take longer than is left
        return startup.pause_early(run, owner, lease, stop, world)
    watch = Watch(run, options, world.rank, config.guard.hang_seconds)
    faults = Faults(parse(options.fault), world.rank, owner.attempt)

    max_steps = steps_for(config, enough_samples(config, corpus))

    newest = distributed.main_decides(world, lambda: startup.find_checkpoint(run, config, corpus))
    init = "pretrained" if newest else config.model.init
    causal_lm = build_causal_lm(
        newest or model_folder, init, config.model, config.train.precision, config.run.seed
    )
    loss_model = CausalLMLoss(causal_lm, config.train, world.device, config.data.packing)
    faults.attach(loss_model)
    ddp = wrap_ddp(loss_model, world)
    optimizer = adamw.build_optimizer(causal_lm, config.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
    guard = Guard(config.guard, world.device, scaler.is_enabled())
    resumed = startup.restore(newest, causal_lm, optimizer, scaler, guard)
    left_out = distributed.main_decides(world, lambda: startup.windows(run, newest))
    sampler = startup.build_sampler(config, corpus, world, resumed, left_out)
    attempt = f"{owner.job}.{owner.attempt}"
    keep = config.checkpoint.save_total_limit
    saver = Saver(run.checkpoints, world, keep, attempt, lease.check)
    beside = small_files(causal_lm, model_folder)
    parts = Parts(
        config, world, plan, run, lease, owner, max_steps, corpus, causal_lm, ddp, optimizer,
        scaler, guard, sampler, saver, beside, stop, watch, faults,
    )  # fmt: skip
    if world.is_main:
        lease.check()  # loading takes a while
        stop.save_seconds = startup.expected_save_seconds(run, count_parameters(causal_lm))
        run.set_status(RUNNING, step=resumed.step, max_steps=max_steps)
    announce.announce(parts, resumed)
    with settled(parts):
        return train(parts, resumed)


def train(parts: Parts, resumed: Resumed) -> str:
    """The loop: from a step that is done to max_steps, or to a stop. Returns DONE or PAUSED."""
    config, max_steps, step = parts.config, parts.max_steps, resumed.step
    numbers, pace = StepNumbers(parts.world.device), Pace()
    report = Report(parts, resumed, schedule.build_schedule(config.optim, max_steps), pace)
    started = time.monotonic()
    samples = parts.sampler.samples_at(min(step, max_steps - 1))
    warm_up(parts.ddp, batches_of(parts, samples))
    # Asked to while it was starting? And was the stop before this life in an evaluation?
    is_stopping = is_agreed(parts.stop.is_wanted(0), parts.world)
    is_evaluated = resumed.is_evaluated or (not is_stopping and evaluate(parts, report, step))
    is_stopping |= not is_evaluated
    report.begins(step)
    while step < max_steps and not is_stopping:
        step += 1
        is_stopping, is_saving = take_step(parts, report, numbers, step)
        is_saving |= is_due(step, config.checkpoint.save_steps, max_steps)
        is_evaluation_due = is_due(step, config.eval.eval_steps, max_steps)
        if is_evaluation_due or is_saving or is_stopping:
            is_stopping |= report.step(numbers.read())[0]
        is_evaluated = not is_evaluation_due or evaluate(parts, report, step)
        is_stopping |= not is_evaluated
        if is_saving or is_stopping:
            save(parts, report, step, is_evaluated)
            pace.restart()
    if step > resumed.step:  # without the last save the end would not be durable
        finish_save(parts, report, step)
    report.close()
    if step < max_steps or not is_evaluated:
        return leave(parts, "PAUSED", step, started)
    parts.watch.at(step, "the end", START_SECONDS)
    try:
        show_sample(parts)
    except Exception as error:  # the run is complete all the same
        log.warning("sample  could not be made: %s: %s", type(error).__name__, error)
    return leave(parts, "DONE", step, started)


def take_step(parts: Parts, report: Report, numbers: StepNumbers, step: int) -> tuple[bool, bool]:
    """One optimizer update; whether a rank wanted to stop, and to save, as of the step before."""
    report.must_own()
    parts.watch.at(step, "samples")
    parts.faults.before(step)
    distributed.seed_step(parts.config.run.seed, step, parts.world.rank)
    adamw.set_learning_rate(parts.optimizer, report.rate_at(step))
    samples = parts.sampler.samples_at(step - 1)
    target_tokens = target_tokens_at(parts, step - 1)
    loss_sum, grad_norm = compute_gradients(
        parts.ddp,
        parts.optimizer,
        parts.scaler,
        watched(parts, step, report.pace.timed(batches_of(parts, samples))),
        parts.plan,
        target_tokens,
    )
    wishes_before = report.step(numbers.read())
    report.draws(step - 1)  # after the line of the step before
    saves = 1 + parts.saver.is_busy
    step_seconds = max(report.pace.step_seconds, parts.watch.dog.median_seconds())
    is_bad = numbers.send(
        step,
        loss_sum,
        grad_norm,
        target_tokens,
        (parts.stop.is_wanted(step_seconds, saves), report.wants_save()),
        order.samples_hash(samples),
        parts.guard.judge,
    )
    parts.watch.at(step, "update")
    withhold(parts.optimizer, is_bad)
    report.stalled(parts.saver.before_update())
    max_grad_norm = parts.config.optim.max_grad_norm
    update(parts.ddp, parts.optimizer, parts.scaler, grad_norm, max_grad_norm)
    report.saved(parts.saver.poll())
    return wishes_before


def batches_of(parts: Parts, samples: np.ndarray):
    """The micro batches of this rank's samples of one step."""
    return feed.micro_batches(
        samples,
        parts.plan.micro_batch_size,
        parts.corpus.train.read,
        parts.world.device,
    )


def target_tokens_at(parts: Parts, step: int) -> int:
    """Targets of one step (from 0) over all ranks; any rank knows them, so nothing is sent."""
    if parts.corpus.train.is_full:
        return parts.plan.tokens_per_step
    targets = parts.corpus.train.target_tokens(parts.sampler.all_samples_at(step))
    return max(1, targets)  # a step may have none: its loss and gradient are zero


def watched(parts: Parts, step: int, batches):
    """The same batches; the watchdog knows whether one is awaited or used."""
    while True:
        parts.watch.at(step, "samples")
        batch = next(batches, None)
        parts.watch.at(step, "gradients")
        if batch is None:
            return
        yield batch


def evaluate(parts: Parts, report: Report, step: int) -> bool:
    """Loss and perplexity over what is held out; False where it was broken off, to stop.

    Collective: every rank must call this.
    """
    started, results = time.monotonic(), {}
    for label, store in parts.corpus.stores.items():
        if store.eval.num_samples:
            results[label] = evaluate_one(parts, store.eval, step)
            if results[label] is None:
                report.pace.restart()
                return False
    if results:
        report.evaluation(step, results, time.monotonic() - started)
        report.pace.restart()
    return True


def evaluate_one(parts: Parts, held_out: Split, step: int) -> tuple[float, int] | None:
    """Mean loss over one data set's held-out targets, and their number; None if broken off."""
    world = parts.world
    rows = min(held_out.num_samples, parts.config.eval.eval_samples or held_out.num_samples)
    batches = feed.micro_batches(
        np.arange(world.rank, rows, world.world_size),
        parts.plan.micro_batch_size,
        held_out.read,
        world.device,
    )
    rounds = -(-rows // (world.world_size * parts.plan.micro_batch_size))

    def wants_stop() -> bool:
        parts.watch.at(step, "evaluation")
        return parts.stop.is_wanted(0, 1 + parts.saver.is_busy)

    return evaluate(parts.ddp.module, batches, rounds, IGNORED_LABEL, world, wants_stop)


def save(parts: Parts, report: Report, step: int, is_evaluated: bool) -> None:
    """Begin to publish checkpoint-<step>. Collective: every rank must call this."""
    started = time.monotonic()
    parts.watch.at(step, "save", SAVE_SECONDS)
    finish_save(parts, report, step)  # of the checkpoint before
    report.saving()
    snapshot = Snapshot(
        step,
        saved_weights(parts.causal_lm),
        adamw.optimizer_tensors(parts.causal_lm, parts.optimizer),
        {
            "step": step,
            "updates": adamw.updates_done(parts.optimizer),
            "samples_seen": step * parts.plan.global_batch_size,
            "tokens_seen": step * parts.plan.tokens_per_step,
            "is_evaluated": is_evaluated,
            "skips_in_a_row": report.skips_in_a_row,
            "drawn": None if report.drawn is None else report.drawn.tolist(),
            "left_out": parts.sampler.left_out,
            "identity": identity(parts.config, parts.corpus.key),
            "settings": parts.config.model_dump(),
            "scaler": parts.scaler.state_dict(),
            "guard": parts.guard.state(),
            "world_size": parts.world.world_size,
            "torch": torch.__version__,
        },
        parts.small_files,
        [parts.run.path / "samples.jsonl"],
    )
    parts.saver.start(snapshot)
    report.stalled(time.monotonic() - started)


def finish_save(parts: Parts, report: Report, step: int) -> None:
    """Wait for the save under way; SaveError where it is that of this very step and failed."""
    if not parts.saver.is_busy:
        return
    parts.watch.at(step, "save", SAVE_SECONDS)
    saved = parts.saver.wait()
    if saved.problem is not None and saved.step == step:
        raise SaveError(f"checkpoint-{saved.step} could not be written: {saved.problem}")
    report.saved(saved)


@contextlib.contextmanager
def settled(parts: Parts):
    """Before a run that diverged ends, the save of good steps that is under way does."""
    try:
        yield
    except Diverged as error:
        parts.watch.at(error.step, "save", SAVE_SECONDS)
        parts.saver.wait()
        if parts.world.is_main:
            parts.lease.check()  # a rollback is about to be recorded
        raise
    finally:
        parts.watch.dog.close()


def show_sample(parts: Parts) -> None:
    """Print what the trained model says; rank 0 generates, the others have nothing left to do."""
    section = parts.config.eval
    if not parts.world.is_main or section.sample_prompt is None:
        return
    from transformers import AutoTokenizer

    _, newest = names.newest_checkpoint(parts.run.checkpoints)
    tokenizer = AutoTokenizer.from_pretrained(newest, local_files_only=True)
    text = evaluation.generate_text(
        parts.causal_lm, tokenizer, section.sample_prompt, section.sample_tokens,
        parts.config.run.seed,
    )  # fmt: skip
    log.info("sample  %s", text.replace("\n", "\\n"))
    (parts.run.path / "sample.txt").write_text(text + "\n")


def leave(parts: Parts, state: str, step: int, started: float) -> str:
    """Record how the run was left, durably, and say what to do next."""
    if not parts.world.is_main:
        return state
    run, owner, name = parts.run, parts.owner, parts.run.path.name
    if state == "PAUSED":
        cause = parts.stop.reason or "another rank was asked to stop"
        run.pause(owner.job, owner.attempt, cause, step=step)
        log.info("%s: PAUSED at step %s (%s); %s", name, f"{step:,}", cause, CONTINUES)
    else:
        _, newest = names.newest_checkpoint(run.checkpoints)
        look, taken = f"bash monitor.sh {name}", duration(time.monotonic() - started)
        code = EXIT_CODES[state]
        run.set_status(state, step=step, exit_code=code, cause=None, next_action=look)
        run.add_event("done", step=step, job=owner.job, attempt=owner.attempt)
        log.info("%s: DONE at step %s after %s. Checkpoint: %s", name, f"{step:,}", taken, newest)
        log.info("      look: %s", look)
        log.info('      use:  AutoModelForCausalLM.from_pretrained("%s")', newest)
    parts.lease.release()
    return state


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.environ.get("TRAINSTACK_HOME")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--home", type=Path, default=home, help="$SHARED_DIR/$PROJECT_NAME; env.sh sets it"
    )
    parser.add_argument("--job", help="id of the Slurm job; default: this process")
    parser.add_argument("--attempt", type=int, default=1, help="which life of the job this is")
    parser.add_argument("--restarts", type=int, default=0, help="how often the job was requeued")
    parser.add_argument("--gone", help="a job that Slurm says has ended: its lease is taken over")
    parser.add_argument("--expect-world-size", type=int, metavar="N")
    parser.add_argument("--stop-file", type=Path, help="when it appears: save and stop")
    parser.add_argument("--ends-at", type=float, help="end of the job, seconds since 1970")
    parser.add_argument("--fault", default="", help="break on purpose; see resilience/faults.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.home is None:
        parser.error("the project's folder is not known; run: source env.sh (or pass --home)")
    return options


def guarded_main() -> None:
    """Run main; what goes wrong becomes a record, a line and an exit code, never a hang."""
    options = parse_arguments()
    distributed.die_with_parent()
    run = None
    try:
        config = load(options.config, options.overrides)
        run = RunFolder(layout.run_folder(options.home, config.run.name))
        state = main(options, config)
        # All leave together, and at once: taking a process group apart while a peer is already
        # gone aborts now and then (seen with gloo, torch 2.13).
        distributed.gather(None)
        code = EXIT_CODES[state] if options.job is None else 0
    except BaseException as error:
        code = explain(error, run, options)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # in order it could wait for ever, on a collective that nobody answers


if __name__ == "__main__":
    guarded_main()
