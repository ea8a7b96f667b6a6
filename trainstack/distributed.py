"""Who am I: ranks, device, process group, and the logging that carries the rank.

The only module that reads RANK and its kin. Without them a process is a world of one.
"""

import contextlib
import ctypes
import datetime
import json
import logging
import os
import random
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainstack import processes
from trainstack.errors import ConfigError
from trainstack.waits import COLLECTIVE_SECONDS, MEET_SECONDS, RECORD_SECONDS

log = logging.getLogger("trainstack")
NO_GLOO = "the ranks cannot reach each other over gloo"
GLOO_FIX = "set GLOO_SOCKET_IFNAME in train.slurm to the network between the nodes"


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        # What is on the host, objects too, travels over gloo: no GPU waits for it.
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"


def die_with_parent() -> None:
    """End with the launcher, which told its pid: it may have died while this one was importing."""
    processes.die_with_parent(int(os.environ.get("TRAINSTACK_PARENT") or os.getppid()))


def rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error only says that another rank went away (gloo's and NCCL's words for it)."""
    signs = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out",
             "closed by remote peer", "remote process exited", "ncclremoteerror")  # fmt: skip
    text = str(error).lower()
    is_distributed = isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
    return is_distributed and any(sign in text for sign in signs)


def start(promised_world_size: int | None) -> World:
    """Join the process group. Collective: every rank must call this.

    ConfigError if only a part of torchrun's variables is set, or if the world does not have the
    size that the job promised (a node that rendezvoused with itself would train alone).
    """
    world = read_world()
    if world.device.type == "cpu":
        keep_memory()
    if promised_world_size and world.world_size != promised_world_size:
        raise ConfigError(
            f"{world.world_size} processes met, but the job has {promised_world_size}; "
            "look for a node whose name does not resolve on the others"
        )
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    arguments = {"backend": world.backend, "timeout": timeout}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        arguments["device_id"] = world.device  # connects now, not in the first step
    if "RANK" in os.environ:
        try:
            dist.init_process_group(**arguments)
        except RuntimeError as error:
            if world.device.type == "cuda" and "gloo" in str(error).lower():
                raise ConfigError(f"{NO_GLOO} ({str(error)[:200]}); {GLOO_FIX}") from None
            raise
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **arguments)
    return world


def keep_memory() -> None:
    """Let malloc keep what is freed, for each step asks for the same again (mallopt(3)).

    Else the kernel takes large tensors back, and gives them again page by page, all zero: 5% of a
    step on a CPU, more on a machine that is not quiet.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 32 << 20), (-1, (1 << 31) - 1)):
            mallopt(option, value)  # M_MMAP_THRESHOLD (its most), M_TRIM_THRESHOLD


def read_world() -> World:
    """The ranks from torchrun's environment, and this process's device."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    found = [name for name in names if name in os.environ]
    missing = [name for name in names if name not in os.environ]
    if found and missing:
        raise ConfigError(f"{found[0]} is set but {missing[0]} is not; start train.py by torchrun")
    rank, local_rank = (int(os.environ.get(name, 0)) for name in names[:2])
    world_size, local_world_size = (int(os.environ.get(name, 1)) for name in names[2:])
    device = torch.device("cpu")
    if not torch.cuda.is_available():
        check_driver()
    else:
        if local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"{local_world_size} processes on a node with {torch.cuda.device_count()} GPUs; "
                "set NPROC_PER_NODE in train.slurm to the number of GPUs"
            )
        device = torch.device("cuda", local_rank)
    return World(rank, local_rank, world_size, local_world_size, device)


def check_driver() -> None:
    """ConfigError if this node has GPUs for this process and torch cannot use them.

    nvidia-smi shows those that a job may use. Without a word, it would train on the CPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    told = "" if visible == "" else processes.first_gpu("name,driver_version")
    if told:
        seen = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        raise ConfigError(
            f"{socket.gethostname()} has a GPU ({told}), but torch {torch.__version__}, built "
            f"{built}, cannot use it{seen}: choose a build for that driver (doc/cluster.md), or "
            "hide the GPU: CUDA_VISIBLE_DEVICES= bash submit.sh --local, or -- --gpus-per-node=0"
        )


