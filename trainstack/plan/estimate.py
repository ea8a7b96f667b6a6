"""The arithmetic of a plan: memory, step time, hours. Nothing here looks at a machine or a model.

A step is a roofline: each operation takes what its FLOPs or its bytes take, whichever is longer
(Williams et al., "Roofline", 2009). The sum of gradients goes within a node first, then between
nodes, as rings (NVIDIA/nccl-tests, doc/PERFORMANCE.md), and hides behind the last backward pass.
"""

from dataclasses import dataclass

from trainstack.checkpoint.interval import OVERLAP_COST, Interval, first_save_seconds
from trainstack.checkpoint.names import BYTES_PER_PARAMETER
from trainstack.config.batch import BatchPlan
from trainstack.config.schema import Config
from trainstack.plan.machine import Gpu

# Shares of what a data sheet says that are reached: matrix products reach 0.80 of an H100 and 0.87
# of an A100 at their best shape (ml-engineering, MAMF); those of a model are not all of that shape.
MATMUL, BANDWIDTH, LINK = 0.70, 0.80, 0.80
LAUNCH_SECONDS, HOST_SECONDS = 4e-6, 12e-6  # of an operation: on a GPU, and until it is sent there
COMPILED = 0.5  # of the bytes and the number of operations that are no matrix products
BACKWARD = 2 / 3  # of a micro step
BUCKET_BYTES = 25 << 20  # of DDP: the last one hides behind nothing
LOOP_SECONDS = 3e-4  # of a step on a processor: samples, numbers, log
GPU_BASE, CPU_BASE = 1.2e9, 0.405e9  # bytes: CUDA, its kernels and NCCL; Python and its libraries
HEAP = 0.40  # of what tensors take on a processor is taken once more, by gaps between them
FAILURE_GPU_HOURS = 50_000  # Llama 3: 419 failures in 54 days of 16,384 GPUs (2407.21783)
RESTART_SECONDS = 120.0
CPU_NETWORK = 1e9  # bytes a second, of gloo


@dataclass(frozen=True)
class Cost:
    """What cost.py found, and calibrate.py: of one micro step of one process."""

    parameters: int
    trained: int
    flops_per_token: float
    ops: list[tuple[int, int, int]]  # FLOPs and bytes of an operation, and how often it comes
    peak: int  # bytes beside weights and optimizer, and gradients if those are kept
    logits: int  # of them
    fixed: int  # of them: the same for any micro_batch_size
    keeps_gradients: bool
    measured: tuple[float, float] | None = None  # seconds on a processor, and of an update


@dataclass(frozen=True)
class Machines:
    """What the job runs on; ``network``: GB/s of a process to other nodes."""

    nodes: int
    per_node: int
    gpu: Gpu | None  # None: processors as here
    network: float
    memory: float  # bytes of a GPU, or of this machine for each process

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Pace:
    """Seconds of a step and of its parts."""

    micro: float
    update: float
    exposed: float  # waiting for the sum of gradients
    step: float


def memory_of(cost: Cost, config: Config, machines: Machines) -> dict[str, float]:
    """Bytes of a process at its peak, by part; of the GPU if it has one."""
    number = 8 if config.train.precision == "fp64" else 4
    is_adapted, saved = config.adapter.type is not None, saved_parameters(cost, config)
    frozen = cost.parameters - cost.trained if is_adapted else 0
    stored = 2 if config.train.precision in ("bf16", "fp16") else number
    gradients = number * cost.trained
    beside = cost.peak if cost.keeps_gradients else max(0, cost.peak - gradients)
    logits = min(cost.logits, beside)
    parts = {
        "weights": number * (cost.parameters - frozen) + stored * frozen,
        "gradients": gradients,
        "optimizer (AdamW)": 2 * number * cost.trained,
        "activations": beside - logits,
        "logits of the loss": logits,
    }
    if machines.gpu:
        return {**parts, "CUDA, NCCL": GPU_BASE}
    share = (saved + 2 * cost.trained) / machines.world_size  # rank 0 has the weights
    parts["copy for a save"] = number * max(saved, share)
    return {**parts, "gaps": HEAP * sum(parts.values()), "Python, libraries": CPU_BASE}


