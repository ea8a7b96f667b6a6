"""How long a step of a model takes on this processor: some are made, as a run makes them."""

import statistics
import time
from pathlib import Path

import torch

from trainstack import distributed
from trainstack.config.schema import Config
from trainstack.distributed import World
from trainstack.model.causal_lm import build_causal_lm
from trainstack.model.ddp import DataParallel
from trainstack.model.loss import CausalLMLoss
from trainstack.plan.cost import CPU, plain_batch

SECONDS, LEAST = 3.0, 3  # of steps, but so many at least; the first one does not count


def calibrate(
    folder: Path, config: Config, keeps_gradients: bool, threads: int
) -> tuple[float, float]:
    """Median seconds of a micro step, and of the norm, the clipping and the update.

    Of one process, in the memory that a run takes. The weights are new ones, and stay as they are.
    """
    torch.set_num_threads(threads)
    distributed.keep_memory()  # as a rank does
    train, data = config.train.model_copy(update={"torch_compile": False}), config.data
    own = (config.model, train.precision, config.run.seed, config.adapter)
    causal_lm = build_causal_lm(folder, "scratch", *own)
    loss_model = CausalLMLoss(causal_lm, train, CPU, data.packing, data.seq_len)
    plan, world = config.batch_plan(1), World(0, 0, 1, 1, CPU)
    strategy = DataParallel(loss_model, config.optim, train.precision, plan, world)
    strategy.optimizer.set_learning_rate(0.0)
    vocabulary = len(causal_lm.get_input_embeddings().weight)
    batch = plain_batch(train.micro_batch_size, data.seq_len, data.packing, vocabulary)
    times, is_bad, until = [], torch.zeros(()), time.monotonic() + SECONDS
    while len(times) < LEAST or time.monotonic() < until:
        for _ in range(1 + keeps_gradients):  # the second finds gradients
            started = now()
            strategy.scaler.scale(loss_model(*batch)).backward()
        between = now()
        _, norm = strategy.gradients((), 1)
        strategy.update(is_bad, norm, config.optim.max_grad_norm)
        times.append((between - started, now() - between))
    micro, update = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return micro, update


def now() -> float:
    """Seconds of work of this thread, so that what others do meanwhile does not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
