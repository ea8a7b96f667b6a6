"""Batches out of a file of 200 MB: ours beside datasets, litdata and mosaicml-streaming.

Each gives 400 batches of 32 samples of 1,024 tokens in shuffled order, as a step takes them: int64
input_ids and labels. The clock starts after the first batch, so that no peer's start counts; CPU
time is of all processes, start and end included. The limit is "memcpy": to copy the bytes of such
batches. One thread per process; all files are in the page cache.

A peer is what its documentation calls fast, with 0 and with 2 workers; the better one counts:

- datasets in its torch format, asked for whole batches by a BatchSampler
- litdata's TokensLoader, and MDS (mosaicml-streaming) with a column of numpy arrays; both converted
  to 64 bits by numpy, for torch is slow with 16 bits

For information: "run_clm", datasets with a DataLoader that makes tensors one by one; and "by hand",
the fastest that we could make of datasets: rows of one size and 16 bits, by numpy, cut by the
collator.
"""

import functools
import importlib.util
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import default_data_collator

from trainstack.data import feed
from trainstack.data.split import INDEX, Split

TOKENS, SEQ_LEN, BATCH, BATCHES, ROUNDS = 100_000_000, 1024, 32, 400, 5
ROW = SEQ_LEN + 1  # inputs and labels overlap
SLICE = 5_000_000  # tokens that litdata is given at once
LEAST_DATASETS, LEAST_STREAMING = 10, 3


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as path:
        folder, missing = Path(path), []
        ids = np.random.default_rng(1).integers(0, 50_000, TOKENS, np.uint16)
        loaders = {"memcpy": copied, "ours": with_trainstack(folder, ids)}
        for peer in (with_datasets, with_litdata, with_streaming):
            try:
                for (name, start), workers in itertools.product(peer(folder, ids).items(), (0, 2)):
                    loaders[f"{name}, {workers} workers"] = functools.partial(start, workers)
            except ImportError as error:
                missing.append(peer)
                print(f"loader: NOT MEASURED: {peer.__name__}: {error}")
        rounds = [
            {n: measure(folder, start) for n, start in loaders.items()} for _ in range(ROUNDS)
        ]
    for loader in loaders:
        speed, cpu = (statistics.median(r[loader][i] for r in rounds) for i in (0, 1))
        print(f"{loader:28} {speed / 1e6:6.1f}M tokens/s, {cpu:.3f} CPU seconds per million")
    print(f"ours: {times_faster(rounds, 'memcpy'):.2f} of memcpy, "
          f"{times_faster(rounds, 'run_clm'):.0f} times run_clm, "
          f"{times_faster(rounds, 'by hand'):.1f} times datasets by hand")  # fmt: skip
    arrow, stream = times_faster(rounds, "datasets"), times_faster(rounds, "litdata", "MDS")
    holds = arrow >= LEAST_DATASETS and stream >= LEAST_STREAMING and not missing
    print(f"loader: target {LEAST_DATASETS} times datasets with a DataLoader, {LEAST_STREAMING} "
          f"times the better of litdata and mosaicml-streaming, measured {arrow:.1f} and "
          f"{stream:.1f} times, {'holds' if holds else 'falls short'}")  # fmt: skip
    return 0 if holds else 1


def measure(folder: Path, start) -> tuple[float, float]:
    """Tokens per second after the first batch, and CPU seconds per million tokens."""
    warm(folder)
    cpu_before = cpu_seconds()
    batches = iter(start())
    inputs, labels = next(batches)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (BATCH, SEQ_LEN)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    started = time.perf_counter()
    number = sum(1 for _ in itertools.islice(batches, BATCHES))
    seconds = time.perf_counter() - started
    assert number == BATCHES
    del batches  # ends its workers
    total = BATCHES * BATCH * SEQ_LEN
    return total / seconds, (cpu_seconds() - cpu_before) / total * 1e6


