"""The line of submit.sh: memory, step time and hours of the job that is about to be submitted."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainstack.config.schema import Config
from trainstack.plan import estimate, facts
from trainstack.plan.estimate import Cost, Machines
from trainstack.plan.machine import Gpu
from trainstack.units import age, counted


class Job(NamedTuple):
    """Where it runs; without a GPU on this machine."""

    nodes: int
    per_node: int  # processes
    gpu: Gpu | None


def plan_lines(
    home: Path,
    folder: Path,
    config: Config,
    job: Job,
    steps: int,
    minutes: float | None,
    say: Callable[[str], None],
) -> list[str]:
    """A line, or none: it is an estimate, so nothing fails here.

    ``folder``: of the model; ``steps`` are left, and ``minutes`` of the job, None: nobody knows.
    For a processor only what was found before is told; for GPUs it is found now.
    """
    try:
        config = facts.as_shared(config, job.nodes * job.per_node)
        where = facts.machines_of(*job)
        cost = facts.known_cost(home, folder, config, where)
        if cost is None and job.gpu:
            say("plan: what a step of this model takes is found once; that takes some seconds")
            cost = facts.new_cost(home, folder, config, where)
        return [f"plan: {line(config, cost, where, steps, minutes)}"] if cost else []
    except Exception:  # of torch, of a model's code, of a configuration that has no batch yet
        return []


def line(config: Config, cost: Cost, where: Machines, steps: int, minutes: float | None) -> str:
    """What is estimated, in a line, with the setting to change if it would not fit."""
    need, room = sum(estimate.memory_of(cost, config, where).values()), where.memory / 1e9
    unit = f"GPU ({where.gpu.name})" if where.gpu else "process"
    if fix := estimate.way_out(cost, config, where):
        told = f"it seems not to fit: about {need / 1e9:,.1f} GB per {unit}, which has {room:,.0f}"
        return f"{told}; {fix}"
    told = [f"about {need / 1e9:,.1f} of {room:,.0f} GB per {unit}"]
    pace = estimate.pace_of(cost, config, where, config.batch_plan(where.world_size))
    if pace:
        told.append(f"{pace.step:.2g} s a step")
        if where.gpu:
            told.append(f"{estimate.mfu(config, cost, where, pace):.0%} MFU")
        seconds = steps * pace.step
        told.append(f"{age(seconds)} for {counted(steps, 'step')}")
        if seconds > 60 * (minutes or math.inf):
            told.append("longer than --time: in several jobs")
    else:
        told.append('step time not known; run: "$TRAINSTACK_PYTHON" -m trainstack plan --calibrate')
    return ", ".join(told)
