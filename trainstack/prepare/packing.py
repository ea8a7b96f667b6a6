"""Which documents share a sample: packing without cutting, computed once from their lengths.

Documents are laid out in groups, so that memory does not grow with their number. A document of L
tokens takes L - 1 places: its last token is only a target, and its first one is none. One that is
longer than a sample is split so that each target is kept, or dropped.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

GROUP = 1 << 17  # documents


@dataclass
class Plan:
    """The samples of a split, one after the other."""

    pieces: np.ndarray  # int64 [pieces, 2]: first token, places
    rows: np.ndarray  # int64 [samples + 1]: sample i has pieces rows[i] to rows[i + 1]
    targets: np.ndarray  # int64 [samples]: tokens that carry loss
    split_documents: int
    dropped_documents: int


def plans(
    stops: np.ndarray,
    targets_in: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seq_len: int,
    packing: str,
    too_long: str,
) -> Iterator[Plan]:
    """Lay out documents, which end before ``stops``, in samples of ``seq_len`` places.

    ``targets_in(starts, stops)`` counts the tokens of ranges that carry loss. Deterministic.
    """
    for first in range(0, len(stops), GROUP):
        start = int(stops[first - 1]) if first else 0
        group = np.array(stops[first : first + GROUP])
        yield plan(group, targets_in, seq_len, packing, too_long, start)


def plan(
    stops: np.ndarray,
    targets_in: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seq_len: int,
    packing: str,
    too_long: str,
    start: int = 0,
) -> Plan:
    """One group of documents, of which the first one begins at ``start``; else as ``plans``."""
    starts, places, is_long = cut(stops, seq_len, too_long, start)
    targets = targets_in(starts + 1, starts + 1 + places)
    is_useful = targets > 0  # a piece of a split document may carry no loss
    if not is_useful.all():
        starts, places, targets = starts[is_useful], places[is_useful], targets[is_useful]
    if packing == "best_fit":
        row_of, num_rows = best_fit(places, seq_len)
        row_of = spread(num_rows)[row_of]
        order = np.argsort(_small(row_of, num_rows), kind="stable")
        starts, places, targets = starts[order], places[order], targets[order]
        rows = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    else:
        rows = np.arange(len(starts) + 1)
    total = np.concatenate([[0], np.cumsum(targets)])
    long = int(is_long.sum())
    is_split = too_long == "split"
    return Plan(
        np.stack([starts, places], axis=1),
        rows.astype(np.int64),
        np.diff(total[rows]),
        long * is_split,
        long * (not is_split),
    )


def cut(
    stops: np.ndarray, seq_len: int, too_long: str, start: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token and places of each piece in order, and which documents are too long.

    Pieces of a split document overlap by a token: the last target of one is the first input of the
    next, so that each target is in exactly one.
    """
    starts = np.concatenate([np.full(1, start, np.int64), stops[:-1]])[: len(stops)]
    places = stops - starts - 1
    is_long = places > seq_len
    if too_long == "drop":
        return starts[~is_long], places[~is_long], is_long
    numbers = -(-places // seq_len)
    firsts = np.cumsum(numbers) - numbers
    within = np.arange(int(numbers.sum())) - np.repeat(firsts, numbers)
    places = np.minimum(seq_len, np.repeat(places, numbers) - within * seq_len)
    return np.repeat(starts, numbers) + within * seq_len, places, is_long


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each length, and the number of rows: best-fit decreasing.

    Each length, the longest first, goes into the fullest row that has room for it (Johnson, 1973).
    Equal lengths are placed together: rows of equal room are kept as ranges, so that a million
    lengths take a fraction of a second. Lengths lie between 1 and ``capacity``.
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
    """The same in 16 bits where they suffice: numpy sorts those by radix, many times faster."""
    return values.astype(np.uint16) if largest < 1 << 16 else values


def spread(number: int) -> np.ndarray:
    """Another place for each row, so that any first part of them has long and short documents.

    The rows come with the longest first; an evaluation may use only some. Multiples of the golden
    ratio, modulo one, lie evenly (Weyl's sequence), and are the same everywhere.
    """
    points = np.arange(number, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    places = np.empty(number, np.int64)
    places[np.argsort(points, kind="stable")] = np.arange(number)
    return places


class _Rows:
    """Rows being filled: ranges of them, by the room that is left in each."""

    def __init__(self, capacity: int, items: int):
        self.capacity, self.total = capacity, 0
        self.row_of = np.empty(items, np.int64)  # in the order of placement
        self._placed = 0
        self._rooms: list[int] = []  # sorted; keys of _ranges
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # room -> first row, number of rows

    def place(self, size: int, count: int) -> None:
        """Place ``count`` items of one size.

        A row that was the fullest fitting one stays so until it has no room for another.
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
        """Room, first row and number of the rows that ``size`` fits best, new ones if need be."""
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
        if not room or not number:
            return
        if room not in self._ranges:
            insort(self._rooms, room)
            self._ranges[room] = []
        self._ranges[room].append((first, number))

    def _fill(self, rows: np.ndarray) -> None:
        self.row_of[self._placed : self._placed + len(rows)] = rows
        self._placed += len(rows)
