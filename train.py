"""Train a language model: config -> process group -> DDP model, sampler, checkpoints -> the loop.

Started once per GPU by torchrun (see train.slurm); ``python train.py --config config.yaml`` is a
world of one. Everything durable goes to the run folder; the same command again continues the run.
"""

import argparse
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainstack import checkpoint, data, distributed, files, model, optim, places, tokens, training
from trainstack.config import (
    IGNORED_LABEL,
    BatchPlan,
    Config,
    ConfigError,
    batch_plan,
    check_identity,
    load,
    steps_for,
)
from trainstack.distributed import World
from trainstack.environment import changed_settings
from trainstack.metrics import HEADER, Metrics, duration
from trainstack.runfolder import EXIT_CODES, RUNNING, Lease, Owner, RunFolder
from trainstack.stop import Stop

log = logging.getLogger("trainstack")
STATES = {code: state for state, code in EXIT_CODES.items()}


class Diverged(Exception):
    """Loss or gradient norm is not finite; nothing of it was saved."""


@dataclass
class Parts:
    """What the loop works with; built once, in the order of main."""

    config: Config
    world: World
    plan: BatchPlan
    run: RunFolder
    lease: Lease
    owner: Owner
    max_steps: int
    store: tokens.TokenStore
    causal_lm: torch.nn.Module
    ddp: torch.nn.parallel.DistributedDataParallel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    sampler: data.StepSampler
    stop: Stop
    small_files: dict[str, bytes]


