"""The token store: a data set tokenised once, then read-only.

``tokens/<key>/`` holds, for the splits train and eval, .bin (token ids, little-endian uint16 or
uint32, one document after the other), .documents (where each ends), .loss (which tokens carry
loss, where not all do), and, where documents are packed whole, .pieces, .rows and .targets (the
samples); meta.json (what made it), bad_records.jsonl (what was set aside) and manifest.json. The
key is a hash of the source files, the tokenizer and the settings: another source is another store.
"""

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.config.load import IGNORED_LABEL, Config
from trainstack.config.schema import DataSection
from trainstack.errors import ConfigError
from trainstack.storage import files
from trainstack.storage.layout import dataset_folder, model_folder

FORMAT_VERSION = 2
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TRAIN, EVAL = "train", "eval"
INDEX = np.dtype("<i8")
SAMPLES_KEPT = 512  # whose pages of the other columns may be mapped at once
PIECES_AT_ONCE = 1 << 16
PACKED_LAYOUT = 2  # of samples of whole documents; another one is another store


@dataclass
class Counts:
    """What a preparation saw: documents and tokens per split, and what was left out."""

    train_documents: int = 0
    train_tokens: int = 0
    train_target_tokens: int = 0  # those that carry loss
    eval_documents: int = 0
    eval_tokens: int = 0
    eval_target_tokens: int = 0
    empty_documents: int = 0
    split_documents: int = 0  # longer than seq_len, where documents are packed whole
    dropped_documents: int = 0
    bad_records: int = 0


def made_from(model: Path, dataset: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a store holds: hashes of the files, and settings; from manifests only.

    Raises FileNotFoundError or ValueError where one of them is not there or not whole.
    """
    model_files = files.read_manifest(model)["files"]
    return {
        "format": FORMAT_VERSION,
        "tokenizer": {n: model_files[n]["sha256"] for n in TOKENIZER_FILES if n in model_files},
        "source": {n: e["sha256"] for n, e in files.read_manifest(dataset)["files"].items()},
        "settings": settings,
    }


def store_key(inputs: dict[str, Any]) -> str:
    """The name of the store that ``made_from`` describes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def store_folder(home: Path, model_name: str, section: DataSection) -> Path:
    """Where the store of one data set lies, or will lie. Raises as ``made_from``."""
    model = model_folder(home, model_name)
    dataset = dataset_folder(home, section.name, section.subset)
    return home / "tokens" / store_key(made_from(model, dataset, store_settings(section)))


def open_corpus(home: Path, config: Config) -> "Corpus":
    """What a configuration learns from. ConfigError where a part, or its origin, is not there."""
    stores = {}
    for section in config.data.sources:
        try:
            folder = store_folder(home, config.model.name, section)
            stores[section.label] = TokenStore(folder, section.seq_len)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {config.model.name} or the tokens of {section.name} are not ready "
                f"({error}); run: bash download_data_model.sh"
            ) from None
    return Corpus(stores)


def store_settings(section: DataSection) -> dict[str, Any]:
    """The settings of config.yaml's data section that decide which tokens a store holds."""
    keys = ["split", "eval_split", "eval_fraction", "format", "text_field", "packing"]
    keys += ["max_bad_records"]
    if section.packing != "concat":  # their samples are laid out once and for all
        keys += ["seq_len", "too_long"]
    settings = {key: getattr(section, key) for key in keys}
    return settings if section.packing == "concat" else {**settings, "layout": PACKED_LAYOUT}


def corpus_key(folders: Iterable[Path]) -> str:
    """The name of what the stores in some folders make together."""
    return "+".join(folder.name for folder in folders)


def identity(config: Config, key: str) -> dict[str, Any]:
    """What may not change between two lives of a run; ``key``: of its corpus."""
    return {**config.identity(), "tokens": key}


class TokenStore:
    """Read access to one store by samples of ``seq_len`` tokens; ``train`` and ``eval``: splits."""

    def __init__(self, folder: Path, seq_len: int):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_bytes())
        self.counts = Counts(**self.meta["counts"])
        dtype = np.dtype(self.meta["dtype"])
        self.train, self.eval = (Split(folder, s, dtype, seq_len) for s in (TRAIN, EVAL))


class Corpus:
    """What a run learns from: the token stores of its data sets, by their labels."""

    def __init__(self, stores: dict[str, TokenStore]):
        self.stores = stores
        self.key = corpus_key(store.folder for store in stores.values())
        self.train = joined([store.train for store in stores.values()])
        self.sizes = [store.train.num_samples for store in stores.values()]


