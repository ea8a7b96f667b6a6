"""A step's numbers: sent to the host without waiting, read one step late; and its pace."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainstack.data.feed import StepData
from trainstack.data.order import HASH_BITS


class Requested(NamedTuple):
    """What one rank requests; after the reduction, what any rank did."""

    stop: bool  # the clock, the stop file or a signal
    save: bool  # checkpoint.save_steps=auto


@dataclass
class StepResult:
    """The numbers of one step, the same on every rank."""

    step: int
    loss: float
    grad_norm: float
    is_withheld: bool  # the update was bad and did not happen
    requested: Requested  # by any rank
    samples_hash: str
    rank_seconds: list[float]  # own time of each rank, one step earlier; empty: alone, or unknown
    clock: float  # of rank 0 when it sent them, in seconds
    sent_at: float  # seconds on the clock of time.perf_counter
    at: float  # the same moment in seconds since 1970
    token_accuracy: float = 0.0  # share of targets with the largest logit, if they were counted


class StepNumbers:
    """Sends a step's numbers to the host, which reads them while the next step runs.

    Waiting for them at once would leave the GPU idle between two steps. One reduction and one copy
    carry everything: loss, hits, gradient norm, verdict, requests, the hash of the consumed
    samples, and the own time of each rank, by which a slow one is found: from the return of a
    reduction until the next begins. No other rank is waited for in it.
    """

    def __init__(self, device: torch.device):
        self.device, self.rank, self.ranks = device, dist.get_rank(), dist.get_world_size()
        self.is_alone = self.ranks == 1
        self._sent: tuple | None = None  # what ``read`` makes a StepResult of
        # Where the own time of this step began and ended; how long that of the step before was.
        self._began = self._ended = None
        self._own_seconds = 0.0

    def before_waiting(self) -> None:
        """The own time of this step ends here: from now on this rank waits for others."""
        if not self.is_alone:
            self._ended = self._now()

    def _now(self) -> float | torch.cuda.Event:
        """A moment of this rank; on a GPU, when its stream gets here, without waiting for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def send(
        self,
        step: int,
        data: StepData,
        loss_sum: torch.Tensor,
        grad_norm: torch.Tensor,
        requested: Requested,
        judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        hits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reduce over ranks, judge, start the copy; returns the verdict, a scalar on the device.

        ``loss_sum``, and ``hits`` if they were counted: this rank's; ``grad_norm``: of all ranks.
        ``judge`` gets the mean loss over all ranks and the norm, and gives 1.0 if the update must
        not happen. Collective: every rank must call this.
        """
        # float64 holds whole numbers up to 2**53 exactly; halves of the hash leave room for sums.
        high, low = divmod(data.samples_hash, 1 << HASH_BITS // 2)
        own = [0.0, *map(float, requested), high, low]
        if not self.is_alone:
            seconds = [0.0] * self.ranks
            seconds[self.rank] = self._own_seconds
            own += [0.0 if self.rank else time.perf_counter(), *seconds]
        own = torch.tensor(own, dtype=torch.float64)
        numbers = torch.cat((loss_sum.reshape(1), own.to(self.device, non_blocking=True)))
        if hits is not None:
            numbers[1] = hits
        between = self._began, self._ended
        if not self.is_alone:
            dist.all_reduce(numbers)
            self._began, self._ended = self._now(), None
        is_bad = judge(numbers[0] / data.target_tokens, grad_norm)
        sent, event = (numbers, grad_norm, is_bad), None
        if self.device.type == "cuda":
            # Into pinned memory, or the copy would wait for the GPU after all.
            whole = torch.cat([each.reshape(-1).to(torch.float64) for each in sent])
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            host.copy_(whole, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            sent = (host,)
        at = time.perf_counter(), time.time()
        self._sent = step, data.target_tokens, sent, event, between, *at
        return is_bad

    def read(self) -> StepResult | None:
        """The numbers sent last; None if they were read already."""
        if self._sent is None:
            return None
        (step, target_tokens, sent, event, between, sent_at, at), self._sent = self._sent, None
        if event is not None:  # the copy from a GPU may still be under way
            event.synchronize()
        values = [value for each in sent for value in each.reshape(-1).tolist()]
        loss_sum, hits, stop, save, high, low, *of_ranks, norm, bad = values
        self._own_seconds = seconds_between(*between)
        if self._ended is None:  # read at once: what comes before the next step is not of it
            self._began = None
        total = (int(high) * (1 << HASH_BITS // 2) + int(low)) % (1 << HASH_BITS)
        return StepResult(
            step=step, loss=loss_sum / target_tokens, grad_norm=norm, is_withheld=bad > 0,
            requested=Requested(stop > 0, save > 0), samples_hash=f"{total:013x}",
            rank_seconds=[] if 0.0 in of_ranks else of_ranks[1:],
            clock=sum(of_ranks[:1]), sent_at=sent_at, at=at,
            token_accuracy=hits / target_tokens,
        )  # fmt: skip


def seconds_between(began: float | torch.cuda.Event | None, ended) -> float:
    """From one moment of a rank to a later one, both passed; 0 if the first is not known."""
    if began is None:
        return 0.0
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000


class Pace:
    """Seconds per step and for data since the last log line, by when steps were sent off.

    A step's numbers are read one step late, so the time of reading says nothing about its length.
    """

    def __init__(self):
        self.step_seconds = 0.0  # of the last step, to plan ahead with
        self.restart()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Note the time that a batch takes to arrive."""
        started = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - started

    def note(self, sent_at: float) -> None:
        """Count one finished step."""
        self._steps += 1
        self.step_seconds = sent_at - self._last_sent_at
        self._last_sent_at = sent_at

    def read(self) -> tuple[float, float]:
        """Mean step_seconds and data_seconds of the steps noted since the last call."""
        steps = max(1, self._steps)
        means = (self._last_sent_at - self._since) / steps, self._data_seconds / steps
        self._steps, self._since, self._data_seconds = 0, self._last_sent_at, 0.0
        return means

    def restart(self) -> None:
        """Leave out what was not training: an evaluation, a save. No step may be unread."""
        self._since = self._last_sent_at = time.perf_counter()
        self._steps, self._data_seconds = 0, 0.0


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the GPU if it has one, else resident.

    Not getrusage: it counts what the process was before it was this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0  # not every kernel tells