def main(options: argparse.Namespace, config: Config) -> str:
    """Build everything, train, and return the state in which the run was left."""
    world = distributed.start(options.expect_world_size)
    plan = batch_plan(config, world.world_size)
    run = RunFolder(places.run_folder(options.home, config.run.name))
    owner, lease = own_run_folder(run, options, config, world)

    model_folder, store = open_inputs(options.home, config)
    num_samples = tokens.enough_samples(config, store)
    max_steps = steps_for(config, num_samples)

    newest = distributed.main_decides(world, lambda: find_checkpoint(run, config, store))
    init = "pretrained" if newest else config.model.init
    causal_lm = model.build_causal_lm(
        newest or model_folder, init, config.model, config.train.precision, config.run.seed
    )
    loss_model = model.CausalLMLoss(causal_lm, config.train, world.device)
    ddp = model.wrap_ddp(loss_model, world)
    optimizer = optim.build_optimizer(causal_lm, config.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
    step = restore(newest, causal_lm, optimizer, scaler) if newest else 0
    sampler = data.StepSampler(
        num_samples,
        config.train.global_batch_size,
        world.rank,
        world.world_size,
        config.run.seed,
        first_step=step,
    )
    stop = Stop(options.stop_file, options.ends_at, world.is_main)
    small_files = checkpoint.small_files(causal_lm, model_folder)
    parts = Parts(
        config, world, plan, run, lease, owner, max_steps, store, causal_lm, ddp, optimizer,
        scaler, sampler, stop, small_files,
    )  # fmt: skip
    if world.is_main:
        run.set_status(RUNNING, step=step, max_steps=max_steps)
    announce(parts, step, newest)
    return train(parts, step)


def train(parts: Parts, step: int) -> str:
    """The loop: from a step that is done to max_steps, or to a stop. Returns DONE or PAUSED."""
    config, world, max_steps = parts.config, parts.world, parts.max_steps
    rate_at = optim.build_schedule(config.optim, max_steps)
    numbers, pace = training.StepNumbers(world.device), training.Pace()
    report = Report(parts, step, rate_at, pace)
    started = time.monotonic()
    training.warm_up(parts.ddp, batches_at(parts, min(step, max_steps - 1)))
    pace.restart()
    is_stopping = False
    while step < max_steps and not is_stopping:
        step += 1
        distributed.seed_step(config.run.seed, step, world.rank)
        optim.set_learning_rate(parts.optimizer, rate_at(step))
        loss_sum, grad_norm = training.train_step(
            parts.ddp,
            parts.optimizer,
            parts.scaler,
            pace.timed(batches_at(parts, step - 1)),
            parts.plan,
            parts.plan.tokens_per_step,
            config.optim.max_grad_norm,
        )
        is_stopping |= report.step(numbers.read())  # of the step before
        consumed = data.samples_hash(parts.sampler.samples_at(step - 1))
        wants_stop = parts.stop.is_wanted(pace.step_seconds)
        numbers.send(step, loss_sum, grad_norm, parts.plan.tokens_per_step, wants_stop, consumed)
        is_evaluated = training.is_due(step, config.eval.eval_steps, max_steps)
        is_saved = training.is_due(step, config.checkpoint.save_steps, max_steps)
        if is_evaluated or is_saved or is_stopping:
            is_stopping |= report.step(numbers.read())
        if is_evaluated:
            evaluate(parts, report, step)
        if is_saved or is_stopping:
            save(parts, report, step, is_needed=is_stopping or step == max_steps)
            pace.restart()
    report.close()
    if step < max_steps:
        return leave(parts, "PAUSED", step, started)
    show_sample(parts)
    return leave(parts, "DONE", step, started)


class Report:
    """Turns the numbers of a step into log lines, files and status; rank 0 writes."""

    def __init__(self, parts: Parts, resumed_step: int, rate_at, pace: training.Pace):
        self.parts, self.rate_at, self.pace = parts, rate_at, pace
        self.status_at = 0.0
        self.metrics = None
        if parts.world.is_main:
            attempt = f"{parts.owner.job}.{parts.owner.attempt}"
            report_to = parts.config.log.report_to
            self.metrics = Metrics(parts.run.path, report_to, resumed_step, attempt)
            log.info("%s", HEADER)

    def step(self, result: training.StepResult | None) -> bool:
        """Note one step's numbers; returns whether a rank wants to stop. Raises Diverged."""
        if result is None:
            return False
        parts, config = self.parts, self.parts.config
        is_skipped = parts.scaler.is_enabled() and np.isfinite(result.loss)  # fp16 scaled too far
        if not result.is_finite and not is_skipped:
            raise Diverged(
                f"step {result.step}: loss {result.loss}, gradient norm {result.grad_norm}; lower "
                f"optim.learning_rate={config.optim.learning_rate:g}, or look at the data"
            )
        self.pace.note(result.sent_at)
        if self.metrics:
            self.metrics.note_samples(result.step, result.samples_hash)
        steps = config.log.logging_steps
        if result.step == 1 or training.is_due(result.step, steps, parts.max_steps):
            self._log(result)
        return result.is_stop_wanted

    def _log(self, result: training.StepResult) -> None:
        step_seconds, data_seconds = self.pace.read()
        if self.metrics is None:
            return
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
        self.metrics.log_step(values, parts.max_steps, training.peak_memory_gb(parts.world.device))
        if time.monotonic() - self.status_at > 2:  # seconds; a status is synced to disk
            self.status_at = time.monotonic()
            parts.run.set_status(RUNNING, step=result.step)

    def evaluation(self, step: int, loss: float, counted: int) -> None:
        if self.metrics:
            self.metrics.log_evaluation(step, loss, counted)

    def flush(self) -> None:
        if self.metrics:
            self.metrics.flush()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()


def batches_at(parts: Parts, step: int):
    """This rank's micro batches of one step (from 0)."""
    return data.micro_batches(
        parts.sampler.samples_at(step),
        parts.plan.micro_batch_size,
        lambda indices: tokens.windows(parts.store.train, parts.plan.seq_len, indices),
        parts.world.device,
    )


def evaluate(parts: Parts, report: Report, step: int) -> None:
    """Loss and perplexity over the held-out split. Collective: every rank must call this."""
    seq_len, world = parts.plan.seq_len, parts.world
    rows = -(-(len(parts.store.eval) - 1) // seq_len)
    rows = min(rows, parts.config.eval.eval_samples or rows)
    if rows <= 0:
        return
    batches = data.micro_batches(
        np.arange(world.rank, rows, world.world_size),
        parts.plan.micro_batch_size,
        lambda indices: np.concatenate(
            [data.held_out_row(parts.store.eval, seq_len, index) for index in indices]
        ),
        world.device,
    )
    loss, counted = training.evaluate(parts.ddp.module, batches, IGNORED_LABEL, world)
    report.evaluation(step, loss, counted)
    report.pace.restart()


def save(parts: Parts, report: Report, step: int, is_needed: bool) -> None:
    """Publish checkpoint-<step>. Collective: every rank must call this.

    A save that fails is an error only where it ``is_needed``; else training goes on and the next
    one is tried.
    """
    started = time.monotonic()
    snapshot = checkpoint.Snapshot(
        step,
        model.saved_weights(parts.causal_lm),
        optim.optimizer_tensors(parts.causal_lm, parts.optimizer),
        {
            "step": step,
            "updates": optim.updates_done(parts.optimizer),
            "samples_seen": step * parts.plan.global_batch_size,
            "tokens_seen": step * parts.plan.tokens_per_step,
            "identity": tokens.identity(parts.config, parts.store.folder.name),
            "settings": parts.config.model_dump(),
            "scaler": parts.scaler.state_dict(),
            "world_size": parts.world.world_size,
            "torch": torch.__version__,
        },
        parts.small_files,
    )
    keep = parts.config.checkpoint.save_total_limit
    attempt = f"{parts.owner.job}.{parts.owner.attempt}"
    try:
        path = checkpoint.save(
            parts.run.checkpoints, snapshot, parts.world, keep, attempt, parts.lease.check
        )
    except checkpoint.SaveError as error:
        if is_needed:
            raise
        if parts.world.is_main:
            log.error("save    step %s failed: %s; training goes on", f"{step:,}", error)
            parts.run.add_event("save_failed", step=step, cause=str(error))
        return
    parts.stop.save_seconds = time.monotonic() - started
    report.flush()  # a checkpoint's steps are never without their hashes
    if parts.world.is_main:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9
        seconds = parts.stop.save_seconds
        log.info("saved   %s (%.2f GB, %.1f s)", path.name, size, seconds)
        parts.run.set_status(RUNNING, step=step, checkpoint=path.name, checkpoint_at=time.time())
        parts.run.add_event("checkpoint", step=step, save_seconds=round(seconds, 3))


def show_sample(parts: Parts) -> None:
    """Print what the trained model says; rank 0 generates, the others have nothing left to do."""
    section = parts.config.eval
    if not parts.world.is_main or section.sample_prompt is None:
        return
    from transformers import AutoTokenizer

    newest = places.checkpoints(parts.run.checkpoints)[0][1]
    tokenizer = AutoTokenizer.from_pretrained(newest, local_files_only=True)
    text = training.generate_text(
        parts.causal_lm, tokenizer, section.sample_prompt, section.sample_tokens,
        parts.config.run.seed,
    )  # fmt: skip
    log.info("sample  %s", text.replace("\n", "\\n"))
    (parts.run.path / "sample.txt").write_text(text + "\n")


def leave(parts: Parts, state: str, step: int, started: float) -> str:
    """Record how the run was left, durably, and say what to do next."""
    if parts.world.is_main:
        name, newest = parts.run.path.name, places.checkpoints(parts.run.checkpoints)[0][1]
        taken = duration(time.monotonic() - started)
        done = state == "DONE"
        cause = None if done else parts.stop.reason or "another rank was asked to stop"
        action = f"bash monitor.sh {name}" if done else "the same command continues it"
        parts.run.set_status(
            state, step=step, exit_code=EXIT_CODES[state], cause=cause, next_action=action
        )
        parts.run.add_event(state.lower(), step=step, cause=cause)
        parts.lease.release()
        if done:
            log.info(
                "%s: DONE at step %s after %s. Checkpoint: %s", name, f"{step:,}", taken, newest
            )
            log.info("      look: bash monitor.sh %s", name)
            log.info('      use:  AutoModelForCausalLM.from_pretrained("%s")', newest)
        else:
            log.info("%s: PAUSED at step %s (%s); %s", name, f"{step:,}", cause, action)
    return state


def own_run_folder(
    run: RunFolder, options: argparse.Namespace, config: Config, world: World
) -> tuple[Owner, Lease]:
    """Make this life the owner of the run folder. Collective: every rank must call this."""
    lease = Lease(run.path)
    owner = Owner(options.job or f"local-{os.uname().nodename}-{os.getpid()}", options.attempt)

    def take() -> tuple[Owner, int]:
        run.create()
        lease.take(owner, options.gone)
        path = run.path / "config.yaml"
        if not path.exists() or path.read_text() != config.to_yaml():
            files.replace_file(path, config.to_yaml().encode())
        return owner, lease.epoch

    owner, epoch = distributed.main_decides(world, take)
    log_file = run.logs / f"{owner.job}.{owner.attempt}.rank{world.rank}.log"
    seen = distributed.gather((run.has_lease(epoch), *distributed.introduce(world)))
    blind = sorted({host for is_visible, host, _ in seen if not is_visible})
    if blind:
        raise ConfigError(
            f"{run.path} is not visible from {', '.join(blind)}; SHARED_DIR must lie on a file "
            "system that all nodes share"
        )
    distributed.start_logging(world, log_file)
    if world.is_main:
        run.set_status(
            RUNNING, job=owner.job, attempt=owner.attempt, host=os.uname().nodename,
            pid=os.getpid(), exit_code=None, cause=None, next_action=None,
            nodes=sorted({host for _, host, _ in seen}),
        )  # fmt: skip
        lines = [line for _, _, line in seen]
        run.add_event("start", job=owner.job, attempt=owner.attempt, ranks=lines)
        for line in lines:
            log.info("%s", line)
    return owner, lease


def open_inputs(home: Path, config: Config) -> tuple[Path, tokens.TokenStore]:
    """The model folder and the token store that the configuration names."""
    model_folder = places.model_folder(home, config.model.name)
    dataset_folder = places.dataset_folder(home, config.data.name, config.data.subset)
    settings = tokens.store_settings(config.data)
    try:
        key = tokens.store_key(model_folder, dataset_folder, settings)
        return model_folder, tokens.TokenStore(home / "tokens" / key)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.model.name} or the tokens of {config.data.name} are not ready "
            f"({error}); run: bash download_data_model.sh"
        ) from None


