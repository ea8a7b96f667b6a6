"""The verdict on an update: not finite, or a spike; the same after a stop."""

import copy
import json

import pytest
import torch

from trainstack.config.schema import GuardSection
from trainstack.resilience.guard import FEWEST, WINDOW, Diverged, Guard, Policy


def make_guard(policy: str = "skip", sigma: float | None = 6.0, is_scaled: bool = False) -> Guard:
    section = GuardSection(hang_seconds=60.0, on_divergence=policy, max_skips=3, spike_sigma=sigma)
    return Guard(section, torch.device("cpu"), is_scaled)


def judge(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def usual(guard: Guard, steps: int, seed: int = 1) -> list[bool]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 2, generator=generator) * 0.1
    return [judge(guard, 4 + a, 1 + b) for a, b in noise.tolist()]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(
    ("loss", "norm"),
    [(float("nan"), 1.0), (float("inf"), 1.0), (4.0, float("nan")), (4.0, float("-inf"))],
)
def test_what_is_not_finite_is_bad_under_every_policy(policy, loss, norm):
    assert judge(make_guard(policy), loss, norm)
    assert not judge(make_guard(policy), 4.0)


def test_a_spike_is_called_beyond_six_deviations_once_enough_is_known():
    guard = make_guard()
    assert not judge(guard, 1e6), "nothing is known yet"
    guard = make_guard()
    assert not any(usual(guard, FEWEST))
    assert judge(guard, 4 + 1.0), "ten deviations"
    assert judge(guard, 4.0, 1 + 1.0), "of the norm"
    assert not judge(guard, 4 + 0.3), "three"
    assert not judge(guard, 0.1), "a loss that falls is none"


def test_a_spike_does_not_count_as_usual_afterwards():
    guard = make_guard()
    usual(guard, 64)
    assert all(judge(guard, 40.0) for _ in range(WINDOW))


def test_the_window_moves_with_the_loss():
    guard = make_guard()
    for step in range(400):
        assert not judge(guard, 8 - step / 100, 1.0), step
    assert judge(guard, 8.0), "usual once, but not for the last 128 steps"


@pytest.mark.parametrize(("policy", "sigma"), [("stop", 6.0), ("skip", None)])
def test_no_spike_is_called_where_none_is_wanted(policy, sigma):
    guard = make_guard(policy, sigma)
    usual(guard, 64)
    assert not judge(guard, 1e6)


def test_a_guard_that_was_stopped_judges_on_as_one_that_was_not():
    whole = make_guard()
    usual(whole, 200)
    stopped = make_guard()
    usual(stopped, 200)
    state = json.loads(json.dumps(stopped.state()))  # as a checkpoint keeps it
    resumed = make_guard()
    resumed.restore(state)
    for loss in (4.05, 4.4, 4.58, 4.62, 4.7, 5.0):
        assert judge(copy.deepcopy(whole), loss) == judge(copy.deepcopy(resumed), loss)
    assert torch.equal(whole.recent, resumed.recent)
    make_guard().restore({})


def make_policy(on_divergence: str, is_scaled: bool = False) -> Policy:
    section = GuardSection(
        hang_seconds=60.0, on_divergence=on_divergence, max_skips=3, spike_sigma=6.0
    )
    return Policy(section, learning_rate=0.01, is_scaled=is_scaled)


NAN = float("nan")


def test_a_good_update_ends_a_row_of_skips():
    assert make_policy("skip").skips_after(9, 4.0, 1.0, False, skips_in_a_row=3) == 0


def test_bad_updates_are_skipped_until_too_many_follow_each_other():
    policy = make_policy("skip")
    assert policy.skips_after(7, NAN, 1.0, True, skips_in_a_row=0) == 1
    assert policy.skips_after(9, 40.0, 1.0, True, skips_in_a_row=2) == 3
    with pytest.raises(Diverged, match="step 10: a spike of loss 40.*3 updates in a row") as error:
        policy.skips_after(10, 40.0, 1.0, True, skips_in_a_row=3)
    assert not error.value.is_rollback


def test_the_first_bad_update_ends_a_run_that_does_not_skip():
    with pytest.raises(Diverged, match=r"step 7: not finite: loss nan.*now 0\.01"):
        make_policy("stop").skips_after(7, NAN, 1.0, True, skips_in_a_row=0)
    with pytest.raises(Diverged) as error:
        make_policy("rollback").skips_after(7, NAN, 1.0, True, skips_in_a_row=0)
    assert error.value.is_rollback and error.value.step == 7


def test_fp16_that_overflows_at_every_scale_is_a_divergence():
    """It would go on to the end, with the weights of its first step."""
    policy, skips = make_policy("stop", is_scaled=True), 0
    for step in range(1, 20):
        skips = policy.skips_after(step, 4.0, float("inf"), True, skips)
    assert skips == 19 and policy.skips_after(20, 4.0, 1.0, False, skips) == 0
    with pytest.raises(Diverged, match="in 20 steps in a row, at each lower scale; fp16 overflows"):
        policy.skips_after(20, 4.0, float("inf"), True, skips)


def test_fp16_that_lowers_its_scale_is_no_divergence_but_a_loss_that_is_not_finite_is():
    policy = make_policy("stop", is_scaled=True)
    assert policy.skips_after(7, 4.0, float("inf"), True, skips_in_a_row=0) == 1
    with pytest.raises(
        Diverged, match="; fp16 overflows .* set train.precision=bf16 or fp32, lower"
    ):
        policy.skips_after(7, NAN, 1.0, True, skips_in_a_row=0)
