"""What happens between the process group and the first step: owner, inputs, resume, announce."""

import argparse
import logging
import os
from pathlib import Path

from trainstack import distributed
from trainstack.checkpoint import names
from trainstack.checkpoint.load import newest_whole, read_optimizer
from trainstack.config.schema import Config
from trainstack.data import order
from trainstack.data.corpus import Corpus
from trainstack.distributed import World
from trainstack.errors import ConfigError
from trainstack.optim import adamw
from trainstack.resilience.guard import Guard
from trainstack.resilience.stop import Stop
from trainstack.run.folder import RunFolder
from trainstack.run.identity import check_identity, identity
from trainstack.run.lease import Lease, Owner
from trainstack.run.states import CONTINUES, RUNNING
from trainstack.storage import files
from trainstack.train.state import Resumed

log = logging.getLogger("trainstack")
FIRST_SAVE_RATE = 200e6  # bytes per second


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
    _, saved = names.newest_identity(run.checkpoints)
    if saved:
        check_identity(saved, identity(config, corpus.key), run.path.name)


def find_checkpoint(run: RunFolder, config: Config, corpus: Corpus) -> Path | None:
    """The newest checkpoint that verifies and belongs to this configuration."""
    newest = newest_whole(run.checkpoints)
    if newest:
        saved = names.read_state(newest)["identity"]
        check_identity(saved, identity(config, corpus.key), run.path.name)
    return newest


def restore(newest: Path | None, causal_lm, optimizer, scaler, guard: Guard) -> Resumed:
    """Put a checkpoint's state back, and say where it was; the model has its weights already."""
    if newest is None:
        return Resumed()
    state = names.read_state(newest)
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
    state = names.read_state(newest)
    whole = [*state.get("left_out", []), *(w for w in known if w["after"] >= state["step"])]
    if whole != known:
        log.warning("resume  left_out.json did not agree with %s and was mended", newest.name)
        run.set_left_out(whole)
    return whole


def expected_save_seconds(run: RunFolder, parameters: int) -> float:
    """What the last save of this run took; before there was one, a guess from the size."""
    saved = [e["save_seconds"] for e in run.events() if e["event"] == "checkpoint"]
    return saved[-1] if saved else 1 + parameters * 12 / FIRST_SAVE_RATE
