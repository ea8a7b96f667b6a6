"""The learning rate as a function of the step, and what is said of it before the first."""

import math
from collections.abc import Callable
from itertools import pairwise

from trainstack.config.schedules import Place, share_of_peak
from trainstack.config.schema import Config, OptimSection
from trainstack.errors import ConfigError

MOST_TUNING_RATE = 1e-3  # at which a pretrained model may still keep what it knows
LEAST_LORA_RATE, MOST_LORA_RATE = 5e-5, 5e-3  # an adapter learns little below, falls apart above
SAMPLED = 1000  # steps at which a schedule is looked at, spread over the run


def warmup_of(section: OptimSection, max_steps: int) -> int:
    """Steps of warm-up: a share of all, rounded up as TrainingArguments does, or a number."""
    if section.warmup_ratio is None:
        return section.warmup_steps
    return math.ceil(max_steps * section.warmup_ratio)


def build_schedule(section: OptimSection, max_steps: int) -> Callable[[int], float]:
    """The learning rate at a step (from 1), by the schedule of that name.

    The schedule is asked for steps 1 to max_steps out of max_steps + 1, so that neither the first
    nor the last step is spent at rate zero.
    """
    name, settings = section.lr_scheduler_type, section.lr_scheduler_kwargs
    warmup, peak = warmup_of(section, max_steps), section.learning_rate

    def rate_at(step: int) -> float:
        return peak * share_of_peak(name, settings, Place(step, warmup, max_steps + 1, peak))

    return rate_at


def describe_schedule(section: OptimSection, max_steps: int) -> list[str]:
    """The rate at the start, at its peak and at the end, in a line; then what is in vain, if any.

    ConfigError if the decay does not fit into the run, if the rate rises above its peak, or if it
    is zero for several steps.
    """
    check_room(section, max_steps)
    name, peak, ratio = section.lr_scheduler_type, section.learning_rate, section.warmup_ratio
    warmup = warmup_of(section, max_steps)
    given = f"optim.warmup_{f'steps={warmup}' if ratio is None else f'ratio={ratio:g}'}"
    rate_at = build_schedule(section, max_steps)
    steps = {1, warmup - 1, warmup, *range(1, max_steps, -(-max_steps // SAMPLED)), max_steps}
    rates = {step: rate_at(step) for step in sorted(steps) if 1 <= step <= max_steps}
    highest = max(rates, key=rates.get)
    if not rates[highest] <= peak * (1 + 1e-9):
        raise ConfigError(
            f"optim.lr_scheduler_type={name}: the rate is {rates[highest]:.2e} at step {highest:,},"
            f" above optim.learning_rate={peak:g}; in optim.lr_scheduler_kwargs write a lower rate "
            f"as its end, such as {peak / 10:g}"
        )
    zero = next((step for (step, rate), (_, then) in pairwise(rates.items()) if not rate + then), 0)
    if zero:
        raise ConfigError(
            f"optim.lr_scheduler_kwargs={section.lr_scheduler_kwargs}: the rate is 0 from step "
            f"{zero:,} of {max_steps:,} on; let the schedule last as long as the run, or set the "
            "least rate that it takes"
        )
    told = [
        f"{rates[step]:.2e} at step {step:,}{' (its peak)' if step == highest else ''}"
        for step in sorted({1, highest, max_steps})
    ]
    lines = [f"learning rate {', '.join(told)}"]
    if name == "constant" and warmup:
        lines.append(f"{given} is not used: constant has no warm-up, but constant_with_warmup has")
    elif warmup >= max(2, max_steps):
        lines.append(
            f"{given}: all {max_steps:,} steps of the run are warm-up, which ends at "
            f"{rates[max_steps]:.2e}; optim.learning_rate={peak:g}"
        )
    return lines


def odd_rate(config: Config) -> list[str]:
    """A line if the rate is not one for what learns: pretrained weights, or an adapter's."""
    rate = config.optim.learning_rate
    said = f"optim.learning_rate={rate:g} is a rate for"
    if config.adapter.type:
        usual = "an adapter wants about ten times that of all weights, 1e-4 to 5e-4"
        if rate <= LEAST_LORA_RATE:
            return [f"{said} all weights of a model; {usual}"]
        return [f"{said} new weights; {usual}"] if rate > MOST_LORA_RATE else []
    if config.model.init != "pretrained" or rate <= MOST_TUNING_RATE:
        return []
    return [
        f"{said} new weights; for pretrained ones 1e-5 to 5e-4 "
        "is usual, and 1e-3 for a model of a few million parameters"
    ]


def check_room(section: OptimSection, max_steps: int) -> None:
    """ConfigError if warm-up, stable steps and decay do not fit into the run."""
    settings, warmup = section.lr_scheduler_kwargs, warmup_of(section, max_steps)
    decay, stable = settings.get("num_decay_steps", 0), settings.get("num_stable_steps", 0)
    if decay and warmup + stable + decay > max_steps + 1:
        left = max_steps - warmup - stable
        fix = f"num_decay_steps={left}" if left > 0 else "fewer of each, or more train.max_steps"
        raise ConfigError(
            f"optim.lr_scheduler_kwargs: {warmup} warmup_steps, {stable} num_stable_steps and "
            f"{decay} num_decay_steps do not fit into {max_steps:,} steps; write {fix}"
        )
