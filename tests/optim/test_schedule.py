"""The learning rate as a function of the step: as transformers has it, and what is said of it."""

import itertools
import warnings

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from trainstack.config.schedules import SCHEDULES
from trainstack.config.schema import OptimSection
from trainstack.errors import ConfigError
from trainstack.optim.schedule import build_schedule, describe_schedule, warmup_of

OPTIM = {
    "learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 10,
    "warmup_ratio": None,
}  # fmt: skip
SHAPES = ("linear", "cosine", "1-sqrt")
TAKEN = {  # settings that each schedule takes
    "constant": [{}],
    "constant_with_warmup": [{}],
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.3}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [
        {"min_lr_rate": 0.1}, {"min_lr": 3e-4}, {"min_lr": 0.0, "num_cycles": 0.7},
    ],
    "cosine_warmup_with_min_lr": [
        {"min_lr_rate": 0.1}, {"min_lr": 3e-4}, {"min_lr": 1e-5, "warmup_lr_rate": 0.05},
    ],
    "polynomial": [{}, {"lr_end": 1e-4, "power": 2.0}, {"lr_end": 0.0, "power": 0.5}],
    "inverse_sqrt": [{}, {"timescale": 500}],
    "warmup_stable_decay": [
        {"num_decay_steps": 20},
        *(
            {"num_decay_steps": 20, "num_stable_steps": 15, "warmup_type": up, "decay_type": down,
             "min_lr_ratio": least}
            for up, down, least in itertools.product(SHAPES, SHAPES, (0.0, 0.07))
        ),
    ],
}  # fmt: skip


def section(name: str, kwargs: dict, **changes) -> OptimSection:
    kind = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs}
    return OptimSection(**{**OPTIM, **kind, **changes})


