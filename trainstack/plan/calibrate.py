"""How long the operations of a micro step take on this machine, each measured by itself.

Each kind of operation is made again with tensors of its shapes, in the order of a step, several
times. What is between operations (Python, autograd, torch's dispatcher) is measured with a model so
small that little else is left.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, LlamaConfig

from trainstack import distributed
from trainstack.config.schema import Config
from trainstack.model.causal_lm import read_config
from trainstack.optim.optimizer import build_optimizer
from trainstack.plan.cost import Shape, Tracer, loss_without_values, traced
from trainstack.plan.machine import Measured

MOST_SECONDS, ROUNDS = 40.0, 9
MOST_BYTES = 3 << 30  # of all tensors; operations that do not find room are not measured
BURST, SHORT = 10, 2e-4  # calls at once of those that take fewer seconds: a clock costs time too
UPDATED = 1 << 22  # parameters of the optimizer that is measured
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def calibrate(folder: Path, config: Config, keeps_gradients: bool) -> Measured:
    """Of the processor, with the threads that torch has, at the shapes of a model's micro step."""
    distributed.keep_memory()  # as a rank does
    loss_model = loss_without_values(folder, read_config(folder), config)
    rows, seq_len = config.train.micro_batch_size, config.data.seq_len
    seen = traced(loss_model, rows, seq_len, config.data.packing, keeps_gradients)
    seconds = measured(seen.examples)
    ops = {
        name: (seconds[name], op.flops, op.bytes)
        for name, op in seen.ops.items()
        if name in seconds
    }
    return Measured(ops, seconds_between(), update_seconds(config))


def seconds_between() -> float:
    """From an operation to the next: what the step of a small model takes beside its operations."""
    config = LlamaConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens, size = torch.zeros(4, 32, dtype=torch.int64), (config.vocab_size, config.hidden_size)

    def step() -> None:
        hidden = model.base_model(tokens).last_hidden_state
        hidden.sum().backward()

    with Tracer(size) as seen:
        step()
    seconds = measured(seen.examples)
    alone = sum(op.count * seconds.get(name, 0.0) for name, op in seen.ops.items())
    return max(0.0, median_seconds(step, 100) - alone) / sum(op.count for op in seen.ops.values())


def now() -> float:
    """Seconds of work of this thread, so that what others do meanwhile does not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median seconds of a call, but for the first."""
    found = []
    for _ in range(rounds):
        started = now()
        call()
        found.append(now() - started)
    return statistics.median(found[1:])


def measured(calls: dict[str, tuple[Any, tuple, dict]]) -> dict[str, float]:
    """Median seconds of each call, by signature; none for those that fail, or are too large.

    Tensors of one shape share their memory from call to call, as what one operation makes is what
    the next one reads.
    """
    pool: dict[tuple, torch.Tensor] = {}
    found: dict[str, list[float]] = {}
    left, until = dict(calls), time.monotonic() + MOST_SECONDS
    for _ in range(ROUNDS):
        for signature, call in [*left.items()]:
            if time.monotonic() > until:
                break
            try:
                times = found.get(signature, [])
                seconds = seconds_of(call, pool, BURST if times and min(times) < SHORT else 1)
                found[signature] = [*times, seconds]
            except Exception:  # it takes no such values, or too much memory
                del left[signature]
    return {name: statistics.median(times[1:] or times) for name, times in found.items()}


@torch.no_grad()
def seconds_of(call: tuple[Any, tuple, dict], pool: dict, count: int) -> float:
    """Of one call out of so many, one after the other; MemoryError if ``pool`` grows too large."""
    func, args, kwargs = call
    args, kwargs = with_tensors(args, kwargs, pool)
    if func.namespace == "trainstack":
        whole_rows(args)
    started = now()
    for _ in range(count):
        func(*args, **kwargs)
    return (now() - started) / count


def with_tensors(args: tuple, kwargs: dict, pool: dict) -> tuple[tuple, dict]:
    """The arguments of a call with tensors in place of shapes; numbers between 0 and 1, or zero."""
    place = iter(range(len(tree_leaves((args, kwargs)))))

    def made(shape: Shape) -> torch.Tensor:
        key = (next(place), shape)
        if key not in pool:
            size = 1 + sum((n - 1) * s for n, s in zip(shape.sizes, shape.strides, strict=True))
            if sum(t.nbytes for t in pool.values()) + size * shape.dtype.itemsize > MOST_BYTES:
                raise MemoryError
            values = torch.zeros(max(size, 1), dtype=shape.dtype)
            if shape.dtype.is_floating_point:
                values.uniform_(0.1, 0.9)
            pool[key] = values.as_strided(shape.sizes, shape.strides)
        return pool[key]

    return tree_map_only(Shape, made, (args, kwargs))


def whole_rows(args: tuple) -> None:
    """Let each row be one document, by the bounds among the arguments of our attention."""
    rows, _, length, _ = args[0].shape
    (bounds,) = (a for a in args if isinstance(a, torch.Tensor) and a.dim() == 1)
    bounds.copy_(torch.arange(rows + 1, dtype=bounds.dtype) * length)


def update_seconds(config: Config) -> float:
    """Seconds for each parameter of a norm and an update of the optimizer."""
    model = torch.nn.ParameterList(torch.zeros(UPDATED // 8) for _ in range(8))
    optimizer = build_optimizer(model, config.optim)
    for parameter in model:
        parameter.grad = torch.full_like(parameter, 1e-3)
    zero, one = torch.zeros(()), torch.ones(())  # not bad; divided by nothing

    def update() -> None:
        torch._foreach_norm([p.grad for p in model])
        optimizer.prepare(zero, one)
        optimizer.step()

    return median_seconds(update, 7) / UPDATED
