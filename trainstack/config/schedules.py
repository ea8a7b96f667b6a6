"""The schedules of transformers: each a formula, whose keyword arguments are what it takes.

They are those of transformers/optimization.py to the last bit, which a test holds. They are written
out because that module imports torch: a login node checks a schedule in a blink.
"""

import inspect
import math
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, create_model

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)] | None
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1)]
AnySteps = Annotated[int, Field(ge=0)] | None
Shape = Literal["linear", "cosine", "1-sqrt"]


class Place(NamedTuple):
    """A step of a schedule of ``total`` steps, from 0. A formula gives its share of ``peak``."""

    step: int
    warmup: int  # steps
    total: int
    peak: float  # learning rate

    @property
    def progress(self) -> float:
        """From 0, at the end of the warm-up, to 1."""
        return (self.step - self.warmup) / (self.total - self.warmup)


def share_of_peak(name: str, settings: dict, at: Place) -> float:
    """The learning rate by the schedule of that name, as a share of the highest one."""
    if at.step < at.warmup and name not in WITH_OWN_WARMUP:
        return at.step / at.warmup
    return SCHEDULES[name](at, **settings)


def constant(at: Place) -> float:
    return 1.0


def constant_with_warmup(at: Place) -> float:
    return 1.0


def linear(at: Place) -> float:
    return (at.total - at.step) / (at.total - at.warmup)


def cosine(at: Place, *, num_cycles: Positive = 0.5) -> float:
    return wave(at.progress, num_cycles)


def cosine_with_restarts(at: Place, *, num_cycles: Positive = 1) -> float:
    return wave((num_cycles * at.progress) % 1.0, 0.5)


def cosine_with_min_lr(
    at: Place, *, num_cycles: Positive = 0.5, min_lr: Rate = None, min_lr_rate: Share | None = None
) -> float:
    return wave(at.progress, num_cycles, min_lr_rate if min_lr is None else min_lr / at.peak)


def cosine_warmup_with_min_lr(
    at: Place, *, num_cycles: Positive = 0.5, min_lr: Rate = None,
    min_lr_rate: Share | None = None, warmup_lr_rate: Share | None = None,
) -> float:  # fmt: skip
    if at.step >= at.warmup:
        progress = (at.step - at.warmup + 1.0) / (at.total - at.warmup)
        return wave(progress, num_cycles, min_lr_rate if min_lr is None else min_lr / at.peak)
    if warmup_lr_rate is None:
        return (at.step + 1.0) / at.warmup
    return warmup_lr_rate + (1.0 - warmup_lr_rate) * at.step / max(1, at.warmup - 1)


def polynomial(at: Place, *, lr_end: Rate = 1e-7, power: Positive = 1.0) -> float:
    return ((at.peak - lr_end) * (1 - at.progress) ** power + lr_end) / at.peak


def inverse_sqrt(at: Place, *, timescale: Steps | None = None) -> float:
    timescale = timescale or at.warmup or 10_000
    return 1.0 / math.sqrt((at.step + (timescale - at.warmup)) / timescale)


def warmup_stable_decay(
    at: Place, *, num_decay_steps: Steps, num_stable_steps: AnySteps = None,
    warmup_type: Shape = "linear", decay_type: Shape = "cosine", min_lr_ratio: Share = 0.0,
    num_cycles: Positive = 0.5,
) -> float:  # fmt: skip
    if num_stable_steps is None:
        num_stable_steps = at.total - at.warmup - num_decay_steps
    decayed = at.step - at.warmup - num_stable_steps
    if at.step < at.warmup:
        p = at.step / at.warmup
        shapes = {"linear": p, "cosine": 0.5 * (1.0 - math.cos(math.pi * p))}
        share = shapes.get(warmup_type, 1.0 - math.sqrt(1.0 - p))
    elif decayed < 0:
        return 1.0
    elif decayed >= num_decay_steps:
        return min_lr_ratio
    else:
        p = decayed / num_decay_steps
        shapes = {"linear": 1.0 - p, "cosine": wave(p, num_cycles)}
        share = shapes.get(decay_type, 1.0 - math.sqrt(p))
    return share * (1.0 - min_lr_ratio) + min_lr_ratio


def wave(progress: float, num_cycles: float, least: float = 0.0) -> float:
    """A cosine that falls from 1 to ``least`` in half a cycle."""
    share = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return share * (1 - least) + least


WITH_OWN_WARMUP = ("constant", "cosine_warmup_with_min_lr", "warmup_stable_decay")
SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (
        constant, constant_with_warmup, linear, cosine, cosine_with_restarts, cosine_with_min_lr,
        cosine_warmup_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay,
    )
}  # fmt: skip


def settings_of(name: str) -> type[BaseModel]:
    """A model of what a schedule takes: the keyword arguments of its formula."""
    fields = {
        taken.name: (taken.annotation, ... if taken.default is taken.empty else taken.default)
        for taken in list(inspect.signature(SCHEDULES[name]).parameters.values())[1:]
    }
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model(name, __config__=config, **fields)


def check_settings(name: str, settings: dict) -> None:
    """ValueError if the schedule cannot take them: pydantic's, if it is about a single one."""
    taken = settings_of(name)
    taken.model_validate(settings)
    key = "optim.lr_scheduler_kwargs"
    given = {"min_lr", "min_lr_rate"} & settings.keys()
    if "min_lr" in taken.model_fields and len(given) != 1:
        one = f"min_lr: {settings['min_lr']:g}" if given else "min_lr_rate: 0.1"
        raise ValueError(
            f"{key}: {name} takes min_lr, a learning rate, or min_lr_rate, a share of "
            f"optim.learning_rate, and has {'both' if given else 'neither'}; write {key}={{{one}}}"
        )
