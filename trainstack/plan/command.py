"""``python -m trainstack plan``: memory, step time, hours and checkpoints of a run, before it runs.

It is an estimate, and prints what it assumes. --calibrate makes some steps of this model on this
processor; later plans of it on such a processor know how long they took.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data.corpus import open_corpus
from trainstack.errors import ConfigError
from trainstack.options import parse, parser_of
from trainstack.plan import estimate, facts, machine
from trainstack.plan.estimate import Cost, Machines, Pace
from trainstack.processes import first_gpu
from trainstack.storage import layout
from trainstack.units import age, bytes_text, counted, duration


def main(arguments: list[str]) -> int:
    parser = parser_of("plan", __doc__, has_config=True)
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="M", help="or processes on CPUs")
    parser.add_argument("--gpu", help="such as h100; without it: what this machine has")
    parser.add_argument(
        "--network", type=float, default=facts.NETWORK, help="Gb/s to other nodes, for each GPU"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure steps on this processor")
    options = parse(parser, arguments)
    config = load(options.config, options.overrides)
    gpu = machine.named_gpu(options.gpu) if options.gpu else machine.find_gpu(first_gpu("name"))
    per_node = options.gpus_per_node or (1 if gpu else 2)
    if min(options.nodes, per_node, options.network) <= 0:
        raise ConfigError(
            "--nodes, --gpus-per-node and --network count from 1; write for example 2"
        )
    if options.calibrate and gpu:
        raise ConfigError("--calibrate measures processors, not GPUs; leave it or --gpu out")
    folder = layout.model_folder(options.home, config.model.name)
    if not folder.exists():
        fix = "bash download_data_model.sh, or for the demo bash submit.sh --local --dry-run"
        raise ConfigError(f"model {config.model.name} is not in {options.home}; write: {fix}")
    config = facts.as_shared(config, options.nodes * per_node)
    if options.calibrate:
        say("some steps of the model are made on this processor, of one process")
    where = facts.machines_of(options.nodes, per_node, gpu, options.network)
    cost = None if options.calibrate else facts.known_cost(options.home, folder, config, where)
    cost = cost or facts.new_cost(options.home, folder, config, where, options.calibrate)
    print("\n".join(page(config, cost, where, *steps_of(options.home, config))))
    return 0


def say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr)


def steps_of(home: Path, config: Config) -> tuple[int | None, int | None]:
    """Of the run and of an epoch; None if that follows from tokens that are not there."""
    try:
        samples = open_corpus(home, config).train.num_samples
    except (ConfigError, OSError):
        return config.train.max_steps, None
    return config.steps_for(samples), config.epoch_steps(samples)


def page(
    config: Config, cost: Cost, machines: Machines, steps: int | None, epoch_steps: int | None
) -> Iterator[str]:
    """Lines for a person."""
    world, where = machines.world_size, "GPU" if machines.gpu else "process"
    name = machines.gpu.name if machines.gpu else f"processes on {machine.processor()}"
    yield f"{config.run.name}: {cost.parameters / 1e6:,.1f}M parameters on {world} x {name}"
    yield f"{config.batch_plan(world)}"
    yield f"memory of a {where}, GB"
    parts = estimate.memory_of(cost, config, machines)
    for part, size in parts.items():
        yield f"  {part:<20} {size / 1e9:8.2f}"
    yield f"  {'all':<20} {sum(parts.values()) / 1e9:8.2f}  {verdict(cost, config, machines)}"
    pace = estimate.pace_of(cost, config, machines, config.batch_plan(world))
    if pace is None:
        yield "step time: not known, for it was not measured on this processor; add --calibrate"
    else:
        yield from speed(config, cost, machines, pace)
        yield from course(config, cost, machines, pace, steps, epoch_steps)
    if assumed := [*assumptions(config, cost, machines, pace, epoch_steps)]:
        yield from ["assumed:", *(f"  {line}" for line in assumed)]


def verdict(cost: Cost, config: Config, machines: Machines) -> str:
    fix = estimate.way_out(cost, config, machines)
    return f"of {machines.memory / 1e9:,.0f}: " + (f"does not fit; {fix}" if fix else "fits")


def speed(config: Config, cost: Cost, machines: Machines, pace: Pace) -> Iterator[str]:
    plan = config.batch_plan(machines.world_size)
    yield (
        f"step: {pace.step:.3g} s = {plan.gradient_accumulation_steps} x {pace.micro:.3g} s, "
        f"update {pace.update:.2g} s, waiting for the sum of gradients {pace.exposed:.2g} s"
    )
    told = f"  {plan.tokens_per_step / pace.step:,.0f} tokens/s"
    if machines.gpu:
        told += f", {estimate.mfu(config, cost, machines, pace):.0%} MFU"
    yield told


def course(
    config: Config, cost: Cost, machines: Machines, pace: Pace, steps: int | None,
    epoch_steps: int | None,
) -> Iterator[str]:  # fmt: skip
    world = machines.world_size
    interval, hours, share = estimate.goodput(config, cost, world, pace.step, epoch_steps)
    size = bytes_text(estimate.checkpoint_bytes(cost, config))
    yield f"checkpoints: {size} each, one every {age(interval)}"
    yield f"goodput: {share:.1%}, with a failure in {hours:,.0f} hours"
    if steps:
        whole = steps * pace.step / share
        what = "GPU" if machines.gpu else "process"
        yield (
            f"{counted(steps, 'step')}: {duration(whole)}, {whole * world / 3600:,.1f} {what}-hours"
        )


def assumptions(
    config: Config, cost: Cost, machines: Machines, pace: Pace | None, epoch_steps: int | None
) -> Iterator[str]:
    if gpu := machines.gpu:
        yield (
            f"{gpu.name}: {estimate.MATMUL:.0%} of {gpu.flops(config.train.precision) / 1e12:,.0f} "
            f"TFLOP/s in {config.train.precision}, {estimate.BANDWIDTH:.0%} of "
            f"{gpu.bandwidth:,.0f} GB/s, {estimate.HOST_SECONDS * 1e6:.0f} us of the host for each "
            "operation"
        )
        if machines.per_node > 1:
            yield f"{estimate.LINK:.0%} of {gpu.link:,.0f} GB/s between the GPUs of a node"
        if config.train.torch_compile:
            yield "compiled: half of the bytes and calls that are no matrix products"
    elif pace:
        yield "a process is as fast beside the others as it is alone"
        if config.train.torch_compile:
            yield "torch_compile gains nothing on a processor"
    if machines.nodes > 1:
        yield f"{8 * machines.network:,.0f} Gb/s for each {'GPU' if gpu else 'process'} (--network)"
    if config.data.packing != "concat":
        yield "attention as if each row were one document"
    if config.checkpoint.save_steps == "epoch" and not epoch_steps:
        yield "saves as by save_steps=auto, for the tokens of an epoch are not there"
    if pace:
        yield f"a save hides behind training, a restart takes {estimate.RESTART_SECONDS:.0f} s"
        yield "evaluations and the start are not in the hours"


def plan_lines(
    home: Path,
    folder: Path,
    config: Config,
    where: Machines,
    steps: int,
    minutes: float | None,
    say: Callable[[str], None],
) -> list[str]:
    """The line of submit.sh, or none: it is an estimate, so nothing fails here.

    ``folder``: of the model; ``steps`` are left, and ``minutes`` of the job, None: nobody knows.
    For a processor only what was found before is told; for GPUs it is found now.
    """
    try:
        config = facts.as_shared(config, where.world_size)
        cost = facts.known_cost(home, folder, config, where)
        if cost is None and where.gpu:
            say("plan: finding out what a step of this model takes, for some seconds; it is kept")
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
