"""Which samples a step consumes, computed from the step alone, and their batches.

The stream of samples is infinite: position i is sample ``perm(seed, epoch)(i mod N)`` of epoch
``i div N``. Step s (from 0) consumes positions ``[s*G, (s+1)*G)`` with G the global batch size;
rank r of W takes every W-th of them. Nothing is stored, so any step at any world size is reached
in microseconds and without memory.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DistributedSampler

ROUNDS = 12
HASH_BITS = 52  # sums of two 26-bit halves stay exact in float64


class Permutation:
    """A keyed bijection of ``range(n)``, computed per index: O(1) memory, no list of n.

    A balanced Feistel network over the smallest even number of bits that holds n, walked until the
    value falls below n (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002). Fewer than four walks on average.
    """

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self.half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half_bits)) - 1)
        key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
        start = int.from_bytes(key, "little")
        self.keys = [_mix_one((start + number) % 2**64) for number in range(ROUNDS)]

    def one(self, index: int) -> int:
        """The same for a single index, without arrays: their handling takes ten times the work."""
        half, mask = int(self.half_bits), int(self.mask)
        while True:
            left, right = index >> half, index & mask
            for key in self.keys:
                left, right = right, left ^ (_mix_one(right ^ key) & mask)
            index = (left << half) | right
            if index < self.n:
                return index

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Map int64 indices in ``range(n)``, of one dimension or more, to distinct ones."""
        values = self._encrypt(np.asarray(indices).astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.mask
        for key in np.array(self.keys, np.uint64):
            left, right = right, left ^ (_mix(right ^ key) & self.mask)
        return (left << self.half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit depends on every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays of integers wrap around
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_one(value: int) -> int:
    """The same for an int of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    value = (value ^ value >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    return value ^ value >> 31


class StepSampler(DistributedSampler):
    """A DistributedSampler whose samples are a function of the step, at any world size.

    Iterating yields this rank's sample indices without end from ``first_step`` on; ``samples_at``
    gives one step's directly, for this or any other rank. ``left_out``: windows that rollbacks
    left out, ``{"after": step, "steps": n}``: beyond that step the data runs n steps ahead.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int = 0,
        left_out: Sequence[dict[str, int]] = (),
    ):
        dataset = range(num_samples)
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.total_samples = num_samples
        self.global_batch_size = global_batch_size
        self.first_step = first_step
        self.left_out = left_out

    def samples_at(self, step: int, rank: int | None = None) -> np.ndarray:
        """Sample indices of one step (from 0), int64 [global_batch_size / world_size]."""
        rank = self.rank if rank is None else rank
        return self.at(self._positions_at(step)[rank :: self.num_replicas])

    def all_samples_at(self, step: int) -> np.ndarray:
        """Sample indices of one step (from 0) of all ranks, int64 [global_batch_size]."""
        return self.at(self._positions_at(step))

    def _positions_at(self, step: int) -> np.ndarray:
        first = self._first_position(step)
        return np.arange(first, first + self.global_batch_size)

    def _first_position(self, step: int) -> int:
        ahead = sum(window["steps"] for window in self.left_out if step >= window["after"])
        return (step + ahead) * self.global_batch_size

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at positions of the infinite stream."""
        epochs, offsets = np.divmod(positions, self.total_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permute = Permutation(self.total_samples, self.seed, int(epoch))
            samples[here] = permute(offsets[here])
        return samples

    def __iter__(self) -> Iterator[int]:
        yield self.first_sample()
        yield from self.samples_at(self.first_step)[1:].tolist()
        for step in itertools.count(self.first_step + 1):
            yield from self.samples_at(step).tolist()

    def first_sample(self) -> int:
        """The first index of ``first_step``, in microseconds."""
        position = self._first_position(self.first_step) + self.rank
        epoch, offset = divmod(position, self.total_samples)
        return Permutation(self.total_samples, self.seed, epoch).one(offset)


def samples_hash(samples: np.ndarray) -> int:
    """An order-independent hash of samples; hashes of parts add up modulo 2**HASH_BITS."""
    mixed = _mix(np.asarray(samples).astype(np.uint64)) >> np.uint64(64 - HASH_BITS)
    return int(mixed.sum(dtype=np.uint64)) % 2**HASH_BITS


def micro_batches(
    samples: np.ndarray,
    micro_batch_size: int,
    read: Callable[[np.ndarray], np.ndarray],
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batch of each micro step, all int64 [micro_batch_size, seq_len].

    ``read`` gives its parts for some samples as one array: inputs, labels (shifted by one already)
    and, where documents do not see each other, positions.
    """
    for start in range(0, len(samples), micro_batch_size):
        parts = torch.from_numpy(read(samples[start : start + micro_batch_size]))
        if device.type == "cuda":
            parts = parts.pin_memory().to(device, non_blocking=True)
        yield parts.unbind()
