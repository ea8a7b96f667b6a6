"""Data files become tokens: chunk by chunk, by several processes, in order.

Processes, not threads: chat templates and JSON are Python. The tokenizer's own threads are
used only if there is one process, since both would fight for the cores.
"""

import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from trainstack import processes
from trainstack.chat.template import Chat
from trainstack.config.schema import DataSection
from trainstack.data.split import EVAL, TRAIN
from trainstack.data.writer import TokenBatch
from trainstack.errors import DataError
from trainstack.prepare.formats import NOTHING_LEARNED, Document, to_documents
from trainstack.prepare.held_out import Boundary, is_held_out
from trainstack.prepare.long_texts import Flags, joined
from trainstack.prepare.tokenizer import Encoder
from trainstack.records.chunks import Chunk, Part, Wanted
from trainstack.records.columns import columns_read, recognise, text_column
from trainstack.records.readers import read_chunks, split_files
from trainstack.storage import layout
from trainstack.units import counted

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
    wanted = Wanted(columns_read("auto", section))
    for _, chunk, _ in tasks_from(data_files, wanted, [0, 1]):
        for location, record in chunk.records():
            try:
                if isinstance(record, DataError):
                    raise record
                return recognise(location, record, section)
            except DataError as error:
                failed, last = failed + 1, error
                if failed > section.max_bad_records:
                    raise
    raise last or DataError(f"{section.name}: no record in it; look at what was downloaded")


def tasks_from(data_files: list[DataFile], wanted: Wanted, position: list[int]) -> Iterator[Task]:
    """What is left to do from a position on: number of the file, number of the record in it."""
    at_file, at_record = position
    for file, (path, split) in enumerate(data_files):
        if file < at_file:
            continue
        for chunk in read_chunks(path, wanted):
            if file == at_file:
                chunk = chunk.from_record(at_record)
            if chunk is not None:
                yield file, chunk, split


@dataclass
class Tokenised:
    """What became of a chunk: its documents by split, and the records that are none."""

    batches: dict[str, TokenBatch] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)  # location, reason
    counts: Counter = field(default_factory=Counter)  # under their names in the store's Counts
    first_written: str = ""  # as there
    unread: set[str] = field(default_factory=set)  # columns, and keys of turns


@dataclass
class Tokeniser:
    """Turns chunks into tokens; a function of the chunk alone."""

    section: DataSection
    encoder: Encoder
    chat: Chat
    format: str
    dtype: np.dtype  # of token ids in the store
    boundary: Boundary | None = None

    @property
    def wanted(self) -> Wanted:
        """What is to be read of a file."""
        columns = columns_read(self.format, self.section)
        return Wanted(columns, self._end_of_piece, is_one=not self.section.split_on)

    def _end_of_piece(self, text: str) -> tuple[int, int, int] | None:
        """Where what is read of a long text can be cut: as its tokens or data.split_on say."""
        if not self._sign:
            return self.encoder.cut(text)
        return (text.rfind(self._sign) + len(self._sign),) * 3 if self._sign in text else None

    @property
    def _sign(self) -> str | None:
        """What ends a document in a text."""
        return "\n" if self.section.split_on == "line" else self.section.split_on

    def __call__(self, task: Task) -> Tokenised:
        _, chunk, _ = task
        found = Tokenised()
        made: dict[str, list] = {TRAIN: [], EVAL: []}
        last = None
        for group in self._groups(task, found):
            encoded = self.encoder.encode([document for document, _ in group])
            for (document, last), (_, tokens) in zip(group, encoded, strict=True):
                reason = tokens.problem
                if tokens.flags is not None and not tokens.flags[1:].any():
                    reason = reason or f"{document.location}: {NOTHING_LEARNED}"
                if reason and chunk.part:  # the other parts cannot be left out too
                    raise DataError(reason)
                if reason:
                    found.bad.append((document.location, reason))
                    continue
                found.counts.update(tokens.remarks)
                if tokens.written:
                    found.counts["written_documents"] += 1
                    first = f"{document.location}: {tokens.written[0]}"
                    found.first_written = found.first_written or first
                made[last].append((tokens.ids, tokens.flags))
                if tokens.flags is None:  # all of it is learned
                    size = len(document.text.encode("utf-8", "surrogatepass"))
                    found.counts[f"{last}_bytes"] += size
        found.batches = {n: token_batch(pairs, self.dtype) for n, pairs in made.items() if pairs}
        if chunk.part and chunk.part.is_continued:
            found.batches[last].is_open = True
        return found

    def _groups(self, task: Task, found: Tokenised) -> Iterator[list[tuple[Document, str]]]:
        """The documents of a chunk and their splits, as many at once as are encoded together."""
        group, size = [], 0
        for document, split in self.documents(task, found):
            group.append((document, split))
            size += len(document.text)
            if size >= ENCODED_CHARACTERS:
                yield group
                group, size = [], 0
        if group:
            yield group

    def documents(self, task: Task, found: Tokenised) -> Iterator[tuple[Document, str]]:
        """Each document of a chunk with its split; what is none is noted in ``found``."""
        section = self.section
        read = columns_read(self.format, section)
        for location, record, part, split in self._records(task, found):
            try:
                if isinstance(record, DataError):
                    raise record
                documents = to_documents(location, record, self.format, section, self.chat, part)
            except DataError as error:
                found.bad.append((location, str(error)))
                continue
            found.counts["empty_documents"] += not documents
            found.unread.update(record.keys() - read, *(d.unread for d in documents))
            whole = documents[-1].text if documents else ""
            if split is None:  # turns of one conversation are on one side
                split = EVAL if is_held_out(whole, section.eval_fraction, part) else TRAIN
            for document in documents:
                found.counts.update(document.remarks)
                yield document, split

    def _records(
        self, task: Task, found: Tokenised
    ) -> Iterator[tuple[str, Any, Part | None, str | None]]:
        """Each record of a chunk with its split, None if a hash decides; texts are divided."""
        file, chunk, given = task
        for location, record in self._split(chunk.records(), found):
            pieces = [(record, chunk.part, given)]
            if self.boundary:
                column = text_column(record, self.section)
                pieces = self.boundary.divide(file, location, record, chunk.part, column)
            yield from ((location, *piece) for piece in pieces)

    def _split(
        self, records: Iterator[tuple[str, Any]], found: Tokenised
    ) -> Iterator[tuple[str, Any]]:
        """Records, texts as data.split_on divides them; what is empty is left out."""
        for location, record in records:
            column = text_column(record, self.section)
            text = record.get(column) if self._sign and isinstance(record, dict) else None
            if not isinstance(text, str):
                yield location, record
                continue
            found.counts["divided_texts"] += self._sign in text
            for number, piece in enumerate(text.split(self._sign), start=1):
                piece = piece.removeprefix("\r").removeprefix("\n").removesuffix("\r")
                if piece.strip():
                    yield f"{location}, document {number}", {column: piece}


