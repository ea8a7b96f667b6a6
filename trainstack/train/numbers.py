"""One step of training, its numbers read one step late, and the evaluation."""

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from trainstack.model.ddp import Batch


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


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def is_due(step: int, every: int | str | None, max_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == max_steps or (isinstance(every, int) and step % every == 0)
