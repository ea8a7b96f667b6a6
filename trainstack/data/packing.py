"""Which documents share a sample: packing without cutting, computed once from their lengths.

A sample has ``seq_len`` slots: one for each input and its target. A document of L tokens takes
L - 1 slots: its last token is only a target, and its first one is none. One that is longer than a
sample is split so that each target is kept, or dropped. A row is a sample that is being filled.
Documents are laid out in groups, so that memory does not grow with their number.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from trainstack.config.batch import IGNORED_LABEL

GROUP = 1 << 17  # documents
TargetsIn = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Plan:
    """The samples of a split, one after the other."""

    pieces: np.ndarray  # int64 [pieces, 2]: first token, slots
    rows: np.ndarray  # int64 [samples + 1]: sample i has pieces rows[i] to rows[i + 1]
    targets: np.ndarray  # int64 [samples]: tokens that carry loss
    split_documents: int
    dropped_documents: int


def document_bounds(
    positions: np.ndarray, labels: np.ndarray | None = None, most: int = 0
) -> np.ndarray:
    """Where documents begin in rows that are joined, and where the last ends: int32 [most + 1].

    Both int64 [rows, seq_len], as Split.read has them. With labels, what fills a row up is one
    document; else each token of it is.
    ``most``: documents at least; those that are missing have no tokens.
    """
    is_first = positions == 0
    if labels is not None:
        is_idle = is_first & np.pad(is_first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        is_idle &= labels == IGNORED_LABEL  # of one token, and of no target
        is_first[:, 1:] &= ~(is_idle[:, 1:] & is_idle[:, :-1])
    first = np.flatnonzero(is_first)
    missing = max(1, most + 1 - len(first))
    return np.pad(first, (0, missing), constant_values=positions.size).astype(np.int32)


def plans(
    stops: np.ndarray, targets_in: TargetsIn, seq_len: int, packing: str, too_long: str
) -> Iterator[Plan]:
    """Lay out documents in samples of ``seq_len`` slots, group by group. Deterministic.

    ``stops`` int64 [documents]: the token after the last one of each. ``targets_in``: as that of a
    Split. ``packing``: best_fit or none; ``too_long``: split or drop.
    """
    for first in range(0, len(stops), GROUP):
        start = int(stops[first - 1]) if first else 0
        group = np.array(stops[first : first + GROUP])
        yield plan(group, targets_in, seq_len, packing, too_long, start)


def plan(
    stops: np.ndarray, targets_in: TargetsIn, seq_len: int, packing: str, too_long: str,
    start: int = 0,
) -> Plan:  # fmt: skip
    """One group of documents, the first of which begins at ``start``; else as ``plans``."""
    starts, slots, is_long = cut(stops, seq_len, too_long, start)
    targets = targets_in(starts + 1, starts + 1 + slots)
    is_useful = targets > 0  # a piece of a split document may carry no loss
    starts, slots, targets = starts[is_useful], slots[is_useful], targets[is_useful]
    if packing == "best_fit":
        row_of, num_rows = best_fit(slots, seq_len)
        row_of = spread(num_rows)[row_of]
        order = np.argsort(_small(row_of, num_rows), kind="stable")
        starts, slots, targets = starts[order], slots[order], targets[order]
        rows = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    else:
        rows = np.arange(len(starts) + 1)
    targets_before = np.concatenate([[0], np.cumsum(targets)])
    long = int(is_long.sum())
    return Plan(
        pieces=np.stack([starts, slots], axis=1),
        rows=rows.astype(np.int64),
        targets=np.diff(targets_before[rows]),
        split_documents=long if too_long == "split" else 0,
        dropped_documents=long if too_long == "drop" else 0,
    )


def cut(
    stops: np.ndarray, seq_len: int, too_long: str, start: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token and slots of each piece, int64 [pieces]; which documents are too long, bool.

    Pieces of a split document overlap by a token: the last target of one is the first input of the
    next, so that each target is in exactly one.
    """
    starts = np.concatenate([np.full(1, start, np.int64), stops[:-1]])[: len(stops)]
    slots = stops - starts - 1
    is_long = slots > seq_len
    if too_long == "drop":
        return starts[~is_long], slots[~is_long], is_long
    numbers = -(-slots // seq_len)  # of pieces, per document
    firsts = np.cumsum(numbers) - numbers
    within = np.arange(int(numbers.sum())) - np.repeat(firsts, numbers)  # its document's n-th piece
    slots = np.minimum(seq_len, np.repeat(slots, numbers) - within * seq_len)
    return np.repeat(starts, numbers) + within * seq_len, slots, is_long


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each length, int64 [lengths], and the number of rows: best-fit decreasing.

    Each length, the longest first, goes into the fullest row that has room for it (Johnson,
    "Near-optimal bin packing algorithms", 1973). Equal lengths are placed together, and rows of
    equal room are kept as ranges, so that a million lengths take a fraction of a second. Lengths
    are from 1 to ``capacity``.
    """
    order = np.argsort(_small(capacity - lengths, capacity), kind="stable")
    counts = np.bincount(lengths)
    sizes = np.flatnonzero(counts)[::-1]
    rows = _Rows(capacity, len(lengths))
    for size, count in zip(sizes.tolist(), counts[sizes].tolist(), strict=True):
        rows.place(size, count)
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = rows.row_of
    return row_of, rows.total


def _small(values: np.ndarray, largest: int) -> np.ndarray:
    """The same in 16 bits if they suffice: numpy sorts those by radix, many times faster."""
    return values.astype(np.uint16) if largest < 1 << 16 else values


def spread(number: int) -> np.ndarray:
    """A new number for each row, int64 [number], so that short and long documents are mixed.

    Best fit makes the rows of the longest documents first, and an evaluation may use only the first
    samples. Multiples of the golden ratio, modulo one, are evenly spread (Weyl's sequence), and the
    same on every machine.
    """
    points = np.arange(number, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers = np.empty(number, np.int64)
    numbers[np.argsort(points, kind="stable")] = np.arange(number)
    return numbers


class _Rows:
    """Rows that are being filled: ranges of them, by the room that is left in each."""

    def __init__(self, capacity: int, items: int):
        self.capacity, self.total = capacity, 0
        self.row_of = np.empty(items, np.int64)  # of each item, in the order of placing
        self._placed = 0
        self._rooms: list[int] = []  # sorted; keys of _ranges
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # room -> first row, number of rows

    def place(self, size: int, count: int) -> None:
        """Place ``count`` items of one size, into the fullest rows that have room.

        A row that is the fullest of these stays it until it has no room for another item.
        """
        while count:
            room, first, available = self._take(size, count)
            each = room // size
            full = min(available, count // each)
            self._fill(np.repeat(np.arange(first, first + full), each))
            self._give(room - each * size, first, full)
            count -= full * each
            first, available = first + full, available - full
            if available and count:
                self._fill(np.full(count, first))
                self._give(room - count * size, first, 1)
                first, available, count = first + 1, available - 1, 0
            self._give(room, first, available)

    def _take(self, size: int, count: int) -> tuple[int, int, int]:
        """Room, first row and number of the rows that ``size`` fits best, new ones if needed."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            new = -(-count // (self.capacity // size))
            self.total += new
            return self.capacity, self.total - new, new
        room = self._rooms[at]
        first, available = self._ranges[room].pop()
        if not self._ranges[room]:
            del self._ranges[room], self._rooms[at]
        return room, first, available

    def _give(self, room: int, first: int, number: int) -> None:
        """Keep rows for later items, if there are any and they have room."""
        if not room or not number:
            return
        if room not in self._ranges:
            insort(self._rooms, room)
            self._ranges[room] = []
        self._ranges[room].append((first, number))

    def _fill(self, rows: np.ndarray) -> None:
        self.row_of[self._placed : self._placed + len(rows)] = rows
        self._placed += len(rows)
