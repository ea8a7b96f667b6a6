"""What happens between the process group and the first step: ownership, checkpoint, state."""

import gc
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainstack import distributed
from trainstack.adapter.base import check_whole
from trainstack.checkpoint import names
from trainstack.checkpoint.interval import Interval, first_save_seconds
from trainstack.checkpoint.load import newest_whole
from trainstack.checkpoint.state import TrainState, read_state
from trainstack.config.schema import Config
from trainstack.data.feed import Batch
from trainstack.distributed import World
from trainstack.errors import ConfigError, Refused, first_words
from trainstack.model.loss import CausalLMLoss
from trainstack.model.strategy import Strategy
from trainstack.optim.optimizer import undecayed_matrices
from trainstack.plan.machine import find_gpu
from trainstack.resilience.guard import Guard
from trainstack.resilience.stop import Stop
from trainstack.resilience.watchdog import Watch
from trainstack.run.folder import RunFolder
from trainstack.run.identity import check_identity
from trainstack.run.lease import Lease, Owner
from trainstack.run.states import RUNNING, Phase
from trainstack.storage import files, layout
from trainstack.train.attempt import Attempt
from trainstack.waits import LOAD_SECONDS

log = logging.getLogger("trainstack")


def name_owner(job: str | None, attempt: int, restarts: int) -> Owner:
    """Who this attempt is; without a job id rank 0's process names it. Collective."""
    by_hand = f"local-{os.uname().nodename}-{os.getpid()}"
    return Owner(job or distributed.from_main(by_hand), attempt, restarts)


def own_run_folder(
    run: RunFolder,
    config: Config,
    identity: dict[str, Any],
    owner: Owner,
    gone: str | None,
    world: World,
) -> Lease:
    """Make this attempt the owner of the run folder. Collective: every rank must call this.

    ``gone``: a job that Slurm says has ended. Refused if another job owns the folder, or if it is
    another experiment's; nothing of it is changed then.
    """
    lease = Lease(run.path)

    def take() -> int:
        _, saved = names.newest_state(run.checkpoints)
        if saved:
            check_identity(saved.identity, identity, run.path.name)
        elif config.run.parent and not names.by_name(run.checkpoints):
            raise ConfigError(
                f"run.branch_from={config.run.branch_from}: submit.sh makes the branch, and did not"
            )
        run.create()
        lease.take(owner, gone)
        path = run.path / "config.yaml"
        if not path.exists() or path.read_text() != config.to_yaml():
            files.replace_file(path, config.to_yaml().encode())
        return lease.number

    number = distributed.main_decides(world, take)
    hosts, lines = meet(run, number, world)
    distributed.start_logging(world, run.rank_log(owner.job, owner.attempt, world.rank))
    if world.is_main:
        run.set_status(
            RUNNING, job=owner.job, attempt=owner.attempt, host=os.uname().nodename,
            pid=os.getpid(), exit_code=None, cause=None, next_action=None, nodes=hosts,
        )  # fmt: skip
        run.add_event("start", job=owner.job, attempt=owner.attempt, ranks=lines)
        for line in lines:
            log.info("%s", line)
    return lease


def meet(run: RunFolder, number: int, world: World) -> tuple[list[str], list[str]]:
    """All hosts by name, and a line of introduction from each rank.

    ConfigError if a host does not see that lease, so not the run folder. Collective.
    """
    seen = distributed.gather((run.has_lease(number), *distributed.introduce(world)))
    blind = sorted({host for is_visible, host, _ in seen if not is_visible})
    if blind:
        raise ConfigError(
            f"{run.path} is not visible from {', '.join(blind)}; SHARED_DIR must be on a file "
            "system that all nodes share"
        )
    return sorted({host for _, host, _ in seen}), [line for _, _, line in seen]


def find_checkpoint(
    run: RunFolder, identity: dict[str, Any], watch: Watch, world: World
) -> Path | None:
    """The newest checkpoint that verifies; Refused if it was made with another identity.

    Collective: rank 0 hashes it, however long that takes: it is no hang while it moves.
    """
    moves = partial(watch.at, 0, Phase.VERIFY, LOAD_SECONDS)

    def find() -> Path | None:
        if "base" in identity:
            model = identity["model.name"]
            check_whole(layout.model_folder(run.path.parents[1], model), model, moves)
        newest = newest_whole(run.checkpoints, moves)
        if newest is None:
            names.check_not_lost(run.checkpoints, run.events())
        else:
            check_identity(read_state(newest).identity, identity, run.path.name)
        return newest

    found = distributed.main_decides(world, find, moves)
    watch.at(0, Phase.LOAD, LOAD_SECONDS)
    return found