def way_out(cost: Cost, config: Config, machines: Machines) -> str:
    """The one thing to change if it does not fit; empty if it does."""
    parts = memory_of(cost, config, machines)
    over = sum(parts.values()) - machines.memory
    if over <= 0:
        return ""
    train, rows = config.train, config.train.micro_batch_size
    for_rows = parts["activations"] + parts["logits of the loss"] - cost.fixed
    fewer = int(rows * (1 - over / for_rows)) if for_rows > over else 0
    fewer = next((n for n in range(fewer, 0, -1) if rows % n == 0), 0)
    if fewer:
        return f"set train.micro_batch_size={fewer}"
    if not train.activation_checkpointing and over < for_rows:
        return "set train.activation_checkpointing=true"
    if over < for_rows:
        return f"set data.seq_len below {config.data.seq_len}"
    least = (sum(parts.values()) - for_rows) / 1e9
    return f"choose a smaller model, or GPUs of more than {least:,.0f} GB"


def pace_of(cost: Cost, config: Config, machines: Machines, plan: BatchPlan) -> Pace | None:
    """None if it was not measured on the processor."""
    size, gpu, train = 4 * cost.trained, machines.gpu, config.train
    if gpu:
        micro = on_gpu(cost, gpu, train.precision, train.torch_compile)
        update = (28 + 4 + 4) * cost.trained / (1e9 * gpu.bandwidth * BANDWIDTH)
    elif cost.measured:
        micro, update = cost.measured[0], cost.measured[1] + LOOP_SECONDS
    else:
        return None
    link = 1e9 * LINK * gpu.link if gpu else CPU_NETWORK
    total = all_reduce(size, machines.nodes, machines.per_node, link, machines.network * 1e9)
    last = total * min(1.0, BUCKET_BYTES / size)
    exposed = max(total - BACKWARD * micro, last)
    step = plan.gradient_accumulation_steps * micro + update + exposed
    return Pace(micro, update, exposed, step)


def mfu(config: Config, cost: Cost, machines: Machines, pace: Pace) -> float:
    """Share of the peak FLOP/s of all GPUs that the model's own FLOPs are."""
    world = machines.world_size
    flops = cost.flops_per_token * config.batch_plan(world).tokens_per_step / pace.step
    return flops / (world * machines.gpu.flops(config.train.precision))


def on_gpu(cost: Cost, gpu: Gpu, precision: str, is_compiled: bool) -> float:
    """Seconds of a micro step: of the GPU, or of the host that sends its operations."""
    rate, bandwidth = gpu.flops(precision) * MATMUL, 1e9 * gpu.bandwidth * BANDWIDTH
    device = host = 0.0
    for flops, size, count in cost.ops:
        share = COMPILED if is_compiled and not flops else 1.0
        if size:  # else a view
            longest = max(flops / rate, share * size / bandwidth, share * LAUNCH_SECONDS)
            device += count * longest
            host += count * share * HOST_SECONDS
    return max(device, host)


def all_reduce(size: float, nodes: int, per_node: int, link: float, network: float) -> float:
    """Seconds for a sum of so many bytes over all processes."""
    inside = 2 * (per_node - 1) / per_node * size / link
    return inside + 2 * (nodes - 1) / nodes * size / per_node / network


def goodput(
    config: Config, cost: Cost, world: int, step: float, epoch_steps: int | None = None
) -> tuple[float, float, float]:
    """Seconds between saves, hours between failures, and the share of time that counts.

    ``epoch_steps``: of an epoch; if that is not known, its saves come as if they were auto.
    """
    save = first_save_seconds(saved_parameters(cost, config))
    hours = config.checkpoint.failure_hours or FAILURE_GPU_HOURS / world
    every = config.checkpoint.save_steps
    every = epoch_steps or "auto" if every == "epoch" else every
    interval = Interval(hours, [], save, 0.0).seconds if every == "auto" else every * step
    interval = max(interval, save)  # a save waits for the one before
    lost = OVERLAP_COST * save / interval + (interval / 2 + RESTART_SECONDS) / (3600 * hours)
    return interval, hours, max(0.0, 1 - lost)


def saved_parameters(cost: Cost, config: Config) -> int:
    """Of a checkpoint: of an adapter, if there is one."""
    return cost.trained if config.adapter.type else cost.parameters


def checkpoint_bytes(cost: Cost, config: Config) -> int:
    return BYTES_PER_PARAMETER * saved_parameters(cost, config)
