"""From 20 MB of jsonl to tokens that can be trained on: ours beside tokenizers alone, and datasets.

The text is Python's own sources, one file a document, some of them cut so that none is repeated;
the tokenizer is a byte-level BPE of 16,384 trained on them. Ours is ``prepare.prepare`` of an empty
home, hashes and fsyncs included. The limit is tokenizers' encode_batch of the texts, a thousand at
a time, in memory already; encode_batch_fast, which ours uses, beside it. Peer: run_clm's
load_dataset and its two maps, by two processes. Second start: the same calls once more, in a
process that has everything imported.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data import corpus
from trainstack.prepare import demo, prepare
from trainstack.storage import files, layout, manifest

ROOT = Path(__file__).resolve().parent.parent
MEGABYTES, VOCAB_SIZE, SEQ_LEN, ROUNDS = 20, 16_384, 1024, 3
LEAST_SHARE, MOST_MILLISECONDS = 0.9, 50


def main() -> int:
    if len(sys.argv) > 1:
        print(*(seconds(lambda: with_datasets(*sys.argv[1:])) for _ in range(2)))
        return 0
    config = load(ROOT / "config.yaml", [f"data.seq_len={SEQ_LEN}", "data.name=text"])
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as name:
        home = Path(name)
        texts = make_home(home)
        measure(home, config, texts)  # imports what it needs
        rounds = [measure(home, config, texts) for _ in range(ROUNDS)]
    return report(rounds, sum(len(text.encode()) for text in texts) / 1e6, len(texts))


def measure(home: Path, config: Config, texts: list[str]) -> dict[str, float]:
    """Seconds of each, one after the other."""
    path = layout.model_folder(home, layout.DEMO) / "tokenizer.json"
    shutil.rmtree(home / "tokens", ignore_errors=True)
    taken = {}
    for name in ("encode_batch", "encode_batch_fast"):
        encode = getattr(Tokenizer.from_file(str(path)), name)  # a new one, for it has a cache
        taken[name] = seconds(lambda encode=encode: encode_all(encode, texts))
    with contextlib.redirect_stderr(io.StringIO()):
        for name in ("ours", "ours, second start"):
            taken[name] = seconds(lambda: prepare.prepare(home, config, force=False))
    taken["ours, opening them"] = seconds(lambda: corpus.open_corpus(home, config))
    jsonl = layout.dataset_folder(home, "text", None) / "train.jsonl"
    with tempfile.TemporaryDirectory(dir=home) as cache:
        # A process of its own: map leaves TOKENIZERS_PARALLELISM=false behind (datasets 5.2).
        command = [sys.executable, __file__, jsonl, path, cache]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    taken["datasets"], taken["datasets, again"] = map(float, done.stdout.split())
    return taken


def report(rounds: list[dict], size: float, documents: int) -> int:
    print(f"{size:.1f} MB in {documents:,} documents")
    middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, taken in middle.items():
        print(f"{name:18} {taken:7.4f} s  {size / taken:8.1f} MB/s")
    share = statistics.median(r["encode_batch"] / r["ours"] for r in rounds)
    fast = statistics.median(r["encode_batch_fast"] / r["ours"] for r in rounds)
    peer = statistics.median(r["datasets"] / r["ours"] for r in rounds)
    start = 1e3 * max(middle["ours, second start"], middle["ours, opening them"])  # ms
    print(f"ours: {fast:.2f} of encode_batch_fast, {peer:.1f} times as fast as datasets")
    holds = share >= LEAST_SHARE and start <= MOST_MILLISECONDS
    print(f"prepare: target {LEAST_SHARE} of encode_batch, second start in "
          f"{MOST_MILLISECONDS} ms, measured {share:.2f} and {start:.0f} ms, "
          f"{'holds' if holds else 'falls short'}")  # fmt: skip
    return 0 if holds else 1


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_home(home: Path) -> list[str]:
    """A model and a data set as a download would leave them; the texts of the data set."""
    demo.VOCAB_SIZE = demo.MODEL_CONFIG["vocab_size"] = VOCAB_SIZE
    demo.make_model(home)
    texts, size = [], 0
    for text in documents():
        texts.append(text)
        size += len(text.encode())
        if size >= MEGABYTES * 1e6:
            break
    folder = layout.dataset_folder(home, "text", None)
    temporary = folder.with_name(".text.tmp")
    temporary.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    entries = {"train.jsonl": files.write_file(temporary / "train.jsonl", lines.encode())}
    manifest.publish_folder(
        temporary, folder, entries, kind="dataset", source="made", revision=None
    )
    return texts


def documents():
    for turn in itertools.count():
        for _, text in demo.sources():
            if rest := text[turn * len(text) // 5 :]:
                yield rest


def encode_all(encode, texts: list[str]) -> None:
    for start in range(0, len(texts), 1000):
        encode(texts[start : start + 1000], add_special_tokens=False)


def with_datasets(jsonl: str, path: str, cache: str) -> None:
    """What transformers' examples/pytorch/language-modeling/run_clm.py does before it trains."""
    disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    raw = load_dataset("json", data_files=jsonl, split="train", cache_dir=cache)
    tokenised = raw.map(
        lambda batch: tokenizer(batch["text"]), batched=True, num_proc=2, remove_columns=["text"]
    )
    tokenised.map(group_texts, batched=True, num_proc=2)


def group_texts(batch: dict) -> dict:
    joined = {name: list(itertools.chain(*rows)) for name, rows in batch.items()}
    length = len(joined["input_ids"]) // SEQ_LEN * SEQ_LEN
    result = {
        name: [row[i : i + SEQ_LEN] for i in range(0, length, SEQ_LEN)]
        for name, row in joined.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


if __name__ == "__main__":
    sys.exit(main())
