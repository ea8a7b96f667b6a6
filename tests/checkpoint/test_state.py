"""TrainState: comes back as it was, or is refused by name; nothing is guessed."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainstack.checkpoint.state import STATE, TrainState, read_state
from trainstack.errors import Refused
from trainstack.train.startup import restore


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


NEEDED = json.loads(some_state().to_json()).keys() - {
    "undecayed", "loss_sum", "loss_steps", "best_step", "best_loss", "evaluations_without_better",
}  # fmt: skip


def test_a_state_from_before_norms_never_decayed_is_read_as_such():
    values = json.loads(some_state().to_json())
    assert values.pop("undecayed")
    assert not TrainState.from_json(json.dumps(values).encode(), "state.json").undecayed


@pytest.mark.parametrize("key", sorted(NEEDED))
def test_a_state_without_one_of_its_keys_is_refused_and_the_key_named(key):
    values = json.loads(some_state().to_json())
    del values[key]
    with pytest.raises(Refused, match=f"another version.* {key}\\b.*resume this run with"):
        TrainState.from_json(json.dumps(values).encode(), "state.json")


def test_a_state_with_a_key_that_is_not_known_here_is_refused():
    values = json.loads(some_state().to_json()) | {"ema": 1}
    with pytest.raises(Refused, match="differs in ema"):
        TrainState.from_json(json.dumps(values).encode(), "state.json")


@pytest.mark.parametrize(("undecayed", "shape", "decay", "is_refused"), [
    (False, (2, 4), 0.1, True), (False, (4,), 0.1, False), (False, (2, 4), 0.0, False),
    (True, (2, 4), 0.1, False),
])  # fmt: skip
def test_a_run_whose_norms_decayed_is_refused_where_they_would_not_any_more(
    tmp_path, undecayed, shape, decay, is_refused
):
    norm = type("Norm", (nn.Module,), {})()
    norm.weight = nn.Parameter(torch.ones(shape))
    strategy = SimpleNamespace(causal_lm=norm, load=lambda *_: None)
    at_start = TrainState.at_start({}, {"optim": {"weight_decay": decay}}, [], data_sets=1)
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes(replace(at_start, undecayed=undecayed).to_json())
    guard = SimpleNamespace(restore=lambda _: None)
    refusal = pytest.raises(Refused, match="let norms of this model decay; resume the run with")
    with refusal if is_refused else contextlib.nullcontext():
        restore(tmp_path, strategy, guard, at_start)
