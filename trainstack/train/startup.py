"""What happens between the process group and the first step: owner, inputs, resume, announce."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from trainstack import distributed
from trainstack.checkpoint.saver import Saver, newest_whole, read_optimizer
from trainstack.config.load import BatchPlan, Config, check_identity
from trainstack.data import order
from trainstack.data.store import Corpus, identity
from trainstack.distributed import World
from trainstack.errors import ConfigError
from trainstack.model.causal_lm import describe
from trainstack.optim import adamw
from trainstack.resilience.faults import Faults
from trainstack.resilience.guard import Guard
from trainstack.resilience.stop import Stop
from trainstack.resilience.watchdog import START_SECONDS, Watchdog
from trainstack.run.environment import changed_settings
from trainstack.run.folder import CONTINUES, EXIT_CODES, RUNNING, Lease, Owner, RunFolder
from trainstack.storage import files, layout

log = logging.getLogger("trainstack")
FIRST_SAVE_RATE = 200e6  # bytes per second
MAY_COMPILE = 2  # steps of a life at each place
PLACES = ("the start", "samples", "gradients", "update", "evaluation", "save", "the end")


@dataclass
class Parts:
    """What the loop works with; built once, in the order of train.py's main."""

    config: Config
    world: World
    plan: BatchPlan
    run: RunFolder
    lease: Lease
    owner: Owner
    max_steps: int
    corpus: Corpus
    causal_lm: torch.nn.Module
    ddp: torch.nn.parallel.DistributedDataParallel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    guard: Guard
    sampler: order.StepSampler
    saver: Saver
    small_files: dict[str, bytes]
    stop: Stop
    watch: "Watch"
    faults: Faults


@dataclass
class Resumed:
    """Where a run goes on: step 0 and no checkpoint where it begins."""

    step: int = 0
    checkpoint: Path | None = None
    is_evaluated: bool = True  # whether the evaluation due at this step was made
    skips_in_a_row: int = 0
    drawn: list[int] | None = None  # sequences of each data set of a mixture


class Watch:
    """The watchdog as the loop speaks with it: a step and the name of a place."""

    def __init__(self, run: RunFolder, options: argparse.Namespace, rank: int, seconds):
        self.position = [0, 0]
        self._steps: dict[str, set[int]] = {}  # of this life, by place; the first few only

        def account(place: str, stalled: float) -> None:
            cause = f"no progress for {stalled:.0f} s at {place}"
            log.error("HANG    %s; stacks: %s", cause, stacks)
            run.add_failure(
                options.job, options.attempt, rank, "HANG", EXIT_CODES["HANG"], cause, False,
                position=self.position,
            )  # fmt: skip

        stacks = run.stacks_file(options.job, options.attempt, rank)
        self.dog = Watchdog(seconds, stacks, account, EXIT_CODES["HANG"])

    def at(self, step: int, place: str, extra_seconds: float = 0) -> None:
        """Say where the loop is. The first two steps and the first evaluations may compile."""
        steps = self._steps.setdefault(place, {step})
        if len(steps) <= MAY_COMPILE:
            steps.add(step)
        if len(steps) <= MAY_COMPILE:
            extra_seconds = max(extra_seconds, START_SECONDS)
        self.position = [step, PLACES.index(place)]
        self.dog.at(f"step {step:,}, {place}", extra_seconds)


def own_run_folder(
    run: RunFolder,
    options: argparse.Namespace,
    config: Config,
    corpus: Corpus,
    world: World,
) -> tuple[Owner, Lease]:
    """Make this life the owner of the run folder. Collective: every rank must call this.

    Refused where another job owns it, or where it is another experiment's; nothing of it is changed
    then.
    """
    lease = Lease(run.path)
    job = options.job or f"local-{os.uname().nodename}-{os.getpid()}"
    owner = Owner(job, options.attempt, options.restarts)

    def take() -> tuple[Owner, int]:
        check_same_experiment(run, config, corpus)
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


def check_same_experiment(run: RunFolder, config: Config, corpus: Corpus) -> None:
    """Refused where the run's newest readable checkpoint was made with another identity."""
    _, saved = layout.newest_identity(run.checkpoints)
    if saved:
        check_identity(saved, identity(config, corpus.key), run.path.name)


def find_checkpoint(run: RunFolder, config: Config, corpus: Corpus) -> Path | None:
    """The newest checkpoint that verifies and belongs to this configuration."""
    newest = newest_whole(run.checkpoints)
    if newest:
        saved = layout.read_state(newest)["identity"]
        check_identity(saved, identity(config, corpus.key), run.path.name)
    return newest


