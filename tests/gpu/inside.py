"""train.py, with something in it watched or broken: PROOF_HOOKS names functions of this file.

``PROOF_HOOKS="updates;scale=26" python tests/gpu/inside.py ARGUMENTS_OF_TRAIN``. What a hook sees
it tells in the file PROOF_TOLD, a line of JSON each, on rank 0.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from trainstack import distributed
from trainstack.checkpoint.load import read_optimizer
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import Share
from trainstack.model.ddp import DataParallel
from trainstack.train import ranks

ROOT = Path(__file__).resolve().parent.parent.parent
SYNC_STEPS = range(5, 10)
IS_GPU = torch.cuda.is_available()


def tell(**values: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        with open(os.environ["PROOF_TOLD"], "a") as file:
            file.write(json.dumps(values) + "\n")


def around(owner: Any, name: str):
    """Replace a method by a function that gets the method first, then its arguments."""

    def wrap(function):
        setattr(owner, name, functools.partialmethod(with_own, function, getattr(owner, name)))
        return function

    return wrap


def with_own(self, function, own, *arguments, **named):
    return function(functools.partial(own, self), self, *arguments, **named)


def syncs() -> None:
    """Where the host waits for the GPU within some steps; on a CPU, where it reads a number.

    torch warns of each; the loop's own wait for the numbers of the step before is none.
    """
    seen: Counter[str] = Counter()

    @around(train.Loop, "step")
    def step(own, loop, number):
        if number not in SYNC_STEPS:
            return own(number)
        items = contextlib.nullcontext() if IS_GPU else Items(places := [])
        with warnings.catch_warnings(record=True) as caught, items:
            warnings.simplefilter("always")
            if IS_GPU:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                requested = own(number)
            finally:
                if IS_GPU:
                    torch.cuda.set_sync_debug_mode("default")
        seen.update([] if IS_GPU else places)
        seen.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w))
        if number == SYNC_STEPS[-1]:
            tell(syncs=sum(seen.values()) / len(SYNC_STEPS), places=dict(seen))
        return requested


class Items(TorchDispatchMode):
    """Counts values that are read on the host, by the line that asks for them; for CPUs."""

    def __init__(self, places: list[str]):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            ours = [f for f in traceback.extract_stack() if f"{ROOT}/train" in f.filename]
            self.places.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno}")
        return function(*arguments, **(named or {}))


def updates() -> None:
    """Of each update: whether weights, moments and count stayed as they were to the last bit."""

    def kept(strategy: DataParallel) -> tuple[int, list[torch.Tensor]]:
        states = strategy.optimizer.tensors(strategy.causal_lm)
        tensors = [*strategy.causal_lm.parameters(), *states.values()]
        return strategy.optimizer.updates_done(), [tensor.detach().clone() for tensor in tensors]

    @around(DataParallel, "update")
    def update(own, strategy, is_bad, grad_norm, max_grad_norm):
        scale, (count, before) = strategy.scaler.get_scale(), kept(strategy)
        own(is_bad, grad_norm, max_grad_norm)
        now, after = kept(strategy)
        before += [torch.zeros_like(t) for t in after[len(before) :]]  # states that are new
        is_same = all(map(torch.equal, before, after)) and now == count
        then = strategy.scaler.get_scale()
        tell(is_same=is_same, is_bad=bool(is_bad), scale=scale, then=then, updates=now)


def scale(exponent: str) -> None:
    """The scale of fp16 begins at a power of two."""
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** int(exponent))


def nan_gradients() -> None:
    """The loss is fine, and the gradient of a parameter never is a number."""

    @around(DataParallel, "__init__")
    def init(own, strategy, *arguments, **named):
        own(*arguments, **named)
        strategy.parameters[0].register_hook(lambda gradient: gradient * float("nan"))


def clones() -> None:
    """A synchronous copy of what each save is of, to be compared with what was published."""
    kept, tensors = {}, Share.tensors

    def late(share: Share):  # so that an update that does not wait is seen
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        if IS_GPU and torch.cuda.current_stream() != torch.cuda.default_stream():
            torch.cuda._sleep(200_000_000)  # clock cycles, a tenth of a second
        return tensors(share)

    Share.tensors = late

    @around(Saver, "start")
    def start(own, saver, snapshot):
        kept.update({n: t.detach().to("cpu", copy=True) for n, t in snapshot.share.tensors()})
        own(snapshot)

    @around(Saver, "wait")
    def wait(own, saver):
        saved = own()
        if saved is not None and saved.problem is None:
            found = load_file(saved.path / "model.safetensors") | read_optimizer(saved.path)
            equal = sum(n in kept and torch.equal(t, kept[n]) for n, t in found.items())
            tell(saved=saved.step, equal=equal, tensors=len(kept))
        return saved


def memory_of_saves() -> None:
    """Host memory before the first save, and after each."""

    def told() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tell(resident=pages * os.sysconf("SC_PAGESIZE") / 1e9)

    @around(Saver, "start")
    def start(own, saver, snapshot):
        told()
        own(snapshot)

    @around(Saver, "wait")
    def wait(own, saver):
        saved = own()
        if saved is not None:
            told()
        return saved


def graphs() -> None:
    """After each step and evaluation: compiled graphs so far, and seconds since the start."""

    def told(**where: Any) -> None:
        from torch._dynamo.utils import counters

        seconds = time.time() - float(os.environ["PROOF_STARTED"])
        tell(**where, graphs=counters["stats"]["unique_graphs"], seconds=seconds)

    @around(train.Loop, "step")
    def step(own, loop, number):
        requested = own(number)
        told(step=number)
        return requested

    @around(train.Loop, "evaluate")
    def evaluate(own, loop):
        own()
        told(evaluated=loop.state.step)


def memory(limit_gb: str) -> None:
    """The GPU has so much memory; a CPU fails at the first update, with the error of a GPU."""
    if not IS_GPU:

        @around(DataParallel, "update")
        def update(own, strategy, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(limit_gb) * 1e9 / total, 0)


def no_pinning() -> None:
    """No host memory can be pinned for saves."""
    if not IS_GPU:
        return
    cuda = torch.cuda.cudart()

    class Refusing:
        cudaError = cuda.cudaError  # noqa: N815  # CUDA's own name

        def cudaHostRegister(self, _address, size, _flags):  # noqa: N802
            tell(refused=size)
            return self.cudaError(2)  # out of memory

    torch.cuda.cudart = Refusing


def two_on_one(backend: str) -> None:
    """Both ranks have the first GPU. gloo takes its tensors; NCCL may, as of two hosts."""
    own_start = torch.distributed.init_process_group

    def read_world() -> distributed.World:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda", 0) if IS_GPU else torch.device("cpu")
        return distributed.World(rank, rank, size, size, device)

    def begin(**named):
        if backend == "gloo":
            named = {k: v for k, v in named.items() if k != "device_id"} | {"backend": "gloo"}
        return own_start(**named)

    if backend == "gloo":
        distributed.World.backend = property(lambda world: "gloo")
    else:
        os.environ["NCCL_HOSTID"] = f"host-{os.environ['RANK']}"
        os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}
    distributed.read_world, torch.distributed.init_process_group = read_world, begin


def short_windows(seconds: str) -> None:
    """A slow rank is looked for in windows of so many seconds."""
    ranks.SlowRanks = functools.partial(ranks.SlowRanks, window_seconds=float(seconds))


HOOKS = (syncs, updates, scale, nan_gradients, clones, memory_of_saves, graphs, memory, no_pinning,
         two_on_one, short_windows)  # fmt: skip


def main() -> None:
    known = {hook.__name__: hook for hook in HOOKS}
    for hook in os.environ["PROOF_HOOKS"].split(";"):
        name, _, argument = hook.partition("=")
        known[name](*([argument] if argument else []))
    sys.argv[0] = str(ROOT / "train.py")
    train.run_and_explain()


if __name__ == "__main__":
    main()
