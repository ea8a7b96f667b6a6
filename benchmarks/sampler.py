"""How soon any index is there: our StepSampler beside torch's DistributedSampler.

Of 10 million samples over 8 ranks. First index: construct, ask for one. Seek: go on in the middle
of the epoch, which DistributedSampler can only do by making the whole epoch's list. Memory: the
peak of Python's and numpy's allocations meanwhile, by tracemalloc.
"""

import itertools
import statistics
import sys
import time
import tracemalloc

from torch.utils.data import DistributedSampler

from trainstack.data.order import StepSampler

SAMPLES, RANKS, BATCH, ROUNDS = 10_000_000, 8, 512, 5
LEAST_RATIO, MOST_BYTES = 10_000, 1 << 20
MIDDLE = SAMPLES // BATCH // 2  # step


def ours(step: int, samples: int = SAMPLES) -> int:
    sampler = StepSampler(samples, BATCH, 3, RANKS, seed=1, first_step=step)
    return next(iter(sampler))


def theirs(step: int) -> int:
    sampler = DistributedSampler(range(SAMPLES), RANKS, 3, seed=1)
    sampler.set_epoch(0)
    return next(itertools.islice(sampler, step * BATCH // RANKS, None))


def seconds(action, step: int, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        action(step)
    return (time.perf_counter() - started) / times


def main() -> int:
    ours(0)  # imports and caches
    ratios = {}
    for name, step in (("first index", 0), ("seek", MIDDLE)):
        rounds = []
        for _ in range(ROUNDS):
            peer, own = seconds(theirs, step, 1), seconds(ours, step, 200)
            rounds.append((peer, own, peer / own))
        peer, own, ratios[name] = (statistics.median(column) for column in zip(*rounds))  # noqa: B905
        print(f"{name}: DistributedSampler {peer:.3f} s, StepSampler {own * 1e6:.0f} us, "
              f"{ratios[name]:,.0f} times faster")  # fmt: skip
    tracemalloc.start()
    ours(MIDDLE)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    trillion = seconds(lambda step: ours(step, 10**12), 10**9, 200)
    print(f"memory: {memory:,} bytes; at 1e12 samples, step 1e9: {trillion * 1e6:.0f} us")
    worst = min(ratios.values())
    holds = worst >= LEAST_RATIO and memory <= MOST_BYTES
    verdict = "holds" if holds else "falls short"
    print(f"sampler: target {LEAST_RATIO:,} times faster in {MOST_BYTES:,} bytes, measured "
          f"{worst:,.0f} times in {memory:,} bytes, {verdict}")  # fmt: skip
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
