"""Which samples a step consumes, computed from the step alone.

The stream of samples is infinite: position i is sample ``perm(seed, epoch)(i mod N)`` of epoch
``i div N``, with N samples. In a mixture by weight each data set has its own such stream, and the
position decides from which data set it takes. Step s (from 0) consumes positions
``[s*G, (s+1)*G)`` with G the global batch size; rank r of W takes every W-th of them. Nothing is
stored, so any step is reached at once, at any world size.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUNDS = 12
BLOCK = 1024  # positions of a mixture in which each data set has its share
AHEAD = 16384  # samples that are computed at once: arrays cost as much for a few as for many
HASH_BITS = 52  # sums of two 26-bit halves stay exact in float64


class Permutation:
    """A keyed bijection of ``range(n)``, computed per index: O(1) memory, no list of n.

    A balanced Feistel network over the smallest even number of bits that holds n. While a result
    is n or more, the network is applied to it once more (cycle walking; Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): fewer than four times on average.
    """

    def __init__(self, n: int, seed: int, epoch: int | str):
        self.n = n
        self.half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half_bits)) - 1)
        key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
        self.keys = np.frombuffer(key, "<u8") + np.arange(ROUNDS, dtype=np.uint64)
        _mix(self.keys, np.empty_like(self.keys))

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Map int64 indices in ``range(n)``, of any shape, to distinct ones of the same shape."""
        values = self._encrypt(np.asarray(indices).astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.mask
        new, spare = np.empty_like(values), np.empty_like(values)
        for key in self.keys:
            _mix(np.bitwise_xor(right, key, out=new), spare)
            new &= self.mask
            new ^= left
            left, right, new = right, new, left
        left <<= self.half_bits
        left |= right
        return left


def _mix(values: np.ndarray, spare: np.ndarray) -> None:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit depends on every bit.

    In place, on uint64, with a spare array of its size: new ones would take half of the time.
    """
    values += np.uint64(0x9E3779B97F4A7C15)  # arrays of integers wrap around
    values ^= np.right_shift(values, np.uint64(30), out=spare)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= np.right_shift(values, np.uint64(27), out=spare)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= np.right_shift(values, np.uint64(31), out=spare)


class Mixture:
    """Interleaves data sets by weight: for each position, which data set and which of its samples.

    Positions come in blocks of BLOCK. In each block every data set has as many *turns* as its
    weight says; a permutation of the block decides at which positions. The *draw* of a position is
    how many samples its data set gave before it: draw d is position d of that data set's own
    stream. Both follow from the number of the block, so any position is computed by itself. The
    samples of all data sets are numbered one after the other: first those of the first one.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """``sizes``: samples of each data set, none of them 0; ``weights``: shares, of any sum."""
        self.sizes, self.seed = list(sizes), seed
        self.firsts = np.cumsum([0, *sizes[:-1]])
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not a binary number
        self.shares = [weight / sum(exact) for weight in exact]
        self.largest = self.shares.index(max(self.shares))

    def drawn_before(self, block: int) -> np.ndarray:
        """How many samples each data set gives to all blocks before one, int64 [data sets].

        Within one sample of its share; the largest takes what rounding leaves. Each data set rounds
        up from a fraction of its own: else equal weights would all be rounded down together, and
        the largest would have to take up to a sample of each.
        """
        drawn = []
        for number, share in enumerate(self.shares):
            point = Fraction(2 * number + 1, 2 * len(self.shares))
            drawn.append(int(block * BLOCK * share + point))
        drawn[self.largest] += block * BLOCK - sum(drawn)
        return np.array(drawn, np.int64)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at positions, both int64 [positions]."""
        blocks, offsets = np.divmod(positions, BLOCK)
        samples = np.empty_like(positions)
        for block in np.unique(blocks):
            here = blocks == block
            turns, draws = self._turns(int(block))
            samples[here] = self._samples(turns[offsets[here]], draws[offsets[here]])
        return samples

    def _turns(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a block: the number of its data set, and its draw."""
        before = self.drawn_before(block)
        counts = self.drawn_before(block + 1) - before
        order = Permutation(BLOCK, self.seed, f"mixture/{block}")(np.arange(BLOCK))
        turns = np.repeat(np.arange(len(self.sizes)), counts)[order]
        draws = np.empty(BLOCK, np.int64)
        for number, count in enumerate(counts.tolist()):
            draws[turns == number] = before[number] + np.arange(count)
        return turns, draws

    def _samples(self, turns: np.ndarray, draws: np.ndarray) -> np.ndarray:
        samples = np.empty_like(draws)
        for number in np.unique(turns):
            here = turns == number
            own = stream(draws[here], self.sizes[number], self.seed, f"{number}/")
            samples[here] = self.firsts[number] + own
        return samples


def mixture_of(sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> Mixture | None:
    """The mixture of data sets; None if they have no weights: then all samples are alike."""
    return Mixture(sizes, weights, seed) if any(weights) else None


def stream(positions: np.ndarray, size: int, seed: int, name: str = "") -> np.ndarray:
    """The samples at positions of the stream of ``size`` samples, called ``name``; int64."""
    epochs, offsets = np.divmod(positions, size)
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = Permutation(size, seed, f"{name}{epoch}")(offsets[here])
    return samples


class StepOrder:
    """The samples of every step, of all ranks, at any world size.

    ``left_out``: windows that rollbacks left out, each ``{"after": step, "steps": n}``: beyond that
    step the data runs n steps ahead. ``mixture``: of several data sets by weight; without it, all
    samples are alike.
    """

    def __init__(
        self, total_samples: int, global_batch_size: int, seed: int,
        left_out: Sequence[dict[str, int]] = (), mixture: Mixture | None = None,
    ):  # fmt: skip
        self.total_samples = total_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.left_out = left_out
        self.mixture = mixture
        self._known = (0, np.zeros(0, np.int64))  # position, and samples from there on

    def all_samples_at(self, step: int) -> np.ndarray:
        """The samples of one step (from 0) of all ranks, int64 [global_batch_size]."""
        ahead = sum(window["steps"] for window in self.left_out if step >= window["after"])
        position, (begin, known) = (step + ahead) * self.global_batch_size, self._known
        if not begin <= position <= begin + len(known) - self.global_batch_size:
            number = max(self.global_batch_size, min(AHEAD, self.total_samples))
            begin, known = self._known = position, self.at(np.arange(position, position + number))
        return known[position - begin : position - begin + self.global_batch_size]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at positions of the infinite stream, both int64 [positions]."""
        if self.mixture is not None:
            return self.mixture.at(positions)
        return stream(positions, self.total_samples, self.seed)


def samples_hash(samples: np.ndarray) -> int:
    """An order-independent hash of samples, HASH_BITS long.

    The hash of several arrays together is the sum of theirs modulo 2**HASH_BITS.
    """
    return int(hashes_of_rows(np.reshape(samples, (1, -1)))[0])


def hashes_of_rows(samples: np.ndarray) -> np.ndarray:
    """The same of each row, uint64 [rows]."""
    mixed = np.asarray(samples).astype(np.uint64)
    _mix(mixed, np.empty_like(mixed))
    mixed >>= np.uint64(64 - HASH_BITS)
    return mixed.sum(axis=1, dtype=np.uint64) % np.uint64(2**HASH_BITS)
