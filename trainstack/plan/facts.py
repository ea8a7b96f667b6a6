"""What was found of a model and of a processor, kept in the project's cache: cache/plans/.

A name says all that a record depends on, so that the second answer needs neither torch nor time.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.model.proof import proof_key
from trainstack.plan import machine
from trainstack.plan.estimate import Cost, Machines, Op
from trainstack.plan.machine import Gpu, Measured
from trainstack.storage import files, manifest

NETWORK = 100.0  # Gb/s of a process, if nothing is said


def as_shared(config: Config, world_size: int) -> Config:
    """With the micro batch that each of so many processes has; ConfigError if there is none."""
    micro = config.batch_plan(world_size).micro_batch_size
    train = config.train.model_copy(update={"micro_batch_size": micro})
    return config.model_copy(update={"train": train})


def machines_of(home: Path, nodes: int, per_node: int, gpu: Gpu | None, network: float) -> Machines:
    """With what was measured of this processor, if there is no GPU; ``network``: Gb/s."""
    if gpu:
        return Machines(nodes, per_node, gpu, network / 8, 1e9 * gpu.memory)
    memory = machine.memory_here() / per_node
    return Machines(nodes, per_node, measured_here(home, per_node), network / 8, memory)


def known_cost(home: Path, folder: Path, config: Config, machines: Machines) -> Cost | None:
    """What was found before; None if this was never asked."""
    try:
        found = json.loads(cost_record(home, folder, config, machines).read_bytes())
        return Cost(**{**found, "ops": {name: Op(*row) for name, row in found["ops"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def new_cost(home: Path, folder: Path, config: Config, machines: Machines) -> Cost:
    """Found now, in some seconds, and kept; ConfigError if the model cannot be trained so."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's library is imported
    from trainstack.plan.cost import cost_of

    cost = cost_of(folder, config, machines.gpu is not None, keeps_gradients(config, machines))
    rows = {name: [*asdict(op).values()] for name, op in cost.ops.items()}
    files.keep_found(cost_record(home, folder, config, machines), {**vars(cost), "ops": rows})
    return cost


def keeps_gradients(config: Config, machines: Machines) -> bool:
    """Whether a micro step finds gradients: DDP keeps them, and so does a step of several."""
    return machines.world_size > 1 or config.train.global_batch_size > config.train.micro_batch_size


def cost_record(home: Path, folder: Path, config: Config, machines: Machines) -> Path:
    """Named after all that a cost depends on."""
    code = [manifest.hash_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    rows, is_gpu = config.train.micro_batch_size, machines.gpu is not None
    depends_on = [proof_key(folder, config), rows, is_gpu, keeps_gradients(config, machines), code]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    return home / "cache" / "plans" / f"{name}.json"


def measured_record(home: Path, per_node: int) -> Path:
    kind = f"{machine.processor()}, {threads_of(per_node)} threads"
    return home / "cache" / "plans" / f"cpu-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"


def threads_of(per_node: int) -> int:
    """Of each of so many processes on this machine, as a job gives them."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, machine.cores() // per_node)


def measured_here(home: Path, per_node: int) -> Measured | None:
    try:
        return Measured(**json.loads(measured_record(home, per_node).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def measure(home: Path, folder: Path, config: Config, world: int, per_node: int) -> None:
    """Measure this model's operations on this processor; those of other models stay known."""
    import torch

    from trainstack.plan.calibrate import calibrate

    torch.set_num_threads(threads_of(per_node))
    keeps = keeps_gradients(config, Machines(1, world, None, 1, None))
    new, before = calibrate(folder, config, keeps), measured_here(home, per_node) or Measured()
    new.ops = {**before.ops, **new.ops}
    files.keep_found(measured_record(home, per_node), vars(new))
