"""One step of training, its numbers read one step late, and the evaluation."""

import contextlib
import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainstack.config.load import BatchPlan
from trainstack.distributed import World

Batch = tuple[torch.Tensor, ...]  # inputs, labels, positions: int64 [micro_batch_size, seq_len]


def compute_gradients(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
    plan: BatchPlan,
    target_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward passes of one step: this rank's sum of losses, the global gradient norm.

    The only place that knows of micro steps. The loss is divided by the global number of target
    tokens; DDP averages gradients over ranks, hence the factor world_size. Both results stay on the
    device. Collective: every rank must call this.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for micro_step, batch in enumerate(batches, start=1):
        is_last = micro_step == plan.gradient_accumulation_steps
        with contextlib.nullcontext() if is_last else model.no_sync():
            loss = model(*batch)
            scaler.scale(loss * (plan.world_size / target_tokens)).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    return loss_sum, nn.utils.get_total_norm([p.grad for p in _with_gradients(model)])


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    grad_norm: torch.Tensor,
    max_grad_norm: float | None,
) -> None:
    """Clip the gradients to ``max_grad_norm``, let the optimizer use them, and drop them."""
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(_with_gradients(model), max_grad_norm, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def warm_up(model: DistributedDataParallel, batches: Iterator[Batch]) -> None:
    """One forward and backward pass whose gradients are thrown away. Collective.

    DDP regroups its buckets after its first backward pass, and with three or more ranks the order
    of summation depends on the grouping. Done before the first step of every life, a resumed run
    sums as one that was never stopped. It also compiles, and finds out whether memory suffices.
    """
    model(*next(batches)).backward()
    model.zero_grad(set_to_none=True)


@dataclass
class StepResult:
    """The numbers of one step, the same on every rank."""

    step: int
    loss: float
    grad_norm: float
    is_withheld: bool  # the update was bad and did not happen
    is_stop_wanted: bool
    is_save_wanted: bool
    samples_hash: str
    sent_at: float  # seconds on the clock of time.perf_counter
    at: float  # the same moment in seconds since 1970

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class StepNumbers:
    """Sends a step's numbers to the host without waiting; they are read when the next step runs.

    The one reduction and the one device-to-host copy of a step carry loss, norm, verdict, wishes
    and the hash of the consumed samples together.
    """

    HALF = 26  # bits; sums of 2**26 halves are exact in float64

    def __init__(self, device: torch.device):
        self.device = device
        self._pending: tuple | None = None

    def send(
        self,
        step: int,
        loss_sum: torch.Tensor,
        grad_norm: torch.Tensor,
        target_tokens: int,
        wishes: tuple[bool, bool],
        samples_hash: int,
        judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Reduce over ranks, judge, and start the copy; returns the verdict, on the device.

        ``wishes``: whether this rank wants to stop, and to save. ``judge`` gets the global loss and
        norm and gives 1.0 where the update must not happen. Collective: every rank must call this.
        """
        high, low = divmod(samples_hash, 1 << self.HALF)
        own = torch.tensor([*map(float, wishes), high, low], dtype=torch.float64)
        own = own.to(self.device, non_blocking=True)
        numbers = torch.cat([loss_sum.reshape(1), own])
        dist.all_reduce(numbers)
        is_bad = judge(numbers[0] / target_tokens, grad_norm)
        numbers = torch.cat(
            [numbers, torch.stack([grad_norm.to(torch.float64), is_bad.to(torch.float64)])]
        )
        event = None
        if self.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = host
        self._pending = (step, numbers, event, target_tokens, time.perf_counter(), time.time())
        return is_bad

    def read(self) -> StepResult | None:
        """The numbers sent last; None where they were read already."""
        if self._pending is None:
            return None
        step, numbers, event, target_tokens, sent_at, at = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        loss_sum, stop, save, high, low, norm, bad = numbers.tolist()
        total = (int(high) * (1 << self.HALF) + int(low)) % (1 << 2 * self.HALF)
        return StepResult(
            step, loss_sum / target_tokens, norm, bad > 0, stop > 0, save > 0, f"{total:013x}",
            sent_at, at,
        )  # fmt: skip


class Pace:
    """Seconds per step and per batch since the last log line, by when steps were sent off.

    A step's numbers are read one step late, so the time of reading says nothing about its length.
    """

    def __init__(self):
        self.step_seconds = 0.0  # of the last step, for who has to plan ahead
        self.restart()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the time spent on getting them noted."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._data_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def note(self, sent_at: float) -> None:
        """Count one finished step."""
        self._steps += 1
        self.step_seconds = sent_at - self._last_sent_at
        self._last_sent_at = sent_at

    def read(self) -> tuple[float, float]:
        """Mean step_seconds and data_seconds of the steps noted since the last call."""
        steps = max(1, self._steps)
        step_seconds = (self._last_sent_at - self._since) / steps
        data_seconds = self._data_seconds / steps
        self._steps, self._since, self._data_seconds = 0, self._last_sent_at, 0.0
        return step_seconds, data_seconds

    def restart(self) -> None:
        """Leave out what was not training: an evaluation, a save. No step may be unread."""
        self._since = self._last_sent_at = time.perf_counter()
        self._steps, self._data_seconds = 0, 0.0


@torch.no_grad()
def evaluate(
    loss_model: nn.Module,
    batches: Iterable[Batch],
    rounds: int,
    ignored_label: int,
    world: World,
    wants_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss in nats over every held-out target token, and their number; None if broken off.

    ``batches`` are this rank's share; shares may differ in size, none has more than ``rounds``.
    ``wants_stop`` is asked in every round and agreed on. Collective: every rank must call.
    """
    loss_model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches = iter(batches)
    try:
        for _ in range(rounds):
            if is_agreed(wants_stop(), world):
                return None
            for batch in itertools.islice(batches, 1):
                sums[0] += loss_model(*batch)
                sums[1] += (batch[1] != ignored_label).sum()
    finally:
        loss_model.train()
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    return loss / max(1, tokens), int(tokens)


def is_agreed(is_wanted: bool, world: World) -> bool:
    """Whether any rank wants it. Collective: every rank must call this."""
    wish = torch.tensor(float(is_wanted), device=world.device)
    dist.all_reduce(wish)
    return bool(wish > 0)


@torch.no_grad()
def generate_text(causal_lm: nn.Module, tokenizer, prompt: str, tokens: int, seed: int) -> str:
    """The prompt and what the model says next, drawn with a fixed seed."""
    causal_lm.eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(next(causal_lm.parameters()).device)
    output = causal_lm.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    causal_lm.train()
    return tokenizer.decode(output[0], skip_special_tokens=True)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def is_due(step: int, every: int | str | None, max_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == max_steps or (isinstance(every, int) and step % every == 0)
