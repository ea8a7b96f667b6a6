"""Feed: what a step consumes, from its number alone."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from trainstack.config.batch import BatchPlan
from trainstack.config.schema import Config
from trainstack.data.corpus import Corpus, Joined
from trainstack.data.order import Mixture, StepOrder, mixture_of, samples_hash
from trainstack.data.packing import document_bounds
from trainstack.data.split import Split
from trainstack.distributed import World

# Inputs, labels (shifted by one already) and, if documents do not see each other, positions; each
# int64 [micro_batch_size, seq_len]. Then also their bounds, see packing.document_bounds.
Batch = tuple[torch.Tensor, ...]


@dataclass
class StepData:
    """What one rank consumes in one step."""

    samples: np.ndarray  # this rank's, int64 [global_batch_size / world_size]
    batches: Iterator[Batch]  # of these samples, one for each micro step; read when asked for
    target_tokens: int  # over all ranks
    samples_hash: int  # of this rank's samples; hashes of ranks add up, see order.samples_hash


class StepSampler(StepOrder, DistributedSampler):
    """A DistributedSampler whose samples are a function of the step, at any world size."""

    def __init__(
        self, num_samples: int, global_batch_size: int, rank: int, world_size: int, seed: int,
        left_out: Sequence[dict[str, int]] = (), mixture: Mixture | None = None,
    ):  # fmt: skip
        DistributedSampler.__init__(
            self, range(num_samples), num_replicas=world_size, rank=rank, seed=seed, drop_last=True
        )
        StepOrder.__init__(self, num_samples, global_batch_size, seed, left_out, mixture)

    def __iter__(self) -> Iterator[int]:
        """This rank's samples, step by step, without end."""
        for step in itertools.count():
            yield from self.samples_at(step).tolist()

    def samples_at(self, step: int) -> np.ndarray:
        """This rank's samples of one step (from 0), int64 [global_batch_size / world_size]."""
        return self.all_samples_at(step)[self.rank :: self.num_replicas]


class Feed:
    """Gives every step its samples. Nothing is stored: any step is reached at once, by any rank."""

    def __init__(
        self, config: Config, corpus: Corpus, plan: BatchPlan, world: World,
        left_out: list[dict[str, int]],
    ):  # fmt: skip
        """``left_out``: windows of data that rollbacks left out, see StepOrder."""
        weights = [section.weight for section in config.data.sources]
        mixture = mixture_of(corpus.sizes, weights, config.run.seed)
        self.corpus, self.plan, self.world = corpus, plan, world
        self.sampler = StepSampler(
            corpus.train.num_samples, plan.global_batch_size, world.rank, world.world_size,
            config.run.seed, left_out=left_out, mixture=mixture,
        )  # fmt: skip

    def at(self, step: int) -> StepData:
        """What this rank consumes in a step (from 1)."""
        samples, train = self.sampler.samples_at(step - 1), self.corpus.train
        batches = micro_batches(samples, self.plan.micro_batch_size, train, self.world.device)
        targets = self.plan.tokens_per_step
        if not train.is_full:  # each rank can compute those of all, so nothing is sent
            targets = train.target_tokens(self.sampler.all_samples_at(step - 1))
        # A step may have none: its loss and gradient are zero.
        return StepData(samples, batches, max(1, targets), samples_hash(samples))

    def drawn_after(self, step: int, drawn: list[int] | None) -> list[int] | None:
        """``drawn``, the sequences of each data set of a mixture so far, and those of a step.

        Of all ranks. None, of a single data set, stays None.
        """
        if drawn is None:
            return None
        data_sets = self.corpus.train.data_sets_of(self.sampler.all_samples_at(step - 1))
        return (np.bincount(data_sets, minlength=len(drawn)) + drawn).tolist()

    def by_source(self, drawn: list[int] | None) -> dict[str, dict[str, float]]:
        """The same as tokens and as epochs, each by the data set's label; empty of a single one."""
        if drawn is None:
            return {}
        labels, sizes, seq_len = self.corpus.stores, self.corpus.sizes, self.plan.seq_len
        rows = list(zip(labels, drawn, sizes, strict=True))
        return {
            "source_tokens": {label: number * seq_len for label, number, _ in rows},
            "source_epochs": {label: number / size for label, number, size in rows},
        }


def held_out_batches(
    split: Split, most: int | None, size: int, world: World
) -> tuple[Iterator[Batch], int]:
    """This rank's batches of ``size`` held-out samples, and how many the rank with most has.

    Rank r of W takes every W-th batch, so that which samples share one is alike at any world size.
    ``most``: samples that are used over all ranks; None: all.
    """
    samples = np.arange(min(split.num_samples, most or split.num_samples))
    own = samples[samples // size % world.world_size == world.rank]
    rounds = -(-len(samples) // (world.world_size * size))
    return micro_batches(own, size, split, world.device), rounds


def micro_batches(
    samples: np.ndarray, micro_batch_size: int, split: Split | Joined, device: torch.device
) -> Iterator[Batch]:
    """The batch of each micro step, on the device."""
    for start in range(0, len(samples), micro_batch_size):
        columns = split.read(samples[start : start + micro_batch_size])
        batch = (*torch.from_numpy(columns).unbind(),)
        if len(columns) == 3:  # as many bounds in each batch, so that nothing is compiled again
            most = split.most_documents * columns.shape[1]
            bounds = document_bounds(columns[2], columns[1], most)
            batch = (*batch, torch.from_numpy(bounds))
        if device.type == "cuda":  # what shares memory cannot be pinned
            batch = tuple(
                tensor.contiguous().pin_memory().to(device, non_blocking=True) for tensor in batch
            )
        yield batch
