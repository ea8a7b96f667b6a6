"""No sample is repeated, lost or reordered: any sizes, any stops, any change of processes.

Hypothesis looks for a counterexample; one that it found is tried again at every run.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainstack.data.feed import StepSampler
from trainstack.data.order import samples_hash

MOST_STEPS = 40


@st.composite
def runs(draw):
    """A run: samples, global batch, seed, and its attempts as (last step, processes)."""
    batch = draw(st.integers(1, 24))
    samples = draw(st.integers(batch, 400))
    steps = draw(st.integers(1, MOST_STEPS))
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    stops = draw(st.lists(st.integers(1, steps), max_size=6, unique=True))
    attempts = [(stop, draw(st.sampled_from(sizes))) for stop in [*sorted(stops), steps]]
    return samples, batch, draw(st.integers(0, 2**63 - 1)), attempts


def consumed(samples, batch, seed, attempts, left_out=()) -> list[np.ndarray]:
    """What each step consumes, over all ranks of the attempt that executes it."""
    steps, first = [], 0
    for last, world_size in attempts:
        ranks = [
            StepSampler(samples, batch, r, world_size, seed, left_out) for r in range(world_size)
        ]
        for step in range(first, last):
            shares = [rank.samples_at(step) for rank in ranks]
            assert {len(share) for share in shares} == {batch // world_size}
            steps.append(np.concatenate(shares))
        first = last
    return steps


@given(runs())
@settings(max_examples=200, deadline=None)
def test_every_epoch_uses_every_sample_once_whatever_stops_and_resizes_a_run(run):
    samples, batch, seed, attempts = run
    steps = consumed(samples, batch, seed, [(attempts[-1][0], 1)])
    whole = np.concatenate(steps)
    assert [sorted(step) for step in consumed(*run)] == [sorted(step) for step in steps]
    epochs = [whole[i : i + samples] for i in range(0, len(whole), samples)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch), "repeated"
        if len(epoch) == samples:
            assert set(epoch.tolist()) == set(range(samples)), "lost"


@given(runs())
@settings(max_examples=200, deadline=None)
def test_stops_and_sizes_change_neither_what_a_step_consumes_nor_its_hash(run):
    samples, batch, seed, attempts = run
    interrupted = consumed(*run)
    alone = consumed(samples, batch, seed, [(attempts[-1][0], 1)])
    for theirs, ours in zip(interrupted, alone, strict=True):
        assert sorted(theirs.tolist()) == sorted(ours.tolist())
        assert samples_hash(theirs) == samples_hash(ours)


@given(runs(), st.integers(0, MOST_STEPS), st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_a_window_that_is_left_out_moves_what_follows_and_nothing_else(run, after, steps):
    samples, batch, seed, attempts = run
    last = attempts[-1][0]
    window = [{"after": after, "steps": steps}]
    alone = consumed(samples, batch, seed, [(last + steps, 1)])
    moved = consumed(samples, batch, seed, attempts, window)
    wanted = [alone[s] if s < after else alone[s + steps] for s in range(last)]
    for theirs, ours in zip(moved, wanted, strict=True):
        assert sorted(theirs.tolist()) == sorted(ours.tolist())