class Split:
    """One split of a store, read-only: its columns are mapped, tokens of samples are read.

    ``ids``: the documents' tokens, one after the other. ``stops`` int64 [documents]: where each
    ends. ``spans`` int64 [spans, 3]: first and last + 1 of tokens in a row that carry loss, and how
    many did before; None where all do. ``pieces``, ``rows`` and ``row_targets`` as in
    packing.Plan; None where samples are cut every ``seq_len`` tokens.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, seq_len: int):
        self.seq_len, self.is_train = seq_len, name == TRAIN
        self._maps: list[mmap.mmap] = []
        self._read = 0  # samples since the maps were last forgotten
        self.ids = self._mapped(folder / f"{name}.bin", dtype)
        self.stops = self._mapped(folder / f"{name}.documents", INDEX)
        self.spans = self._mapped(folder / f"{name}.loss", INDEX, 3)
        self.pieces = self._mapped(folder / f"{name}.pieces", INDEX, 2)
        self.rows = self._mapped(folder / f"{name}.rows", INDEX)
        self.row_targets = self._mapped(folder / f"{name}.targets", INDEX)
        self.dtype = dtype
        self._buffer = np.empty((0, 0), dtype)
        self._rows_of_buffer: list[tuple[np.ndarray]] = []
        self._file = (folder / f"{name}.bin").open("rb", buffering=0)
        whole = max(0, len(self.ids) - 1) // seq_len
        self._is_plain = self.is_full and whole == self.num_samples

    def _mapped(self, path: Path, dtype: np.dtype, columns: int = 0) -> np.ndarray | None:
        """A file as a read-only array, [rows, columns] or [rows]; None where there is none."""
        if not path.exists():
            return None
        shape = (-1, columns) if columns else (-1,)
        if not path.stat().st_size:  # an empty file cannot be mapped
            return np.zeros(0, dtype).reshape(0, *shape[1:])
        with path.open("rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype).reshape(shape)

    def forget(self) -> None:
        """Let go of the pages that were read, so that memory does not grow with what is read.

        They stay in the page cache, where the next read finds them.
        """
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
        self._read = 0

    @property
    def num_samples(self) -> int:
        """Whole samples; of held-out ones also the last, filled up with what carries no loss."""
        if self.rows is not None:
            return len(self.rows) - 1
        targets = max(0, len(self.ids) - 1)
        return targets // self.seq_len if self.is_train else -(-targets // self.seq_len)

    @property
    def is_full(self) -> bool:
        """Whether each token of each sample of the training split has a target."""
        return self.rows is None and self.spans is None

    def target_tokens(self, samples: np.ndarray) -> int:
        """How many targets samples have, all together."""
        if self.rows is not None:
            return int(self.row_targets[samples].sum())
        starts = samples * self.seq_len + 1
        stops = np.minimum(starts + self.seq_len, len(self.ids))
        return int(self.targets_in(starts, stops).sum())

    @property
    def padding_share(self) -> float:
        """How much of the samples is there only to fill them up."""
        if self.rows is None:
            return 0.0
        filled = 0
        for start in range(0, len(self.pieces), PIECES_AT_ONCE):
            filled += int(self.pieces[start : start + PIECES_AT_ONCE, 1].sum())
            self.forget()
        return 1 - filled / max(1, self.num_samples * self.seq_len)

    def targets_in(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """How many tokens of each range carry loss."""
        if self.spans is None:
            return stops - starts
        return self._targets_before(stops) - self._targets_before(starts)

    def _targets_before(self, tokens: np.ndarray) -> np.ndarray:
        if not len(self.spans):
            return np.zeros(len(tokens), np.int64)
        at = np.searchsorted(self.spans[:, 0], tokens, "right") - 1
        first, last, before = self.spans[np.maximum(at, 0)].T
        return np.where(at < 0, 0, before + np.minimum(tokens, last) - first)

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples as int64 [2 or 3, samples, seq_len]: inputs, labels, positions where packed.

        Labels are shifted already: IGNORED_LABEL, or the token after the input. Positions begin
        anew at each document; each token that a row is filled up with is one of its own. Inputs
        and labels may share memory.
        """
        if self._is_plain:
            return self._read_plain(samples)
        self._read += len(samples)
        if self._read > SAMPLES_KEPT:
            self.forget()
        parts = np.zeros((2 if self.rows is None else 3, len(samples), self.seq_len), np.int64)
        parts[1] = IGNORED_LABEL
        for row, sample in enumerate(samples):
            at = 0
            for start, places in self.pieces_of(sample):
                self._fill(parts[:, row, at : at + places], start)
                at += places
        return parts

    def _read_plain(self, samples: np.ndarray) -> np.ndarray:
        """Samples of which each token has a target: labels are a view of the same memory."""
        starts = (samples * self.seq_len).tolist()
        found = self._tokens_at(starts, self.seq_len + 1).astype(np.int64)
        row, item = found.strides
        shape, strides = (2, len(samples), self.seq_len), (item, row, item)
        return np.ndarray(shape, np.int64, found, strides=strides)  # as_strided takes longer

    def _tokens_at(self, starts: Sequence[int], number: int) -> np.ndarray:
        """That many tokens from each start, [starts, number], until the next call.

        Read, not mapped: an error of the file system is an OSError then, not the death of the
        process (SIGBUS), and no page of the file counts as this process's memory.
        """
        file, item = self._file.fileno(), self.dtype.itemsize
        size = number * item
        if self._buffer.shape != (len(starts), number):
            self._buffer = np.empty((len(starts), number), self.dtype)
            self._rows_of_buffer = [(row,) for row in self._buffer]
        found = 0
        for row, start in zip(self._rows_of_buffer, starts, strict=True):
            found += os.preadv(file, row, start * item)
        if found != size * len(starts):
            raise OSError(errno.EIO, "shorter than it was", self._file.name)
        return self._buffer

    def pieces_of(self, sample: int) -> list[list[int]]:
        """What a sample is made of: first token and places of each piece."""
        if self.rows is None:
            start = int(sample) * self.seq_len
            return [[start, min(self.seq_len, len(self.ids) - 1 - start)]]
        first, last = self.rows[sample : sample + 2]
        return self.pieces[first:last].tolist()

    def _fill(self, parts: np.ndarray, start: int) -> None:
        """Write the tokens from ``start`` on into [2 or 3, places]."""
        places = parts.shape[1]
        window = self._tokens_at([start], places + 1)[0]
        parts[0] = window[:-1]
        if len(parts) == 3:
            parts[2] = np.arange(places)
        if self.spans is None:
            parts[1] = window[1:]
            return
        first = np.searchsorted(self.spans[:, 1], start + 1, "right")
        last = np.searchsorted(self.spans[:, 0], start + 1 + places, "left")
        for begin, end, _ in self.spans[first:last].tolist():
            begin, end = max(begin - start, 1), min(end - start, places + 1)
            parts[1, begin - 1 : end - 1] = window[begin:end]


