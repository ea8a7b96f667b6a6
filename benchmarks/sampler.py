"""How soon a step's samples are known: our StepSampler beside torch's DistributedSampler.

Of 10 million samples, in steps of 512 over 8 ranks. First step: make the sampler and ask for step
0, as train.py does; that the first call computes 16,384 samples ahead counts. Seek: the same for a
step in the middle of the epoch, which DistributedSampler can only reach by making the list of the
whole epoch. Memory: the peak of Python's and numpy's allocations meanwhile, by tracemalloc. For
information: what a step costs once the sampler is made, on average.
"""

import itertools
import statistics
import sys
import time
import tracemalloc

from torch.utils.data import DistributedSampler

from trainstack.data.feed import StepSampler

SAMPLES, RANKS, BATCH, ROUNDS = 10_000_000, 8, 512, 5
LEAST_RATIO, MOST_BYTES = 100, 2 << 20
MIDDLE = SAMPLES // BATCH // 2  # step


def ours(step: int, samples: int = SAMPLES) -> list[int]:
    sampler = StepSampler(samples, BATCH, 3, RANKS, seed=1)
    return sampler.samples_at(step).tolist()


def theirs(step: int) -> list[int]:
    sampler = DistributedSampler(range(SAMPLES), RANKS, 3, seed=1)
    sampler.set_epoch(0)
    own = BATCH // RANKS
    return list(itertools.islice(sampler, step * own, (step + 1) * own))


def seconds(action, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - started) / times


def peak_bytes(action) -> int:
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def seconds_a_step() -> float:
    """Of consecutive steps, those that compute ahead included."""
    sampler = StepSampler(SAMPLES, BATCH, 3, RANKS, seed=1)
    steps = itertools.count()
    return seconds(lambda: sampler.samples_at(next(steps)), 2000)


def main() -> int:
    ours(0)  # imports and caches
    ratios = {}
    for name, step in (("first step", 0), ("seek", MIDDLE)):
        rounds = []
        for _ in range(ROUNDS):
            peer = seconds(lambda step=step: theirs(step), 1)
            own = seconds(lambda step=step: ours(step), 50)
            rounds.append((peer, own, peer / own))
        peer, own, ratios[name] = map(statistics.median, zip(*rounds, strict=True))
        print(f"{name}: DistributedSampler {peer:.3f} s, StepSampler {own * 1e6:,.0f} us, "
              f"{ratios[name]:,.0f} times faster")  # fmt: skip
    trillion = seconds(lambda: ours(10**9, 10**12), 50)
    print(f"seek, at 1e12 samples to step 1e9: {trillion * 1e6:,.0f} us")
    print(f"a step, on average: {seconds_a_step() * 1e6:.1f} us")
    memory, peers = peak_bytes(lambda: ours(MIDDLE)), peak_bytes(lambda: theirs(MIDDLE))
    print(f"memory: DistributedSampler {peers:,} bytes, StepSampler {memory:,} bytes")
    worst = min(ratios.values())
    holds = worst >= LEAST_RATIO and memory <= MOST_BYTES
    verdict = "holds" if holds else "falls short"
    print(f"sampler: target {LEAST_RATIO:,} times faster in {MOST_BYTES:,} bytes, measured "
          f"{worst:,.0f} times in {memory:,} bytes, {verdict}")  # fmt: skip
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
