"""TrainState: comes back as it was, or is refused by name; nothing is guessed."""

import json

import pytest

from trainstack.checkpoint.state import STATE, TrainState, read_state
from trainstack.errors import Refused


def some_state() -> TrainState:
    state = TrainState.at_start({"run.seed": 1}, {"run": {"name": "x"}}, [], data_sets=2)
    state.step, state.drawn = 7, [5, 3]
    state.guard = {"count": 7, "recent": [[0.1, 1 / 3], [2.0**-40, 1e300]]}
    return state


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes(some_state().to_json())
    assert read_state(tmp_path) == some_state()


def test_only_a_mixture_counts_what_it_has_drawn():
    assert TrainState.at_start({}, {}, [], data_sets=1).drawn is None
    assert TrainState.at_start({}, {}, [], data_sets=3).drawn == [0, 0, 0]


@pytest.mark.parametrize("key", json.loads(some_state().to_json()))
def test_a_state_without_one_of_its_keys_is_refused_and_the_key_named(key):
    values = json.loads(some_state().to_json())
    del values[key]
    with pytest.raises(Refused, match=f"another version.* {key}\\b.*resume this run with"):
        TrainState.from_json(json.dumps(values).encode(), "state.json")


def test_a_state_with_a_key_that_is_not_known_here_is_refused():
    values = json.loads(some_state().to_json()) | {"ema": 1}
    with pytest.raises(Refused, match="differs in ema"):
        TrainState.from_json(json.dumps(values).encode(), "state.json")
