"""The token store: a data set tokenised once, written by one process, then read-only.

``tokens/<key>/`` holds, for the splits train and eval, .bin (token ids, little-endian uint16 or
uint32, one document after the other), .documents (where each ends), .loss (which tokens carry
loss, where not all do), and, where documents are packed whole, .pieces, .rows and .targets (the
samples); meta.json (what made it), bad_records.jsonl (what was set aside) and manifest.json. The
key is a hash of the source files, the tokenizer and the settings: another source is another store.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack import files
from trainstack.config import IGNORED_LABEL, Config, DataSection
from trainstack.errors import ConfigError
from trainstack.places import dataset_folder, model_folder

FORMAT_VERSION = 2
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TRAIN, EVAL = "train", "eval"
INDEX = np.dtype("<i8")
WRITE_BYTES = 1 << 20


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


def store_key(model: Path, dataset: Path, settings: dict[str, Any]) -> str:
    """The name of the store that these inputs make; reads their manifests only.

    Raises FileNotFoundError or ValueError where one of them is not there or not whole.
    """
    model_files = files.read_manifest(model)["files"]
    made_from = {
        "format": FORMAT_VERSION,
        "tokenizer": {n: model_files[n]["sha256"] for n in TOKENIZER_FILES if n in model_files},
        "source": {n: e["sha256"] for n, e in files.read_manifest(dataset)["files"].items()},
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def store_folder(home: Path, config: Config) -> Path:
    """Where the store of a configuration lies, or will lie. Raises as ``store_key``."""
    model = model_folder(home, config.model.name)
    dataset = dataset_folder(home, config.data.name, config.data.subset)
    return home / "tokens" / store_key(model, dataset, store_settings(config.data))


def open_store(home: Path, config: Config) -> "TokenStore":
    """The store of a configuration. ConfigError where it, or what it is made from, is not there."""
    try:
        return TokenStore(store_folder(home, config), config.data.seq_len)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.model.name} or the tokens of {config.data.name} are not ready "
            f"({error}); run: bash download_data_model.sh"
        ) from None


def store_settings(section: DataSection) -> dict[str, Any]:
    """The settings of config.yaml's data section that decide which tokens a store holds."""
    keys = ["split", "eval_split", "eval_fraction", "format", "text_field", "packing"]
    keys += ["max_bad_records"]
    if section.packing != "concat":  # their samples are laid out once and for all
        keys += ["seq_len", "too_long"]
    return {key: getattr(section, key) for key in keys}


def identity(config: Config, key: str) -> dict[str, Any]:
    """What may not change between two lives of a run, the content of its data included."""
    return {**config.identity(), "tokens": key}


class TokenStore:
    """Read access to one store by samples of ``seq_len`` tokens; ``train`` and ``eval``: splits."""

    def __init__(self, folder: Path, seq_len: int):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_bytes())
        self.counts = Counts(**self.meta["counts"])
        dtype = np.dtype(self.meta["dtype"])
        self.train, self.eval = (Split(folder, s, dtype, seq_len) for s in (TRAIN, EVAL))


class Split:
    """One split of a store, mapped read-only.

    ``ids``: the documents' tokens, one after the other. ``stops`` int64 [documents]: where each
    ends. ``spans`` int64 [spans, 3]: first and last + 1 of tokens in a row that carry loss, and how
    many did before; None where all do. ``pieces``, ``rows`` and ``row_targets`` as in
    packing.Plan; None where samples are cut every ``seq_len`` tokens.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, seq_len: int):
        self.seq_len, self.is_train = seq_len, name == TRAIN
        self.ids = _mapped(folder / f"{name}.bin", dtype)
        self.stops = _mapped(folder / f"{name}.documents", INDEX)
        self.spans = _mapped(folder / f"{name}.loss", INDEX, 3)
        self.pieces = _mapped(folder / f"{name}.pieces", INDEX, 2)
        self.rows = _mapped(folder / f"{name}.rows", INDEX)
        self.row_targets = _mapped(folder / f"{name}.targets", INDEX)

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
        return 1 - self.pieces[:, 1].sum() / max(1, self.num_samples * self.seq_len)

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
        anew at each document; each token that a row is filled up with is one of its own.
        """
        parts = np.zeros((2 if self.rows is None else 3, len(samples), self.seq_len), np.int64)
        parts[1] = IGNORED_LABEL
        for row, sample in enumerate(samples):
            at = 0
            for start, places in self.pieces_of(sample):
                self._fill(parts[:, row, at : at + places], start)
                at += places
        return parts

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
        window = self.ids[start : start + places + 1]
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


