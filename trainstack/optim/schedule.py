"""The learning rate as a function of the step."""

from collections.abc import Callable

import torch
from transformers import get_scheduler

from trainstack.config.schema import OptimSection
from trainstack.errors import ConfigError


def build_schedule(section: OptimSection, max_steps: int) -> Callable[[int], float]:
    """The learning rate at a step (from 1), by transformers' schedule of that name.

    The schedule is asked for steps 1 to max_steps out of max_steps + 1, so that neither the first
    nor the last step is spent at rate zero.
    """
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        scheduler = get_scheduler(
            section.lr_scheduler_type,
            unit,
            num_warmup_steps=section.warmup_steps,
            num_training_steps=max_steps + 1,
            scheduler_specific_kwargs=dict(section.lr_scheduler_kwargs),
        )
        factor = scheduler.lr_lambdas[0]
        factor(1)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.lr_scheduler_kwargs={section.lr_scheduler_kwargs} does not fit "
            f"optim.lr_scheduler_type={section.lr_scheduler_type}: {error}"
        ) from None
    return lambda step: section.learning_rate * factor(step)