class Console(logging.StreamHandler):
    """stdout, as long as somebody reads it: Ctrl-C ends the ``tee`` behind a pipe, too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            processes.mute(self.stream.fileno())
        else:
            super().handleError(record)


def start_logging(world: World, log_file: Path) -> None:
    """Rank 0 speaks on the console; every rank writes its own file; warnings show everywhere."""
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    console = Console(sys.stdout)
    console.setLevel(logging.INFO if world.is_main else logging.WARNING)
    console.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    to_file = logging.FileHandler(log_file)
    to_file.setFormatter(logging.Formatter(f"%(asctime)s rank {world.rank} %(message)s"))
    log.handlers = [console, to_file]
    log.setLevel(logging.INFO)
    log.propagate = False


def set_numerics(precision: str, is_deterministic: bool) -> None:
    """Which products a GPU makes of fp32 matrices, and whether it computes alike each time.

    TF32 keeps 10 of the 23 bits of a factor. CPUs compute alike either way.
    """
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def flight_record() -> tuple[str, int]:
    """torch's record of the last collectives as JSON, and how many of the loop's have begun.

    Empty, and 0, if torch has none, or does not answer in RECORD_SECONDS.
    """
    found = []

    def read() -> None:
        c10d = torch._C._distributed_c10d
        names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
        known = [getattr(c10d, n) for n in names if hasattr(c10d, n)]
        texts = [dump(True, False).decode() for dump in known]
        entries = [entry for text in texts for entry in json.loads(text).get("entries", [])]
        of_loop = [entry for entry in entries if "default_pg" in entry["process_group"]]
        of_gpu = [entry for entry in of_loop if entry["profiling_name"].startswith("nccl")]
        # NCCL's have begun if the GPU came to them. gloo's begin at once, and keep that state.
        begun = [entry for entry in of_gpu if entry["state"] != "scheduled"] if of_gpu else of_loop
        count = max((entry["collective_seq_id"] for entry in begun), default=0)
        found.append(("\n".join(texts), count))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(RECORD_SECONDS)
    return found[0] if found else ("", 0)


def introduce(world: World) -> tuple[str, str]:
    """This rank's host, and one line for people: rank, host, device, process."""
    host = socket.gethostname()
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    return host, f"rank {world.rank} on {host}: {device}, pid {os.getpid()}"


def gather(value, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, in rank order. Collective: every rank must call this."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(value, group: dist.ProcessGroup | None = None):
    """Rank 0's value on every rank. Collective: every rank must call this."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def main_decides(world: World, action: Callable, waiting: Callable = lambda: None):
    """Rank 0 acts, all ranks get its result or its ConfigError. Collective: every rank calls.

    That may take longer than a collective: rank 0 acts in a thread, and all meet every MEET_SECONDS
    until it is done; at each meeting the others call ``waiting``.
    """
    acting = ThreadPoolExecutor(1).submit(action) if world.is_main else None
    while any_rank(acting is not None and not wait([acting], MEET_SECONDS).done, world):
        if not world.is_main:
            waiting()
    outcome = None
    if world.is_main:
        try:
            outcome = (acting.result(), None)
        except ConfigError as error:
            outcome = (None, error)
    result, error = from_main(outcome)
    if error is not None:
        raise error
    return result


def random_state(world: World) -> tuple:
    """What changes when something is drawn at random."""
    states = [torch.default_generator.get_state()]
    if world.device.type == "cuda":
        states.append(torch.cuda.default_generators[world.device.index].get_state())
    return random.getstate(), *(state.numpy().tobytes() for state in states)


def seed_step(seed: int, step: int, world: World) -> None:
    """Seed what is random within a step (dropout) by the step, so no random state is stored.

    The generators themselves: torch.manual_seed writes down who called it, which takes 1 ms.
    """
    mixed = np.random.SeedSequence([seed, step, world.rank]).generate_state(1, np.uint64)[0]
    torch.default_generator.manual_seed(int(mixed >> np.uint64(1)))
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index].manual_seed(int(mixed >> np.uint64(1)))
    random.seed(int(mixed))


def any_rank(is_wanted: bool, world: World) -> bool:
    """Whether it is true on any rank. Collective: every rank must call this."""
    if world.world_size == 1:
        return is_wanted
    number = torch.tensor(float(is_wanted))
    dist.all_reduce(number)  # over gloo, also beside NCCL: no GPU waits
    return bool(number > 0)
