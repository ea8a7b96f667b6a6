"""One split of a token store: its samples, read one by one."""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainstack.config.batch import IGNORED_LABEL

TRAIN, EVAL = "train", "eval"
INDEX = np.dtype("<i8")
SAMPLES_KEPT = 512  # whose pages of the other columns may be mapped at once
PIECES_AT_ONCE = 1 << 16


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
