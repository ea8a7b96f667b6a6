"""What the own times of the ranks say: to the metrics, ranks.json, the log and the history."""

import logging
import socket
import threading
import time

import torch

from trainstack import distributed
from trainstack.resilience.evidence import find_evidence
from trainstack.resilience.slow_ranks import SlowRanks, median_of_others
from trainstack.train.attempt import Attempt
from trainstack.train.numbers import StepResult

log = logging.getLogger("trainstack")
MOST_KEPT = 64  # steps, until they are summed up: each then costs the loop an append
SHOWN_SECONDS = 2  # between two writes of ranks.json


class Ranks:
    """Every rank judges, rank 0 tells, and a slow one leaves its evidence. Collective to create."""

    def __init__(self, attempt: Attempt):
        self.attempt, size = attempt, attempt.world.world_size
        self.hosts = distributed.gather(socket.gethostname()) if size > 1 else []
        self.judge = SlowRanks()
        self._kept, self._steps = [], 0  # own times since the last log line; how many steps
        self._data_seconds = 0.0  # of a step, before that line
        self._shown_at = 0.0

    def note(self, result: StepResult) -> None:
        """Count a step; name who has become slow, or is no longer."""
        if not (seconds := result.rank_seconds):  # alone, for one
            return
        self._kept.append(seconds)
        self._steps += 1
        if len(self._kept) == MOST_KEPT:
            self._kept = [[sum(column) for column in zip(*self._kept, strict=True)]]
        for change in self.judge.note(seconds, result.clock):
            text = f"rank {change.rank} on {self.hosts[change.rank]}: {change}"
            if self.attempt.world.is_main:
                log.warning("slow    step %s: %s", f"{result.step:,}", text)
                self.attempt.run.add_event(
                    "slow_rank" if change.is_slow else "slow_rank_over", step=result.step,
                    cause=text, rank=change.rank, host=self.hosts[change.rank],
                    own_seconds=change.seconds, others_seconds=change.others_seconds,
                )  # fmt: skip
            if change.is_slow and change.rank == self.attempt.world.rank:
                threading.Thread(target=self._leave_evidence, daemon=True).start()

    def _leave_evidence(self) -> None:
        """What this host says of it, in the log of this rank and beside it; takes seconds."""
        world, owner = self.attempt.world, self.attempt.owner
        is_gpu = world.device.type == "cuda"
        gpu = f"GPU-{torch.cuda.get_device_properties(world.device).uuid}" if is_gpu else None
        text = find_evidence(self._data_seconds, gpu)
        log.warning("slow    %s: %s", self.hosts[world.rank], text)
        self.attempt.run.add_evidence(owner.job, owner.attempt, world.rank, text)

    def read(self, step: int, data_seconds: float) -> dict[str, float]:
        """Which rank took longest since the last call, and how many times the median of the others.

        Rank 0 shows all of them, for the monitor.
        """
        self._data_seconds = data_seconds
        if not self._steps:
            return {}
        means = [sum(column) / self._steps for column in zip(*self._kept, strict=True)]
        self._kept, self._steps = [], 0
        if self.attempt.world.is_main and time.monotonic() - self._shown_at > SHOWN_SECONDS:
            self._shown_at = time.monotonic()
            self.attempt.run.show_ranks(step=step, hosts=self.hosts, seconds=means)
        slowest = means.index(max(means))
        ratio = means[slowest] / median_of_others(means, slowest)
        return {"slowest_rank": slowest, "slowest_ratio": round(ratio, 3)}
