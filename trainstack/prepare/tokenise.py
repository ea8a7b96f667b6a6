"""Chunks of a data set become tokens: by several processes, in the order of the source.

A process each, not threads: chat templates and JSON are Python. The tokenizer's own threads are
used only where there is one process, since both would fight for the cores.
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
from typing import Any

import numpy as np

from trainstack import processes
from trainstack.config.schema import DataSection
from trainstack.data.split import EVAL, TRAIN
from trainstack.errors import DataError
from trainstack.prepare import formats
from trainstack.prepare.chat import Chat
from trainstack.prepare.readers import Chunk
from trainstack.prepare.writer import Part

ENCODED_CHARACTERS = 1 << 18  # at once: the library takes 30 bytes for each meanwhile
CHUNKS_AHEAD = 2  # of each process
Task = tuple[int, Chunk, str | None]  # number of the file, chunk, split; None: by each text's hash


@dataclass
class Tokenised:
    """What became of a chunk: its documents by split, and the records that are none."""

    parts: dict[str, Part] = field(default_factory=dict)
    empty: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # place, reason


@dataclass
class Tokeniser:
    """Turns chunks into tokens; a function of the chunk alone."""

    section: DataSection
    tokenizer: Any
    end_id: int
    chat: Chat
    format: str
    dtype: np.dtype  # of token ids in the store

    def __call__(self, task: Task) -> Tokenised:
        _, chunk, split = task
        found = Tokenised()
        made: dict[str, list] = {TRAIN: [], EVAL: []}
        for documents in self._batches(chunk, found):
            for document, ids, flags in formats.encode(self.tokenizer, self.end_id, documents):
                if flags is not None and not flags[1:].any():
                    reason = f"{document.place}: {formats.NOTHING_LEARNED}"
                    found.bad.append((document.place, reason))
                    continue
                fraction = self.section.eval_fraction
                is_eval = split is None and is_held_out(document.text, fraction)
                made[split or (EVAL if is_eval else TRAIN)].append((ids, flags))
        found.parts = {n: part_of(pairs, self.dtype) for n, pairs in made.items() if pairs}
        return found

    def _batches(self, chunk: Chunk, found: Tokenised) -> Iterator[list[formats.Document]]:
        """The documents of a chunk, as many as are encoded at once."""
        batch, size = [], 0
        for place, record in chunk.records():
            try:
                if isinstance(record, DataError):
                    raise record
                document = formats.to_document(
                    place, record, self.format, self.section.text_field, self.chat
                )
            except DataError as error:
                found.bad.append((place, str(error)))
                continue
            if document is None:
                found.empty += 1
                continue
            batch.append(document)
            size += len(document.text)
            if size >= ENCODED_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def part_of(documents: list[tuple[np.ndarray, np.ndarray | None]], dtype: np.dtype) -> Part:
    """Documents of one split, each ids and flags, in a row."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int64)
    spans = None
    if documents[0][1] is not None:
        firsts = np.cumsum(lengths) - lengths
        pairs = zip(documents, firsts.tolist(), strict=True)
        spans = np.concatenate([spans_of(flags) + first for (_, flags), first in pairs])
    return Part(
        np.concatenate([ids for ids, _ in documents], dtype=dtype, casting="unsafe"), lengths, spans
    )


def spans_of(flags: np.ndarray) -> np.ndarray:
    """First and last + 1 of each row of set flags, int64 [spans, 2]."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)


def in_order(
    tokenise: Tokeniser, tasks: Iterable[Task], number: int
) -> Iterator[tuple[Task, Tokenised]]:
    """Each task with what became of it, in order; by ``number`` processes, a few tasks in memory.

    OSError where a process died, as one does when memory ends: what was committed is kept.
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
                f"with fewer than PROCESSES={number}: it goes on where it was",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _ahead(pool, tasks: Iterable[Task], limit: int) -> Iterator[tuple[Task, Tokenised]]:
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


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a keyed hash of its text decides.

    The same text always falls on the same side, so a duplicate cannot sit on both.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"held-out")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64