def restore(newest: Path | None, causal_lm, optimizer, scaler, guard: Guard) -> Resumed:
    """Put a checkpoint's state back, and say where it was; the model has its weights already."""
    if newest is None:
        return Resumed()
    state = layout.read_state(newest)
    stored = read_optimizer(newest)
    adamw.restore_optimizer(causal_lm, optimizer, stored, state["updates"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    guard.restore(state.get("guard"))
    return Resumed(
        state["step"], newest, state.get("is_evaluated", True), state.get("skips_in_a_row", 0),
        state.get("drawn"),
    )  # fmt: skip


def build_sampler(
    config: Config,
    corpus: Corpus,
    world: World,
    resumed: Resumed,
    left_out: list[dict[str, int]],
) -> order.StepSampler:
    """The samples of this rank from the step on that the run goes on from."""
    weights = [section.weight for section in config.data.sources]
    seed = config.run.seed
    return order.StepSampler(
        corpus.train.num_samples, config.train.global_batch_size, world.rank, world.world_size,
        seed, resumed.step, left_out, order.mixture_of(corpus.sizes, weights, seed),
    )  # fmt: skip


def pause_early(run: RunFolder, owner: Owner, lease: Lease, stop: Stop, world: World) -> str:
    """Leave before anything was loaded: the job was asked to end, and nothing is lost."""
    if world.is_main:
        cause = f"{stop.reason or 'another rank was asked to stop'}, before training began"
        run.pause(owner.job, owner.attempt, cause)
        lease.release()
        log.info("%s: PAUSED (%s); nothing was lost; %s", run.path.name, cause, CONTINUES)
    return "PAUSED"


def windows(run: RunFolder, newest: Path | None) -> list[dict[str, int]]:
    """What rollbacks left out; what the checkpoint was trained with wins over the run's file."""
    known = run.left_out()
    if newest is None:
        return known
    state = layout.read_state(newest)
    whole = [*state.get("left_out", []), *(w for w in known if w["after"] >= state["step"])]
    if whole != known:
        log.warning("resume  left_out.json did not agree with %s and was mended", newest.name)
        run.set_left_out(whole)
    return whole


def expected_save_seconds(run: RunFolder, parameters: int) -> float:
    """What the last save of this run took; before there was one, a guess from the size."""
    saved = [e["save_seconds"] for e in run.events() if e["event"] == "checkpoint"]
    return saved[-1] if saved else 1 + parameters * 12 / FIRST_SAVE_RATE


def announce(parts: Parts, resumed: Resumed) -> None:
    """Say what is about to happen, with every number that decides it; rank 0 only."""
    if not parts.world.is_main:
        return
    config, plan, world = parts.config, parts.plan, parts.world
    name, indent = config.run.name, " " * len(config.run.name)
    hosts = world.world_size // world.local_world_size
    log.info(
        "%s  %s | %d host%s x %d processes, %s, %s | seq_len %d",
        name, describe(parts.causal_lm, config.model.init), hosts, "s"[: hosts != 1],
        world.local_world_size, world.backend, config.train.precision, plan.seq_len,
    )  # fmt: skip
    epochs = parts.max_steps * plan.global_batch_size / parts.sampler.total_samples
    log.info("%s  %s", indent, plan)
    log.info("%s  %s steps = %.2f epochs", indent, f"{parts.max_steps:,}", epochs)
    if config.train.max_steps is not None:
        log.info("%s  train.num_train_epochs is not used: max_steps decides", indent)
    announce_mixture(parts)
    if not any(store.eval.num_samples for store in parts.corpus.stores.values()):
        log.info("%s  no held-out documents: there will be no evaluation", indent)
    if config.guard.on_divergence != "stop" and config.train.precision == "fp16":
        log.info("%s  guard.spike_sigma is not used: fp16 leaves skipping to its scaler", indent)
    if config.checkpoint.failure_hours and config.checkpoint.save_steps != "auto":
        log.info("%s  checkpoint.failure_hours is not used: save_steps is a number", indent)
    for window in parts.sampler.left_out:
        log.info("%s  %s steps of data after step %s are left out, since a rollback", indent,
                 f"{window['steps']:,}", f"{window['after']:,}")  # fmt: skip
    if resumed.checkpoint:
        announce_resume(parts, resumed)


def announce_mixture(parts: Parts) -> None:
    """Of each data set of a mixture, how much of what is learned comes from it."""
    sections, sizes = parts.config.data.sources, parts.corpus.sizes
    indent = " " * len(parts.config.run.name)
    if len(sections) == 1:
        return
    drawn = parts.max_steps * parts.plan.global_batch_size
    weights = [section.weight or size for section, size in zip(sections, sizes, strict=True)]
    for section, size, weight in zip(sections, sizes, weights, strict=True):
        share = weight / sum(weights)
        is_held = parts.corpus.stores[section.label].eval.num_samples
        log.info("%s  %5.1f%% from %s: %s samples, %.2f epochs of it%s", indent, 100 * share,
                 section.label, f"{size:,}", share * drawn / size,
                 "" if is_held else "; none of it is held out")  # fmt: skip


def announce_resume(parts: Parts, resumed: Resumed) -> None:
    newest = resumed.checkpoint
    log.info(
        "resume  attempt %d from %s: the same samples follow, none repeated, none skipped",
        parts.owner.attempt, newest.name,
    )  # fmt: skip
    saved = layout.read_state(newest)
    changes = changed_settings(saved["settings"], parts.config.model_dump())
    if saved["world_size"] != parts.world.world_size:
        changes.append(f"processes: {saved['world_size']} -> {parts.world.world_size}")
    for change in changes:
        log.info("resume  %s", change)
    parts.run.add_event("resume", step=resumed.step, checkpoint=newest.name, changes=changes)
