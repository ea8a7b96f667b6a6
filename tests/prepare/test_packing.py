"""Packing: nothing is lost, nothing that fits is cut, rows are full, and it is fast."""

import time

import numpy as np
import pytest

from trainstack.data import packing


def lengths_of(seed: int, number: int, longest: int) -> np.ndarray:
    """Lengths as conversations have them: many short ones, few long ones."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(5, 1, number).astype(np.int64), 1, longest)


def every_token(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    return stops - starts


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_places_every_length_in_one_row_and_no_row_overflows(seed):
    capacity = (7, 64, 512, 4096)[seed % 4]
    lengths = lengths_of(seed, 2000, capacity)
    row_of, num_rows = packing.best_fit(lengths, capacity)
    filled = np.bincount(row_of, weights=lengths, minlength=num_rows)
    assert filled.min() > 0
    assert filled.max() <= capacity
    assert filled.sum() == lengths.sum()


@pytest.mark.parametrize("seed", range(6))
def test_best_fit_is_what_the_textbook_says(seed):
    """One by one: the longest first, into the fullest row that has room."""
    capacity = 40
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, 300)
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    row_of, num_rows = packing.best_fit(lengths, capacity)
    filled = np.bincount(row_of, weights=lengths, minlength=num_rows)
    assert sorted(capacity - filled) == sorted(rooms)


def test_a_million_lengths_are_packed_in_a_moment_with_little_padding():
    lengths = lengths_of(1, 1_000_000, 4096)
    started = time.perf_counter()
    _, num_rows = packing.best_fit(lengths, 4096)
    seconds = time.perf_counter() - started
    assert 1 - lengths.sum() / (num_rows * 4096) < 0.003
    assert seconds < 5, "about 0.3 s on one core"


@pytest.mark.parametrize("kind", ["none", "best_fit"])
@pytest.mark.parametrize("seed", range(4))
def test_each_target_is_in_exactly_one_sample_and_only_long_documents_are_cut(kind, seed):
    seq_len, sizes = 50, np.random.default_rng(seed).integers(2, 180, 200)
    stops = np.cumsum(sizes)
    made = packing.plan(stops, every_token, seq_len, kind, "split")
    seen = np.zeros(stops[-1], np.int64)
    for first, slots in made.pieces:
        seen[first + 1 : first + 1 + slots] += 1
    starts = np.concatenate([[0], stops[:-1]])
    assert seen[starts].tolist() == [0] * len(starts), "no target across a border"
    seen[starts] = 1
    assert (seen == 1).all()
    whole = {(s, n - 1) for s, n in zip(starts, sizes, strict=True) if n - 1 <= seq_len}
    assert whole <= {tuple(piece) for piece in made.pieces.tolist()}
    filled = np.add.reduceat(made.pieces[:, 1], made.rows[:-1])
    assert filled.max() <= seq_len
    assert (made.targets == filled).all()
    assert made.split_documents == (sizes - 1 > seq_len).sum()
    assert made.dropped_documents == 0


@pytest.mark.parametrize("kind", ["none", "best_fit"])
def test_groups_of_documents_are_laid_out_one_after_the_other(monkeypatch, kind):
    monkeypatch.setattr(packing, "GROUP", 70)
    sizes = np.random.default_rng(9).integers(2, 180, 200)
    stops = np.cumsum(sizes)
    made = list(packing.plans(stops, every_token, 50, kind, "split"))
    assert len(made) == 3
    seen = np.zeros(stops[-1], np.int64)
    for first, slots in np.concatenate([group.pieces for group in made]):
        seen[first + 1 : first + 1 + slots] += 1
    seen[np.concatenate([[0], stops[:-1]])] += 1
    assert (seen == 1).all()
    assert sum(group.split_documents for group in made) == (sizes > 51).sum()


def test_documents_that_are_too_long_are_dropped_and_counted_if_asked():
    stops = np.cumsum([10, 52, 51, 200])
    made = packing.plan(stops, every_token, 50, "best_fit", "drop")
    assert sorted(made.pieces.tolist()) == [[0, 9], [62, 50]]
    assert (made.dropped_documents, made.split_documents) == (2, 0)


def test_a_piece_without_a_target_makes_no_sample():
    learned = np.zeros(200, bool)
    learned[180:] = True

    def count(starts, stops):
        total = np.concatenate([[0], np.cumsum(learned)])
        return total[stops] - total[starts]

    made = packing.plan(np.array([200]), count, 50, "none", "split")
    assert made.pieces.tolist() == [[150, 49]]
    assert made.targets.tolist() == [20]


def test_any_first_part_of_the_samples_has_long_and_short_documents():
    lengths = lengths_of(3, 20_000, 1000)
    made = packing.plan(np.cumsum(lengths + 1), every_token, 1000, "best_fit", "split")
    numbers = np.diff(made.rows)
    assert np.mean(numbers[:200]) == pytest.approx(np.mean(numbers), rel=0.1)


def test_no_documents_make_no_samples():
    for kind in ("none", "best_fit"):
        made = packing.plan(np.zeros(0, np.int64), every_token, 50, kind, "split")
        assert made.rows.tolist() == [0]
        assert len(made.pieces) == len(made.targets) == 0
