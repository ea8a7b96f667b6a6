"""Attempt: what this attempt was asked to do, and for which run."""

from dataclasses import dataclass

from trainstack.config.batch import BatchPlan
from trainstack.config.schema import Config
from trainstack.distributed import World
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, Owner


@dataclass(frozen=True)
class Attempt:
    """The same from the start of an attempt to its end."""

    config: Config
    world: World  # this process among its peers
    plan: BatchPlan  # how a step is spread over processes
    run: RunFolder
    lease: Lease  # taken by rank 0
    owner: Owner  # job and number of the attempt
    max_steps: int
    samples: int  # of an epoch

    @property
    def id(self) -> str:
        """JOB.N, as records and file names have it."""
        return f"{self.owner.job}.{self.owner.attempt}"

    def is_due(self, step: int, every: int | str | None) -> bool:
        """Whether what happens every so many steps, or once an epoch, happens after this step.

        At the end of the run it always does. An epoch ends within a step; it is due after that one.
        """
        if every == "epoch":
            size = self.plan.global_batch_size
            return step == self.max_steps or step * size % self.samples < size
        return step == self.max_steps or (isinstance(every, int) and step % every == 0)

    def is_logged(self, step: int) -> bool:
        """Whether a step has a log line."""
        return step == 1 or self.is_due(step, self.config.log.logging_steps)