def _mapped(path: Path, dtype: np.dtype, columns: int = 0) -> np.ndarray | None:
    """A file as a read-only array, [rows, columns] or [rows]; None where there is no such file."""
    if not path.exists():
        return None
    shape = (-1, columns) if columns else (-1,)
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype).reshape(0, *shape[1:])
    return np.asarray(np.memmap(path, dtype, mode="r")).reshape(shape)


def enough_samples(config: Config, store: TokenStore) -> int:
    """The samples of the training split; ConfigError where they do not fill one global batch."""
    samples = store.train.num_samples
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
        self.has_spans = False
        self._entries: dict[str, dict[str, Any]] = {}
        temporary.mkdir(parents=True)
        self._columns = {
            (split, kind): Column(temporary / f"{split}.{kind}")
            for split in (TRAIN, EVAL)
            for kind in ("bin", "documents", "loss")
        }

    def append(self, split: str, ids: Sequence[int], flags: np.ndarray | None) -> None:
        """Add one document, its end token included; ``flags``: which carry loss, None for all.

        Either all documents of a store have flags, or none has.
        """
        counts = self.counts
        first = getattr(counts, f"{split}_tokens")
        before = getattr(counts, f"{split}_target_tokens")
        self._columns[split, "bin"].append(np.asarray(ids, self.dtype))
        self._columns[split, "documents"].append(np.array([first + len(ids)], INDEX))
        carrying = len(ids)
        if flags is not None:
            self.has_spans = True
            spans = spans_of(flags)
            sizes = spans[:, 1] - spans[:, 0]
            carrying = int(sizes.sum())
            earlier = before + np.cumsum(sizes) - sizes
            self._columns[split, "loss"].append(np.column_stack([spans + first, earlier]))
        setattr(counts, f"{split}_documents", getattr(counts, f"{split}_documents") + 1)
        setattr(counts, f"{split}_tokens", first + len(ids))
        setattr(counts, f"{split}_target_tokens", before + carrying)

    def seal(self, seq_len: int) -> dict[str, Split]:
        """No more documents: close the files; the splits as they are so far, to plan samples by."""
        for (_, kind), column in self._columns.items():
            column.close()
            if kind == "loss" and not self.has_spans:
                column.path.unlink()
            else:
                self._entries[column.path.name] = column.entry()
        return {s: Split(self.temporary, s, self.dtype, seq_len) for s in (TRAIN, EVAL)}

    def add_file(self, name: str, data: bytes) -> None:
        """Put one more file beside the tokens."""
        self._entries[name] = files.write_file(self.temporary / name, data)

    def publish(self, final: Path, meta: dict[str, Any]) -> None:
        """Put the sealed store under its final name."""
        meta = {**meta, "dtype": self.dtype.str, "counts": asdict(self.counts)}
        self.add_file("meta.json", json.dumps(meta, indent=1).encode())
        files.publish_folder(self.temporary, final, self._entries, kind="tokens")


class Column(files.HashedFile):
    """A file that arrays are appended to; many small ones become few writes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._waiting = bytearray()
        self.__enter__()

    def append(self, values: np.ndarray) -> None:
        self._waiting += memoryview(np.ascontiguousarray(values)).cast("B")
        if len(self._waiting) >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self.write(self._waiting)
        self._waiting = bytearray()

    def close(self) -> None:
        self._flush()
        self.__exit__(None)


def spans_of(flags: np.ndarray) -> np.ndarray:
    """First and last + 1 of each row of set flags, int64 [spans, 2]."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a keyed hash of its text decides.

    The same text always falls on the same side, so a duplicate cannot sit on both.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"held-out")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64
