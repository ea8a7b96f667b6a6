"""The token store: a data set tokenised once, written by one process, then read-only.

``tokens/<key>/`` holds train.bin and eval.bin (token ids, little-endian uint16 or uint32, documents
joined by the end token), meta.json (what made it) and manifest.json. The key is a hash of the
source files, the tokenizer and the settings, so another source or tokenizer is another store.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack import files
from trainstack.config import Config, DataSection
from trainstack.errors import ConfigError

FORMAT_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TRAIN, EVAL = "train", "eval"


@dataclass
class Counts:
    """What a preparation saw: documents and tokens per split, and what was left out."""

    train_documents: int = 0
    train_tokens: int = 0
    eval_documents: int = 0
    eval_tokens: int = 0
    empty_documents: int = 0


def store_key(model_folder: Path, dataset_folder: Path, settings: dict[str, Any]) -> str:
    """The name of the store that these inputs make; reads their manifests only.

    Raises FileNotFoundError or ValueError where one of them is not there or not whole.
    """
    model_files = files.read_manifest(model_folder)["files"]
    made_from = {
        "format": FORMAT_VERSION,
        "tokenizer": {n: model_files[n]["sha256"] for n in TOKENIZER_FILES if n in model_files},
        "source": {n: e["sha256"] for n, e in files.read_manifest(dataset_folder)["files"].items()},
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def store_settings(section: DataSection) -> dict[str, Any]:
    """The settings of config.yaml's data section that decide which tokens a store holds."""
    keys = ("split", "eval_split", "eval_fraction", "text_field", "packing")
    return {key: getattr(section, key) for key in keys}


def identity(config: Config, key: str) -> dict[str, Any]:
    """What may not change between two lives of a run, the content of its data included."""
    return {**config.identity(), "tokens": key}


class TokenStore:
    """Read access to one store; ``train`` and ``eval`` are mapped arrays of token ids."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_bytes())
        self.dtype = np.dtype(self.meta["dtype"])
        self.counts = Counts(**self.meta["counts"])
        self.train = self._map(TRAIN, self.counts.train_tokens)
        self.eval = self._map(EVAL, self.counts.eval_tokens)

    def _map(self, split: str, tokens: int) -> np.ndarray:
        if not tokens:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self.folder / f"{split}.bin", self.dtype, mode="r", shape=(tokens,))


def num_samples(tokens: int, seq_len: int) -> int:
    """Whole samples in a stream: each has seq_len inputs and, one further, seq_len targets."""
    return max(0, (tokens - 1) // seq_len)


def enough_samples(config: Config, store: TokenStore) -> int:
    """The samples of the training split; ConfigError where they do not fill one global batch."""
    samples = num_samples(len(store.train), config.data.seq_len)
    if samples < config.train.global_batch_size:
        raise ConfigError(
            f"data.name={config.data.name} has {samples} sequences of {config.data.seq_len} tokens,"
            f" less than train.global_batch_size={config.train.global_batch_size}; use more data, "
            "a shorter data.seq_len or a smaller batch"
        )
    return samples


class TokenWriter:
    """Appends documents to a new store in a temporary folder; ``publish`` makes it visible."""

    def __init__(self, temporary: Path, vocab_size: int):
        self.temporary = temporary
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.counts = Counts()
        temporary.mkdir(parents=True)
        self._files = {s: files.HashedFile(temporary / f"{s}.bin") for s in (TRAIN, EVAL)}
        for file in self._files.values():
            file.__enter__()

    def append(self, split: str, ids: list[int]) -> None:
        """Add one document, its end token included."""
        self._files[split].write(np.asarray(ids, self.dtype))
        documents, tokens = f"{split}_documents", f"{split}_tokens"
        setattr(self.counts, documents, getattr(self.counts, documents) + 1)
        setattr(self.counts, tokens, getattr(self.counts, tokens) + len(ids))

    def publish(self, final: Path, meta: dict[str, Any]) -> None:
        """Seal the store under its final name."""
        entries = {}
        for file in self._files.values():
            file.__exit__(None, None, None)
            entries[file.path.name] = file.entry()
        meta = {**meta, "dtype": self.dtype.str, "counts": asdict(self.counts)}
        text = json.dumps(meta, indent=1).encode()
        entries["meta.json"] = files.write_file(self.temporary / "meta.json", text)
        files.publish_folder(self.temporary, final, entries, kind="tokens")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a keyed hash of its text decides.

    The same text always falls on the same side, so a duplicate cannot sit on both.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"held-out")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def windows(tokens: np.ndarray, seq_len: int, indices: Iterator[int] | np.ndarray) -> np.ndarray:
    """The samples at ``indices``, int64 [len(indices), seq_len + 1]: inputs and one more token."""
    rows = [tokens[i * seq_len : (i + 1) * seq_len + 1] for i in indices]
    return np.stack(rows).astype(np.int64)