def of_transformers(wanted: OptimSection, steps: int):
    """The rates that transformers gives to an optimizer of the very learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=wanted.learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stable steps beside the number of all steps
        made = get_scheduler(
            wanted.lr_scheduler_type, optimizer, wanted.warmup_steps, steps + 1,
            dict(wanted.lr_scheduler_kwargs),
        )  # fmt: skip
    (factor,) = made.lr_lambdas
    return lambda step: wanted.learning_rate * factor(step)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_rate_is_that_of_transformers_to_the_last_bit(name):
    for kwargs, peak, warmup, steps in itertools.product(
        TAKEN[name], (4e-3, 3.7e-4), (0, 1, 10, 37), (40, 160)
    ):
        wanted = section(name, kwargs, learning_rate=peak, warmup_steps=warmup)
        ours, theirs = build_schedule(wanted, steps), of_transformers(wanted, steps)
        for step in range(1, steps + 1):
            assert ours(step) == theirs(step), (kwargs, peak, warmup, steps, step)


def test_all_schedules_of_transformers_that_are_functions_of_the_step_are_there():
    follow_the_loss = {"reduce_lr_on_plateau", "greedy"}
    known = {kind.value for kind in SchedulerType}
    assert known - follow_the_loss <= set(SCHEDULES)
    assert set(TAKEN) == set(SCHEDULES)


def test_the_schedule_starts_above_zero_peaks_after_warmup_and_ends_at_its_floor():
    rate_at = build_schedule(OptimSection(**OPTIM), 120)
    assert rate_at(1) == pytest.approx(1e-3)
    assert rate_at(10) == pytest.approx(1e-2)
    assert rate_at(120) == pytest.approx(1e-3, rel=1e-2)
    rates = [rate_at(step) for step in range(10, 121)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cosine_with_min_lr", {"min_lr": 2e-3}),
        ("cosine_warmup_with_min_lr", {"min_lr": 2e-3}),
        ("polynomial", {"lr_end": 2e-3}),
    ],
)
def test_a_least_rate_is_a_rate_and_not_a_share_of_the_peak(name, kwargs):
    assert build_schedule(section(name, kwargs), 1000)(1000) == pytest.approx(2e-3, rel=0.01)


def told(name: str, kwargs: dict, steps: int, **changes) -> list[str]:
    return describe_schedule(section(name, kwargs, **changes), steps)


def test_a_line_tells_the_rate_at_the_start_at_its_peak_and_at_the_end():
    assert told("cosine_with_min_lr", {"min_lr_rate": 0.1}, 160) == [
        "learning rate 1.00e-03 at step 1, 1.00e-02 at step 10 (its peak), 1.00e-03 at step 160"
    ]
    # Also where not every step is looked at.
    assert told("linear", {}, 1_000_003, warmup_steps=12_345) == [
        "learning rate 8.10e-07 at step 1, 1.00e-02 at step 12,345 (its peak), "
        "1.01e-08 at step 1,000,003"
    ]
    assert told("constant", {}, 5, warmup_steps=0) == [
        "learning rate 1.00e-02 at step 1 (its peak), 1.00e-02 at step 5"
    ]


def test_warmup_that_is_not_used_or_does_not_end_is_a_line():
    _, ignored = told("constant", {}, 160)
    assert ignored == (
        "optim.warmup_steps=10 is not used: constant has no warm-up, but constant_with_warmup has"
    )
    for steps, reached in ((5, "5.00e-03"), (10, "1.00e-02")):
        _, endless = told("linear", {}, steps)
        assert endless == (
            f"optim.warmup_steps=10: all {steps} steps of the run are warm-up, which ends at "
            f"{reached}; optim.learning_rate=0.01"
        )
    assert len(told("linear", {}, 11)) == 1
    assert len(told("linear", {}, 1, warmup_steps=1)) == 1  # nothing else is possible


def test_a_warmup_ratio_is_a_share_of_all_steps_rounded_up_as_transformers_does():
    trained = TrainingArguments(warmup_steps=0.03, report_to=[])
    for steps in (1, 100, 333, 1000, 20_001):
        asked = section("linear", {}, warmup_ratio=0.03)  # it decides, not the 10 warmup_steps
        assert warmup_of(asked, steps) == trained.get_warmup_steps(steps)
        equal = section("linear", {}, warmup_steps=warmup_of(asked, steps))
        step = steps // 50 + 1
        assert build_schedule(asked, steps)(step) == build_schedule(equal, steps)(step)
    assert warmup_of(section("linear", {}, warmup_ratio=0.0), 100) == 0
    assert "1.00e-02 at step 10 (its peak)" in told("linear", {}, 333, warmup_ratio=0.03)[0]


def test_a_warmup_ratio_that_is_not_used_does_not_end_or_leaves_no_room_is_named():
    assert told("constant", {}, 160, warmup_ratio=0.1)[1].startswith("optim.warmup_ratio=0.1 is no")
    assert told("linear", {}, 10, warmup_ratio=0.95)[1].startswith(
        "optim.warmup_ratio=0.95: all 10 steps of the run are warm-up"
    )
    with pytest.raises(ConfigError, match="80 warmup_steps, 0 num_stable_steps and 90 num_decay"):
        told(WSD, {"num_decay_steps": 90}, 160, warmup_ratio=0.5)


WSD = "warmup_stable_decay"
WRONG = [
    (WSD, {"num_decay_steps": 200}, {}, "10 warmup_steps, 0 num_stable_steps and 200 num_decay"),
    (WSD, {"num_decay_steps": 10, "num_stable_steps": 160}, {}, "do not fit into 160 steps"),
    (WSD, {"num_decay_steps": 20, "num_stable_steps": 145}, {}, "write num_decay_steps=5"),
    (WSD, {"num_decay_steps": 20, "num_stable_steps": 20}, {}, "the rate is 0 from step 50 of 160"),
    ("polynomial", {}, {"learning_rate": 1e-8}, "above optim.learning_rate=1e-08; in optim.lr_sch"),
    ("polynomial", {"lr_end": 0.1}, {}, "a lower rate as its end, such as 0.001"),
    ("cosine_with_min_lr", {"min_lr": 0.1}, {}, "1.00e-01 at step 160, above optim.learning_rate"),
    ("cosine_warmup_with_min_lr", {"min_lr": 0.1}, {}, "above optim.learning_rate=0.01"),
    (WSD, {"num_decay_steps": 20, "num_stable_steps": 20, "min_lr_ratio": 0.1}, {}, None),
    (WSD, {"num_decay_steps": 150}, {}, None),
    (WSD, {"num_decay_steps": 10, "num_stable_steps": 140}, {}, None),
    ("cosine_with_restarts", {"num_cycles": 3}, {}, None),
    ("cosine", {"num_cycles": 3}, {}, None),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0}, {}, None),
]


@pytest.mark.parametrize(("name", "kwargs", "changes", "problem"), WRONG)
def test_a_schedule_that_does_not_fit_the_run_is_an_error(name, kwargs, changes, problem):
    if problem is None:
        assert len(told(name, kwargs, 160, **changes)) == 1
        return
    with pytest.raises(ConfigError, match="optim.lr_scheduler") as error:
        told(name, kwargs, 160, **changes)
    assert problem in str(error.value)
