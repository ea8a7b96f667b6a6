"""One split of a token store: its documents, and its samples as batches."""

import errno
import functools
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
    """One split of a store, read-only: its files are mapped, but tokens of samples are read.

    - ``ids`` [tokens]: token ids in the store's dtype, one document after the other
    - ``stops`` int64 [documents]: where each document ends in ``ids``
    - ``spans`` int64 [spans, 3]: for each run of tokens that carry loss its first token, its last
      one + 1, and how many tokens carry loss before it; None if all tokens do
    - ``pieces``, ``rows``, ``row_targets``: the samples, as in packing.Plan; None if samples are
      cut every ``seq_len`` tokens
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, seq_len: int, is_held_out: bool = False
    ):
        """``is_held_out``: used as the held-out ones are, whatever its name is."""
        self.seq_len, self.is_train = seq_len, name == TRAIN and not is_held_out
        self._maps: list[mmap.mmap] = []
        self._read = 0  # samples since the maps were last forgotten
        self.ids = self._mapped(folder / f"{name}.bin", dtype)
        self.stops = self._mapped(folder / f"{name}.documents", INDEX)
        self.spans = self._mapped(folder / f"{name}.loss", INDEX, 3)
        self.pieces = self._mapped(folder / f"{name}.pieces", INDEX, 2)
        self.rows = self._mapped(folder / f"{name}.rows", INDEX)
        self.row_targets = self._mapped(folder / f"{name}.targets", INDEX)
        self.dtype = dtype
        self._file = (folder / f"{name}.bin").open("rb", buffering=0)
        whole = max(0, len(self.ids) - 1) // seq_len
        self._is_plain = self.is_full and whole == self.num_samples

    def _mapped(self, path: Path, dtype: np.dtype, columns: int = 0) -> np.ndarray | None:
        """A file as a read-only array, [length] or [length, columns]; None if it is not there."""
        if not path.exists():
            return None
        found = np.zeros(0, dtype)
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            found = np.frombuffer(self._maps[-1], dtype)
        return found.reshape(-1, columns) if columns else found

    def forget(self) -> None:
        """Let go of the mapped pages: memory does not grow, and the page cache keeps them."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
        self._read = 0

    @property
    def num_samples(self) -> int:
        """How many samples there are. What fills none at the end of the training documents is left
        out; of the held-out ones it is a sample too, filled up with what carries no loss.
        """
        if self.rows is not None:
            return len(self.rows) - 1
        targets = max(0, len(self.ids) - 1)
        return targets // self.seq_len if self.is_train else -(-targets // self.seq_len)

    @functools.cached_property
    def most_documents(self) -> int:
        """How many documents a sample has at most, with one that fills it up; 0 if they mix."""
        if self.rows is None:
            return 0
        most = 0
        for start in range(0, self.num_samples, PIECES_AT_ONCE):
            here = np.diff(self.rows[start : start + PIECES_AT_ONCE + 1])
            most = max(most, int(here.max()))
            self.forget()
        return 1 + most

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
        """The share of all slots that only fill samples up, from 0 to 1."""
        if self.rows is None:
            return 0.0
        filled = 0
        for start in range(0, len(self.pieces), PIECES_AT_ONCE):
            filled += int(self.pieces[start : start + PIECES_AT_ONCE, 1].sum())
            self.forget()
        return 1 - filled / max(1, self.num_samples * self.seq_len)

    def targets_in(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """How many tokens of each range carry loss; all three int64 [ranges]."""
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
        """Samples as int64 [2 or 3, samples, seq_len]: inputs, labels, and positions if packed.

        A label is the token after its input, or IGNORED_LABEL. Positions begin at 0 in each
        document; each token that fills a sample up is a document of its own. Inputs and labels may
        share memory. Raises OSError, as the file system does.
        """
        if self._is_plain:
            return self._read_plain(samples)
        self._read += len(samples)
        if self._read > SAMPLES_KEPT:
            self.forget()
        batch = np.zeros((2 if self.rows is None else 3, len(samples), self.seq_len), np.int64)
        batch[1] = IGNORED_LABEL
        for number, sample in enumerate(samples):
            slot = 0
            for start, slots in self.pieces_of(sample):
                self._fill(batch[:, number, slot : slot + slots], start)
                slot += slots
        return batch

    def _read_plain(self, samples: np.ndarray) -> np.ndarray:
        """Samples of which each token has a target; labels are a view of the same tokens.

        To copy them instead costs 8 to 14% of the speed (benchmarks/loader.py), as_strided a third.
        """
        tokens = self._tokens_at((samples * self.seq_len).tolist(), self.seq_len + 1)
        tokens = tokens.astype(np.int64)
        sample, token = tokens.strides  # of labels too, which begin one token later
        shape, strides = (2, len(samples), self.seq_len), (token, sample, token)
        return np.ndarray(shape, np.int64, tokens, strides=strides)

    def _tokens_at(self, starts: Sequence[int], number: int) -> np.ndarray:
        """That many tokens from each start, [starts, number], in the store's dtype, read-only.

        Read, not mapped: an error of the file system is an OSError then, not the death of the
        process (SIGBUS), and no page of the file counts as this process's memory.
        """
        file, size = self._file.fileno(), number * self.dtype.itemsize
        data = b"".join([os.pread(file, size, start * self.dtype.itemsize) for start in starts])
        if len(data) != size * len(starts):
            raise OSError(errno.EIO, "shorter than it was", self._file.name)
        return np.frombuffer(data, self.dtype).reshape(len(starts), number)

    def pieces_of(self, sample: int) -> list[list[int]]:
        """What a sample is made of: first token and number of slots of each piece."""
        if self.rows is None:
            start = int(sample) * self.seq_len
            return [[start, min(self.seq_len, len(self.ids) - 1 - start)]]
        first, last = self.rows[sample : sample + 2]
        return self.pieces[first:last].tolist()

    def _fill(self, batch: np.ndarray, start: int) -> None:
        """Write the tokens from ``start`` on into [2 or 3, slots]."""
        slots = batch.shape[1]
        window = self._tokens_at([start], slots + 1)[0]
        batch[0] = window[:-1]
        if len(batch) == 3:
            batch[2] = np.arange(slots)
        if self.spans is None:
            batch[1] = window[1:]
            return
        first = np.searchsorted(self.spans[:, 1], start + 1, "right")
        last = np.searchsorted(self.spans[:, 0], start + 1 + slots, "left")
        for begin, end, _ in self.spans[first:last].tolist():
            begin, end = max(begin - start, 1), min(end - start, slots + 1)
            batch[1, begin - 1 : end - 1] = window[begin:end]
