"""Packing a million lengths: our best_fit beside TRL's bfd, the packing that its trainers use.

Lengths are log-normal, as those of conversations, in samples of 2,048 tokens. TRL packs a table of
tokens and gives a table back; ours gives a plan, by which each sample is read. TRL is timed on a
tenth of the lengths, whose tokens fit into memory; its time is multiplied by ten.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainstack.data.packing import plans

LENGTHS, SEQ_LEN, ROUNDS = 1_000_000, 2048, 5
FEWER = 10  # times fewer lengths for TRL
LEAST_RATIO, MOST_PADDING = 50, 0.003


def peer():
    """TRL's packer, without the rest of TRL: its file alone."""
    for folder in map(Path, sys.path):
        path = folder / "trl" / "data_utils.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location("trl_data_utils", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module._pack_bfd
    raise SystemExit("packer: error: TRL is not here; run: bash benchmarks/run.sh packer")


def tokens_table(lengths: np.ndarray) -> pa.Table:
    """A column of lists of tokens of one byte each: the tokens take no time."""
    stops = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(np.zeros(int(stops[-1]), np.int8))
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(stops), values)})


def main() -> int:
    pack = peer()
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(5.6, 0.9, LENGTHS).astype(np.int64), 2, SEQ_LEN)
    stops = np.cumsum(lengths)
    table = tokens_table(lengths[: LENGTHS // FEWER])
    ratios, times = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        pack(table, SEQ_LEN)
        theirs = (time.perf_counter() - started) * FEWER
        started = time.perf_counter()
        packed = list(plans(stops, lambda a, b: b - a, SEQ_LEN, "best_fit", "split"))
        own = time.perf_counter() - started
        ratios.append(theirs / own)
        times.append((theirs, own))
    slots = sum(int(group.pieces[:, 1].sum()) for group in packed)
    rows = sum(len(group.rows) - 1 for group in packed)
    padding = 1 - slots / (rows * SEQ_LEN)
    dropped = int((lengths - 1).sum()) - slots
    ratio = statistics.median(ratios)
    theirs, own = (statistics.median(column) for column in zip(*times))  # noqa: B905
    print(f"a million lengths: TRL bfd {theirs:.1f} s, ours {own:.3f} s; {rows:,} samples, "
          f"{padding:.4%} padding, {dropped} targets dropped")  # fmt: skip
    holds = ratio >= LEAST_RATIO and padding <= MOST_PADDING and dropped == 0
    verdict = "holds" if holds else "falls short"
    print(f"packer: target {LEAST_RATIO} times TRL's bfd, {MOST_PADDING:.1%} padding, nothing "
          f"dropped, measured {ratio:.0f} times, {padding:.3%}, {dropped}, {verdict}")  # fmt: skip
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
