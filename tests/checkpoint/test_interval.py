"""When the next checkpoint is due: Young's interval, from costs and failures seen."""

import math

import pytest

from trainstack.checkpoint.interval import LEAST_STEPS, MOST_SECONDS, Interval, observed_hours


def event(name: str, **facts) -> dict:
    return {"event": name, **facts}


def test_the_first_interval_follows_from_what_a_save_is_expected_to_take():
    interval = Interval(1.0, [], save_seconds=20.0, now=0.0)
    due = [now for now in range(1, 200) if interval.is_due(float(now))]
    assert due[0] == math.sqrt(2 * 2.0 * 3600)  # a tenth of the save is what it costs


def test_the_interval_is_youngs():
    interval = Interval(2.0, [], 20.0, now=0.0)
    interval.saved(stall_seconds=1.0, save_seconds=10.0)  # costs 1 s + a tenth of 10 s
    assert interval.seconds == pytest.approx(math.sqrt(2 * 2.0 * 7200))


def test_it_is_never_shorter_than_two_saves_and_never_longer_than_half_an_hour():
    interval = Interval(0.01, [], 20.0, now=0.0)
    interval.saved(0.0, 100.0)
    assert interval.seconds == 200.0
    interval = Interval(1e6, [], 20.0, now=0.0)
    interval.saved(10.0, 10.0)
    assert interval.seconds == MOST_SECONDS


def test_ten_steps_are_between_two_saves_however_slow_they_are():
    interval = Interval(1.0, [], 20.0, now=0.0)
    due = [step for step in range(1, 30) if interval.is_due(step * 1000.0)]
    assert due[0] == LEAST_STEPS
    interval.saving(30_000.0)
    assert not interval.is_due(40_000.0)


def test_failures_are_counted_with_those_that_did_not_report():
    healthy = [event("attempt"), event("checkpoint", train_hours=10.0), event("paused")]
    assert observed_hours([]) == 24.0
    assert observed_hours(healthy) == 34.0
    assert observed_hours([*healthy, event("attempt"), event("failed"), event("attempt")]) == 17.0
    killed = [*healthy, event("attempt"), event("attempt")]
    assert observed_hours(killed) == 17.0