def find_boundary(tokenise: Tokeniser, data_files: list[DataFile]) -> Boundary | None:
    """Where the held-out part begins if the hashes put all documents on one side; None if not."""
    fraction = tokenise.section.eval_fraction
    if tokenise.section.eval_split or not fraction:
        return None
    splits: set[str] = set()
    count = total = length = 0
    last = None  # file and location of a document
    for task in tasks_from(data_files, tokenise.wanted, [0, 1]):
        for document, split in tokenise.documents(task, Tokenised()):
            splits.add(split)
            if len(splits) == 2:
                return None
            if (task[0], document.location) != last:  # else another part or turn
                count, length, last = count + 1, 0, (task[0], document.location)
            length, total = length + len(document.text), total + len(document.text)
    if last is None:
        return None
    wanted = max(1, round(fraction * total))
    start = length - wanted if tokenise.format == "text" and length > wanted else 0
    if count == 1 and not start:
        reason = "one document only: no evaluation; add others, or set data.eval_split"
        return Boundary(*last, None, 0, reason)
    what = f"{fraction:.3g} of all text, at the end of {last[1]}," if start else last[1]
    side = "none" if TRAIN in splits else "all"
    reason = f"of {counted(count, 'document')} the hash would hold out {side}"
    if count == 1:
        reason = "one document only (data.split_on can divide it)"
    return Boundary(*last, start, wanted, f"{reason}: {what} is held out (data.eval_fraction)")


def token_batch(documents: list[tuple[np.ndarray, Flags]], dtype: np.dtype) -> TokenBatch:
    """Documents of one split, each its ids and flags, one after the other."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int64)
    spans = None
    if documents[0][1] is not None:
        firsts = np.cumsum(lengths) - lengths
        pairs = zip(documents, firsts.tolist(), strict=True)
        spans = np.concatenate([spans_of(flags) + first for (_, flags), first in pairs])
    return TokenBatch(joined([ids for ids, _ in documents], dtype), lengths, spans)


def spans_of(flags: np.ndarray) -> np.ndarray:
    """First and last + 1 of each run of set flags, int64 [spans, 2]."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)


def in_order(
    tokenise: Tokeniser, tasks: Iterable[Task], number: int
) -> Iterator[tuple[Task, Tokenised]]:
    """Each task with what became of it, in order; by ``number`` processes, a few tasks in memory.

    BrokenProcessPool if a process was killed.
    """
    if number == 1:
        for task in tasks:
            yield task, tokenise(task)
        return
    context = get_context("fork")  # each has the loaded tokenizer without loading it
    with ProcessPoolExecutor(number, context, _begin, (tokenise, os.getpid())) as pool:
        try:
            yield from _ahead(pool, tasks, number * CHUNKS_AHEAD)
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


_tokenise: Tokeniser  # of a process of the pool


def _begin(tokenise: Tokeniser, parent: int) -> None:
    """A process of the pool begins: it ends with its parent, which alone hears of Ctrl-C."""
    global _tokenise
    _tokenise = tokenise
    processes.die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(task: Task) -> Tokenised:
    return _tokenise(task)
