"""Data files become tokens: chunk by chunk, by several processes, in order.

Processes, not threads: chat templates and JSON are Python. The tokenizer's own threads are
used only if there is one process, since both would fight for the cores.
"""

import errno
import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from trainstack import processes
from trainstack.config.schema import DataSection
from trainstack.data.split import EVAL, TRAIN
from trainstack.errors import DataError
from trainstack.prepare import formats
from trainstack.prepare.chat import Chat
from trainstack.prepare.formats import Document
from trainstack.prepare.readers import Chunk, read_chunks, split_files
from trainstack.prepare.tokenizer import Flags, encode
from trainstack.prepare.writer import TokenBatch
from trainstack.storage import layout

ENCODED_CHARACTERS = 1 << 18  # at once: the library takes 30 bytes for each meanwhile
CHUNKS_AHEAD = 2  # of each process
DataFile = tuple[Path, str | None]  # a file, and its split; None: each text's hash decides
Task = tuple[int, Chunk, str | None]  # number of the file, chunk, split


def data_files_of(home: Path, section: DataSection) -> list[DataFile]:
    """The files to tokenise, in order. DataError if a split is not there."""
    folder = layout.dataset_folder(home, section.name, section.subset)
    trained = split_files(folder, section.split)
    if not section.eval_split:
        return [(path, None) for path in trained]
    held_out = split_files(folder, section.eval_split, "data.eval_split")
    return [*((p, TRAIN) for p in trained), *((p, EVAL) for p in held_out)]


def format_of(data_files: list[DataFile], section: DataSection) -> str:
    """The format of the first record that has one. DataError beyond data.max_bad_records."""
    failed, last = 0, None
    for path, _ in data_files:
        for chunk in read_chunks(path):
            for location, record in chunk.records():
                try:
                    if isinstance(record, DataError):
                        raise record
                    return formats.recognise(location, record, section.text_field)
                except DataError as error:
                    failed, last = failed + 1, error
                    if failed > section.max_bad_records:
                        raise
    raise last or DataError(f"{section.name}: no record in it; look at what was downloaded")


def tasks_from(data_files: list[DataFile], position: list[int]) -> Iterator[Task]:
    """What is left to do from a position on: number of the file, number of the record in it."""
    at_file, at_record = position
    for file, (path, split) in enumerate(data_files):
        if file < at_file:
            continue
        for chunk in read_chunks(path):
            if file == at_file:
                chunk = chunk.from_record(at_record)
            if chunk is not None:
                yield file, chunk, split


@dataclass
class Tokenised:
    """What became of a chunk: its documents by split, and the records that are none."""

    batches: dict[str, TokenBatch] = field(default_factory=dict)
    empty: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # location, reason


@dataclass
class Tokeniser:
    """Turns chunks into tokens; a function of the chunk alone."""

    section: DataSection
    tokenizer: Any  # of the library tokenizers
    end_id: int
    chat: Chat
    format: str
    dtype: np.dtype  # of token ids in the store

    def __call__(self, task: Task) -> Tokenised:
        _, chunk, split = task
        found = Tokenised()
        made: dict[str, list] = {TRAIN: [], EVAL: []}
        for documents in self._groups(chunk, found):
            for document, ids, flags in encode(self.tokenizer, self.end_id, documents):
                if flags is not None and not flags[1:].any():
                    reason = f"{document.location}: {formats.NOTHING_LEARNED}"
                    found.bad.append((document.location, reason))
                    continue
                fraction = self.section.eval_fraction
                is_eval = split is None and is_held_out(document.text, fraction)
                made[split or (EVAL if is_eval else TRAIN)].append((ids, flags))
        found.batches = {n: token_batch(pairs, self.dtype) for n, pairs in made.items() if pairs}
        return found

    def _groups(self, chunk: Chunk, found: Tokenised) -> Iterator[list[Document]]:
        """The documents of a chunk, as many at once as are encoded together."""
        group, size = [], 0
        for location, record in chunk.records():
            try:
                if isinstance(record, DataError):
                    raise record
                document = formats.to_document(
                    location, record, self.format, self.section.text_field, self.chat
                )
            except DataError as error:
                found.bad.append((location, str(error)))
                continue
            if document is None:
                found.empty += 1
                continue
            group.append(document)
            size += len(document.text)
            if size >= ENCODED_CHARACTERS:
                yield group
                group, size = [], 0
        if group:
            yield group


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a keyed hash of its text decides.

    The same text always falls on the same side, so a duplicate cannot be on both.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"held-out")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def token_batch(documents: list[tuple[np.ndarray, Flags]], dtype: np.dtype) -> TokenBatch:
    """Documents of one split, each its ids and flags, one after the other."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int64)
    spans = None
    if documents[0][1] is not None:
        firsts = np.cumsum(lengths) - lengths
        pairs = zip(documents, firsts.tolist(), strict=True)
        spans = np.concatenate([spans_of(flags) + first for (_, flags), first in pairs])
    ids = np.concatenate([ids for ids, _ in documents], dtype=dtype, casting="unsafe")
    return TokenBatch(ids, lengths, spans)


def spans_of(flags: np.ndarray) -> np.ndarray:
    """First and last + 1 of each run of set flags, int64 [spans, 2]."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)


def in_order(
    tokenise: Tokeniser, tasks: Iterable[Task], number: int
) -> Iterator[tuple[Task, Tokenised]]:
    """Each task with what became of it, in order; by ``number`` processes, a few tasks in memory.

    OSError if a process was killed, as happens when memory ends.
    """
    if number == 1:
        for task in tasks:
            yield task, tokenise(task)
        return
    context = get_context("fork")  # each has the loaded tokenizer without loading it
    with ProcessPoolExecutor(number, context, _begin, (tokenise, os.getpid())) as pool:
        try:
            yield from _ahead(pool, tasks, number * CHUNKS_AHEAD)
        except BrokenProcessPool:
            raise OSError(
                errno.ENOMEM,
                "a process that tokenises was killed, most likely for lack of memory; run it again "
                f"with fewer than PROCESSES={number}: it continues where it stopped",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ProcessPoolExecutor, tasks: Iterable[Task], limit: int
) -> Iterator[tuple[Task, Tokenised]]:
    """Results in order, while up to ``limit`` tasks are under way."""
    waiting: deque = deque()
    for task in tasks:
        waiting.append((task, pool.submit(_work, task)))
        if len(waiting) == limit:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


_tokenise: Callable[[Task], Tokenised]  # of a process of the pool


def _begin(tokenise: Tokeniser, parent: int) -> None:
    """A process of the pool begins: it ends with its parent, which alone hears of Ctrl-C."""
    global _tokenise
    _tokenise = tokenise
    processes.die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(task: Task) -> Tokenised:
    return _tokenise(task)
