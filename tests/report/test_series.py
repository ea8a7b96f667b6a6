"""Curves of long logs and of torn ones: every extreme is drawn, and nothing that is none."""

import json
import math

import numpy as np
import pytest

from trainstack.report import series
from trainstack.report.series import Executed, curves_of

MANY = 50_000
SPIKES = {1: 9.0, 12_345: 50.0, 30_000: -4.0, MANY - 1: 8.5}


def write(path, lines) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def sample(step: int, attempt: str, at: float) -> str:
    record = {"step": step, "samples_hash": "0", "attempt": attempt, "at": at}
    return json.dumps(record)


@pytest.fixture
def executed(tmp_path) -> Executed:
    """Attempt 7.1 executed steps 1 to 6, and 7.2 the last two of them again, then two more."""
    steps = [*((step, "7.1") for step in range(1, 7)), *((step, "7.2") for step in range(5, 9))]
    lines = [sample(step, name, at) for at, (step, name) in enumerate(steps, start=100)]
    write(tmp_path / "samples.jsonl", lines)
    return Executed.read(tmp_path / "samples.jsonl")


def test_every_spike_of_a_long_log_is_drawn_at_its_step(tmp_path, executed):
    write(
        tmp_path / "metrics.jsonl",
        (f'{{"step": {s}, "loss": {SPIKES.get(s, 2 + s % 7 / 100)}}}' for s in range(1, MANY + 1)),
    )
    curve = curves_of(tmp_path / "metrics.jsonl", [], executed)["loss"]
    drawn = dict(zip(curve["step"], curve["value"], strict=True))
    assert {step: drawn.get(step) for step in SPIKES} == SPIKES
    assert len(drawn) <= 2 * series.BINS + 2
    assert curve["step"] == sorted(curve["step"]) and (1 in drawn and MANY in drawn)
    assert curve["every"] == math.ceil(MANY / series.BINS)


@pytest.mark.parametrize("number", [1, 2 * series.BINS, 2 * series.BINS + 1, 7 * series.BINS + 3])
def test_the_ends_and_the_extremes_are_among_what_is_drawn(number):
    values = np.random.default_rng(number).normal(size=number)
    kept = series.extremes(values)
    assert {0, number - 1, values.argmin(), values.argmax()} <= {*kept.tolist()}
    assert sorted({*kept.tolist()}) == kept.tolist()


def test_a_step_was_when_it_was_executed_for_the_last_time(tmp_path, executed):
    write(tmp_path / "metrics.jsonl", (f'{{"step": {s}, "loss": {s}}}' for s in range(1, 11)))
    curve = curves_of(tmp_path / "metrics.jsonl", [], executed)["loss"]
    assert curve["at"] == [100, 101, 102, 103, 106, 107, 108, 109, None, None]
    assert executed.redone == 2


def test_what_a_timeline_needs_are_the_ends_of_attempts_and_the_steps_that_are_asked_for(executed):
    told = [(e.step, e.attempt) for e in executed.telling([2])]
    first = [(step, "7.1") for step in (1, 2, 3, 4, 5, 6)]
    assert told == [*first, (5, "7.2"), (8, "7.2")]


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', '{"step": 2, "lo{"step": 2, "loss": 5}', "[2]", "\x00\x00", ""]
)
def test_a_torn_line_is_left_out_and_the_others_count(tmp_path, executed, torn):
    good = [f'{{"step": {step}, "loss": {step}.5}}' for step in (1, 3)]
    write(tmp_path / "metrics.jsonl", [good[0], torn, good[1]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 4.5}')  # its end is being written
    curve = curves_of(tmp_path / "metrics.jsonl", [], executed)["loss"]
    assert (curve["step"], curve["value"]) == ([1, 3], [1.5, 3.5])


def test_a_loss_that_is_not_finite_is_a_gap_and_each_data_set_has_its_curve(tmp_path, executed):
    lines = [
        '{"step": 1, "loss": NaN}',
        '{"step": 2, "loss": Infinity}',
        '{"step": 3, "loss": 3, "source_tokens": {"a/b": 1}}',
        '{"step": 3, "eval_loss": 4, "source_eval_loss": {"a/b": 3.5, "c": 4.5}}',
    ]
    write(tmp_path / "metrics.jsonl", lines)
    found = curves_of(tmp_path / "metrics.jsonl", ["a/b", "c"], executed)
    values = {name: curve["value"] for name, curve in found.items()}
    assert values == {
        "loss": [3], "eval_loss": [4], "eval_loss of a/b": [3.5], "eval_loss of c": [4.5]
    }  # fmt: skip


def test_a_run_without_these_files_has_no_curve(tmp_path):
    executed = Executed.read(tmp_path / "samples.jsonl")
    assert curves_of(tmp_path / "metrics.jsonl", [], executed) == {}
    assert (executed.telling([3]), executed.redone) == ([], 0)