def find_checkpoint(run: RunFolder, config: Config, store: tokens.TokenStore) -> Path | None:
    """The newest checkpoint that verifies and belongs to this configuration."""
    newest = checkpoint.newest_whole(run.checkpoints)
    if newest:
        saved = places.read_state(newest)["identity"]
        check_identity(saved, tokens.identity(config, store.folder.name), run.path.name)
    return newest


def restore(newest: Path, causal_lm, optimizer, scaler) -> int:
    """Put a checkpoint's optimizer state back, and return its step; the model has its weights."""
    state = places.read_state(newest)
    stored = checkpoint.read_optimizer(newest)
    optim.restore_optimizer(causal_lm, optimizer, stored, state["updates"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return state["step"]


def announce(parts: Parts, step: int, newest: Path | None) -> None:
    """Say what is about to happen, with every number that decides it; rank 0 only."""
    if not parts.world.is_main:
        return
    config, plan, world = parts.config, parts.plan, parts.world
    name = config.run.name
    hosts = world.world_size // world.local_world_size
    log.info(
        "%s  %s | %d host%s x %d processes, %s, %s | seq_len %d",
        name, model.describe(parts.causal_lm, config.model.init), hosts, "s"[: hosts != 1],
        world.local_world_size, world.backend, config.train.precision, plan.seq_len,
    )  # fmt: skip
    total = parts.max_steps * plan.global_batch_size
    epochs = total / parts.sampler.total_samples
    log.info("%s  %s", " " * len(name), plan)
    log.info("%s  %s steps = %.2f epochs", " " * len(name), f"{parts.max_steps:,}", epochs)
    if config.train.max_steps is not None:
        log.info("%s  train.num_train_epochs is not used: max_steps decides", " " * len(name))
    if len(parts.store.eval) < 2:
        log.info("%s  no held-out documents: there will be no evaluation", " " * len(name))
    if newest:
        log.info(
            "resume  attempt %d from %s: the same samples follow, none repeated, none skipped",
            parts.owner.attempt, newest.name,
        )  # fmt: skip
        changes = changed_settings(places.read_state(newest)["settings"], config.model_dump())
        for change in changes:
            log.info("resume  %s", change)
        parts.run.add_event("resume", step=step, checkpoint=newest.name, changes=changes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.environ.get("TRAINSTACK_HOME")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--home", type=Path, default=home, help="$SHARED_DIR/$PROJECT_NAME; env.sh sets it"
    )
    parser.add_argument("--job", help="id of the Slurm job; default: this process")
    parser.add_argument("--attempt", type=int, default=1, help="which life of the job this is")
    parser.add_argument("--gone", help="a job that Slurm says has ended: its lease is taken over")
    parser.add_argument("--expect-world-size", type=int, metavar="N")
    parser.add_argument("--stop-file", type=Path, help="when it appears: save and stop")
    parser.add_argument("--ends-at", type=float, help="end of the job, seconds since 1970")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.home is None:
        parser.error("the project's folder is not known; run: source env.sh (or pass --home)")
    return options


def guarded_main() -> None:
    """Run main; what goes wrong becomes a record, a line and an exit code, never a hang."""
    options = parse_arguments()
    distributed.die_with_parent()
    is_main = distributed.rank_of_process() == 0
    run = None
    try:
        config = load(options.config, options.overrides)
        run = RunFolder(places.run_folder(options.home, config.run.name))
        state = main(options, config)
        # All leave together, and at once: taking a process group apart while a peer is already
        # gone aborts now and then (seen with gloo, torch 2.13).
        distributed.gather(None)
        code = EXIT_CODES[state] if options.job is None else 0
    except ConfigError as error:
        if is_main:
            print(error.report("train.py"), file=sys.stderr, flush=True)
            record_failure(
                run, options, STATES.get(error.code, "FAILED"), error.code, " ".join(error.problems)
            )
        code = error.code
    except Diverged as error:
        if is_main:
            log.error("DIVERGED at %s", error)
            record_failure(run, options, "DIVERGED", EXIT_CODES["DIVERGED"], str(error))
        code = EXIT_CODES["DIVERGED"]
    except BaseException as error:
        text = traceback.format_exc()
        log.error("%s", text)
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        is_victim = distributed.is_peer_lost(error)
        record_failure(run, options, "FAILED", 1, cause, is_victim=is_victim)
        if is_victim:
            time.sleep(distributed.PEER_LOST_SECONDS)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # in order it could wait for ever, on a collective that nobody answers


def record_failure(
    run: RunFolder | None, options: argparse.Namespace, state: str, code: int, cause: str,
    is_victim: bool = False,
) -> None:  # fmt: skip
    """Leave this rank's account of the failure for the job's shell, which decides the blame."""
    if run is None or not run.path.is_dir():
        return
    rank = distributed.rank_of_process()
    run.add_failure(options.job, options.attempt, rank, state, code, cause, is_victim)


if __name__ == "__main__":
    guarded_main()