class Joined:
    """Splits of several stores as one: first the samples of the first, then those of the next."""

    def __init__(self, splits: Sequence[Split]):
        self.splits = splits
        sizes = [split.num_samples for split in splits]
        self.firsts = np.cumsum([0, *sizes[:-1]])
        self.num_samples = sum(sizes)
        self.is_full = all(split.is_full for split in splits)

    def sources_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the split that each sample is of."""
        return np.searchsorted(self.firsts, samples, "right") - 1

    def target_tokens(self, samples: np.ndarray) -> int:
        """How many targets samples have, all together."""
        return sum(split.target_tokens(own) for split, own, _ in self._by_split(samples))

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples as Split.read gives them, in the order that is asked for."""
        read = [(split.read(own), here) for split, own, here in self._by_split(samples)]
        parts = np.empty((len(read[0][0]), len(samples), read[0][0].shape[2]), np.int64)
        for found, here in read:
            parts[:, here] = found
        return parts

    def _by_split(self, samples: np.ndarray):
        """Each split with its own samples, and where they stand among all."""
        sources = self.sources_of(samples)
        for number in np.unique(sources):
            here = sources == number
            yield self.splits[number], samples[here] - self.firsts[number], here


def joined(splits: list[Split]) -> Split | Joined:
    """One split as it is, several as one."""
    return splits[0] if len(splits) == 1 else Joined(splits)


def enough_samples(config: Config, corpus: Corpus) -> int:
    """The samples of the training split; ConfigError where they do not fill one global batch."""
    for label, size in zip(corpus.stores, corpus.sizes, strict=True):
        if not size:
            raise ConfigError(
                f"data set {label} has less than one sequence of {config.data.seq_len} tokens; use "
                "more data, a shorter data.seq_len, or leave it out"
            )
    samples = corpus.train.num_samples
    if samples < config.train.global_batch_size:
        raise ConfigError(
            f"{' and '.join(corpus.stores)}: {samples} sequences of {config.data.seq_len} tokens,"
            f" less than train.global_batch_size={config.train.global_batch_size}; use more data, "
            "a shorter data.seq_len or a smaller batch"
        )
    return samples


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a keyed hash of its text decides.

    The same text always falls on the same side, so a duplicate cannot sit on both.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"held-out")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64
