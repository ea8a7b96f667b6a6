"""The learning rate as a function of the step."""

import pytest

from trainstack.config.schema import OptimSection
from trainstack.errors import ConfigError
from trainstack.optim import schedule

OPTIM = {
    "learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 10,
}  # fmt: skip


def test_the_schedule_starts_above_zero_peaks_after_warmup_and_ends_at_its_floor():
    rate_at = schedule.build_schedule(OptimSection(**OPTIM), 120)
    assert rate_at(1) == pytest.approx(1e-3)
    assert rate_at(10) == pytest.approx(1e-2)
    assert rate_at(120) == pytest.approx(1e-3, rel=1e-2)
    rates = [rate_at(step) for step in range(10, 121)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "polynomial"])
def test_schedules_of_transformers_go_by_their_names(name):
    section = OptimSection(**{**OPTIM, "lr_scheduler_type": name, "lr_scheduler_kwargs": {}})
    rate_at = schedule.build_schedule(section, 50)
    assert all(rate_at(step) > 0 for step in range(1, 51))


def test_settings_that_a_schedule_does_not_take_are_an_error_with_its_name():
    section = OptimSection(**{**OPTIM, "lr_scheduler_kwargs": {"no_such": 1}})
    with pytest.raises(ConfigError, match="no_such.*cosine_with_min_lr"):
        schedule.build_schedule(section, 50)