def warm(folder: Path) -> None:
    """Read all files, so that they are in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def times_faster(rounds: list[dict], *peers: str) -> float:
    """Ours beside the fastest loader of these peers, in the round in the middle."""
    fastest = [max((r[n][0] for n in r if n.startswith(peers)), default=np.nan) for r in rounds]
    return statistics.median(r["ours"][0] / f for r, f in zip(rounds, fastest, strict=True))


def copied():
    inputs = np.arange((BATCHES + 1) * BATCH * SEQ_LEN).reshape(-1, BATCH, SEQ_LEN)
    batch = np.empty((2, BATCH, SEQ_LEN), np.int64)
    for source in np.stack([inputs, inputs + 1], 1):
        np.copyto(batch, source)
        yield torch.from_numpy(batch).unbind()


def with_trainstack(folder: Path, ids: np.ndarray):
    """What train.py does for its batches, and nothing else of a step."""
    ids.tofile(folder / "train.bin")
    np.array([TOKENS], INDEX).tofile(folder / "train.documents")
    split = Split(folder, "train", ids.dtype, SEQ_LEN)

    def batches_of(samples):
        return feed.micro_batches(samples, BATCH, split, torch.device("cpu"))

    def batches():
        yield from batches_of(np.arange(BATCH))  # the clock starts here: making the sampler counts
        sampler = feed.StepSampler(split.num_samples, BATCH, rank=0, world_size=1, seed=1)
        for step in itertools.count():
            yield from batches_of(sampler.samples_at(step))

    return batches


def with_datasets(folder: Path, ids: np.ndarray):
    rows = pa.FixedSizeListArray.from_arrays(pa.array(whole_rows(ids).reshape(-1)), ROW)
    Dataset(pa.table({"input_ids": rows})).save_to_disk(folder / "arrow")
    table = load_from_disk(folder / "arrow").with_format("numpy")
    wide = pa.ListArray.from_arrays(
        pa.array(np.arange(0, len(rows) // 7 * ROW, ROW, np.int32)), rows.values.cast(pa.int64())
    )
    Dataset(pa.table(dict.fromkeys(("input_ids", "labels"), wide))).save_to_disk(folder / "wide")
    usual = load_from_disk(folder / "wide")

    def documented(workers):
        return by_batches(usual.with_format("torch"), cut_tensors, workers)

    def by_hand(workers):
        return by_batches(table, cut, workers)

    def one_by_one(workers):
        return DataLoader(usual, BATCH, True, num_workers=workers, collate_fn=cut_lists)

    return {"datasets": documented, "by hand": by_hand, "run_clm": one_by_one}


def by_batches(table: Dataset, collate, workers: int) -> DataLoader:
    sampler = BatchSampler(RandomSampler(table), BATCH, drop_last=True)
    return DataLoader(table, None, sampler=sampler, num_workers=workers, collate_fn=collate)


def with_litdata(folder: Path, ids: np.ndarray):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    optimize(
        functools.partial(slice_of, folder / "train.bin"), list(range(TOKENS // SLICE)),
        str(folder / "litdata"), chunk_bytes="64MB", item_loader=TokensLoader(), num_workers=1,
        start_method="fork", verbose=False,
    )  # fmt: skip

    def start(workers):
        samples = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(ROW),
                                   shuffle=True, drop_last=True)  # fmt: skip
        return StreamingDataLoader(samples, batch_size=BATCH, num_workers=workers, collate_fn=cut)

    return {"litdata": start}


def slice_of(path: Path, number: int):
    yield torch.from_numpy(np.fromfile(path, np.uint16, SLICE, offset=number * SLICE * 2))


def with_streaming(folder: Path, ids: np.ndarray):
    """mosaicml-streaming, without its __init__, which needs torchvision for what is not used."""
    spec = importlib.util.find_spec("streaming")
    if spec is None:
        raise ImportError("no mosaicml-streaming")
    sys.modules["streaming"] = package = types.ModuleType("streaming")
    package.__path__ = spec.submodule_search_locations
    from streaming.base import MDSWriter, StreamingDataset

    local = str(folder / "mds")
    with MDSWriter(columns={"input_ids": f"ndarray:uint16:{ROW}"}, out=local) as writer:
        for row in whole_rows(ids):
            writer.write({"input_ids": row})

    def start(workers):
        tempfile.tempdir = str(folder)  # else its locks stay in /tmp
        samples = StreamingDataset(
            local=local, shuffle=True, batch_size=BATCH, predownload=BATCH * BATCHES
        )
        tempfile.tempdir = None
        try:
            yield from DataLoader(samples, BATCH, num_workers=workers, collate_fn=cut)
        finally:
            if not workers:
                samples._iterator.exit()  # else its threads continue

    return {"MDS": start}


def whole_rows(ids: np.ndarray) -> np.ndarray:
    return ids[: TOKENS // ROW * ROW].reshape(-1, ROW)


def cut(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a batch of datasets, or of rows of the others."""
    if isinstance(batch, dict):
        rows = batch["input_ids"]
    else:
        rows = np.stack([row["input_ids"] if isinstance(row, dict) else row for row in batch])
    wide = torch.from_numpy(rows.astype(np.int64))
    return wide[:, :-1], wide[:, 1:]


def cut_tensors(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"][:, :-1], batch["labels"][:, 1:]


def cut_lists(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    return cut_tensors(default_data_collator(rows))


if __name__ == "__main__":
    sys.exit(main())