def left_out(run: RunFolder, newest: Path | None) -> list[dict[str, int]]:
    """Windows of data that rollbacks left out, as the run's file has them.

    What the checkpoint was trained with wins: a file that does not agree is corrected.
    """
    known = run.left_out()
    if newest is None:
        return known
    state = read_state(newest)
    whole = [*state.left_out, *(w for w in known if w["after"] >= state.step)]
    if whole != known:
        log.warning("resume  left_out.json did not agree with %s and was corrected", newest.name)
        run.set_left_out(whole)
    return whole


def restore(
    newest: Path | None, strategy: Strategy, guard: Guard, at_start: TrainState
) -> TrainState:
    """Where the run is: as the checkpoint has it, else ``at_start``.

    The optimizer and the guard get their state back; the model has its weights already.
    """
    if newest is None:
        return at_start
    state = read_state(newest)
    decays = at_start.settings["optim"]["weight_decay"] and not state.undecayed
    if decays and undecayed_matrices(strategy.causal_lm):
        raise Refused(
            f"{newest} is of a version that let norms of this model decay; resume the run with the "
            "version that began it (its environment.json names the commit), or choose another "
            "run.name"
        )
    strategy.load(newest, state)
    guard.restore(state.guard)
    now, before = at_start.settings, state.settings
    is_branch = (now.get("run", {}).get("branch_from") or "").endswith(f"@{state.step}")
    measures = [part.get("eval", {}).get("eval_samples") for part in (before, now)]
    # What was best in a parent is not here; losses on other samples are no measure either.
    if is_branch or measures[0] != measures[1]:
        state = replace(state, best_step=0, best_loss=None, evaluations_without_better=0)
    if is_branch:  # its first mean is of its own steps
        state = replace(state, loss_sum=0.0, loss_steps=0)
    return replace(state, settings=now, left_out=at_start.left_out)


def remember(state: TrainState, attempt: Attempt, strategy: Strategy, guard: Guard) -> None:
    """Bring up to date what ``restore`` reads and people look at, before the state is saved."""
    state.updates = strategy.optimizer.updates_done()
    state.samples_seen = state.step * attempt.plan.global_batch_size
    state.tokens_seen = state.step * attempt.plan.tokens_per_step
    state.scaler = strategy.scaler.state_dict()
    state.guard = guard.state()
    state.world_size, state.torch = attempt.world.world_size, torch.__version__


def warm_up(strategy: Strategy, batches: Iterator[Batch], world: World) -> bool:
    """Whatever only the first pass does; returns whether a pass draws at random, as by dropout."""
    before = distributed.random_state(world)
    strategy.warm_up(batches)
    gc.collect()
    gc.freeze()  # what is there now stays: no collection within a step looks at it again
    return distributed.random_state(world) != before


def tell_running(attempt: Attempt, step: int, stop: Stop, parameters: int) -> None:
    """Everything is loaded, and this attempt still owns the run: its status says RUNNING.

    ``stop`` learns how long a save is expected to take. Rank 0 only.
    """
    if attempt.world.is_main:
        attempt.lease.check()  # loading takes a while
        guess = first_save_seconds(parameters)
        saved = [e["save_seconds"] for e in attempt.run.events() if e["event"] == "checkpoint"]
        stop.save_seconds = [guess, *saved][-1]  # what the last save of this run took
        attempt.run.set_status(RUNNING, step=step, max_steps=attempt.max_steps)


def ideal_seconds(attempt: Attempt, loss_model: CausalLMLoss) -> float | None:
    """Of a token at the peak rate of all GPUs; None without one, or if one of the two is not known.

    The share of it in the seconds that a token takes is called MFU (PaLM, 2204.02311, appendix B).
    """
    world, config = attempt.world, attempt.config
    if world.device.type != "cuda" or not world.is_main:
        return None
    gpu = find_gpu(torch.cuda.get_device_name(world.device))
    if gpu is None:
        return None
    from trainstack.plan.cost import flops_per_token  # half a second, for nothing without a GPU

    try:
        flops = flops_per_token(loss_model, config.data.seq_len)
    except Exception as error:  # whatever a model's code raises without values
        log.info("model: its FLOPs are not known (%s)", first_words(error))
        return None
    return flops / gpu.flops(config.train.precision) / world.world_size


def build_interval(attempt: Attempt, save_seconds: float) -> Interval | None:
    """Decides when to save if checkpoint.save_steps is auto; None if not, and on ranks beyond 0."""
    section = attempt.config.checkpoint
    if not attempt.world.is_main or section.save_steps != "auto":
        return None
    return Interval(section.failure_hours, attempt.run.events(), save_seconds, time.monotonic())
