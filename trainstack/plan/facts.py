"""What was found of a model, kept in the project's cache: cache/plans/.

A name says all that a record depends on, so that the second answer needs neither torch nor time.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.errors import ConfigError
from trainstack.model.proof import proof_key
from trainstack.plan import machine
from trainstack.plan.estimate import Cost, Machines, way_out
from trainstack.plan.machine import Gpu
from trainstack.storage import files, manifest

NETWORK = 100.0  # Gb/s of a process, if nothing is said


def as_shared(config: Config, world_size: int) -> Config:
    """With the micro batch that each of so many processes has; ConfigError if there is none."""
    micro = config.batch_plan(world_size).micro_batch_size
    train = config.train.model_copy(update={"micro_batch_size": micro})
    return config.model_copy(update={"train": train})


def machines_of(nodes: int, per_node: int, gpu: Gpu | None, network: float = NETWORK) -> Machines:
    """Such GPUs, or without one machines like this; ``network``: Gb/s."""
    memory = 1e9 * gpu.memory if gpu else machine.memory_here() / per_node
    return Machines(nodes, per_node, gpu, network / 8, memory)


def known_cost(home: Path, folder: Path, config: Config, machines: Machines) -> Cost | None:
    """What was found before; None if this was never asked."""
    try:
        return Cost(**json.loads(cost_record(home, folder, config, machines).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def new_cost(
    home: Path, folder: Path, config: Config, machines: Machines, is_measured: bool = False
) -> Cost:
    """Found now, in some seconds, and kept; ConfigError if the model cannot be trained so.

    ``is_measured``: with the time that this processor takes.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's library is imported
    from trainstack.plan.cost import cost_of

    keeps = keeps_gradients(config, machines)
    cost = cost_of(folder, config, machines.gpu is not None, keeps)
    if is_measured:
        if fix := way_out(cost, config, machines):
            raise ConfigError(f"a model that does not fit cannot be measured; {fix}")
        from trainstack.plan.calibrate import calibrate

        threads = threads_of(machines.per_node)
        cost = replace(cost, measured=calibrate(folder, config, keeps, threads))
    files.keep_found(cost_record(home, folder, config, machines), vars(cost))
    return cost


def keeps_gradients(config: Config, machines: Machines) -> bool:
    """Whether a micro step finds gradients: DDP keeps them, and so does a step of several."""
    return machines.world_size > 1 or config.train.global_batch_size > config.train.micro_batch_size


def cost_record(home: Path, folder: Path, config: Config, machines: Machines) -> Path:
    """Named after all that a cost depends on."""
    code = [manifest.hash_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    rows, keeps = config.train.micro_batch_size, keeps_gradients(config, machines)
    kind = "GPU" if machines.gpu else [machine.processor(), threads_of(machines.per_node)]
    depends_on = [proof_key(folder, config), rows, kind, keeps, code]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    return home / "cache" / "plans" / f"{name}.json"


def threads_of(per_node: int) -> int:
    """Of each of so many processes on this machine, as a job gives them."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, machine.cores() // per_node)
