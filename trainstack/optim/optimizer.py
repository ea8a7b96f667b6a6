"""What every optimizer of ours can do beyond torch's, and which ones there are."""

from typing import Protocol

import torch
from torch import nn

from trainstack.config.schema import OptimSection
from trainstack.optim.adamw import AdamW


class Optimizer(Protocol):
    """A torch.optim.Optimizer that can withhold an update, clip, and tell what a checkpoint needs.

    tests/optim holds all of this for every entry of OPTIMIZERS.
    """

    def prepare(self, is_bad: torch.Tensor, divisor: torch.Tensor | None) -> None:
        """Let the next step() change neither weights nor state if the scalar ``is_bad`` is 1.0.

        Else it divides the gradients by the scalar ``divisor``, if there is one. Decided on the
        device: no host waits for the values (resilience/guard.py judges). With fp16 the GradScaler
        puts its own two in their place.
        """

    def allocate(self) -> None:
        """Make the state that the first update needs, if it is not there."""

    def set_learning_rate(self, learning_rate: float) -> None: ...

    def updates_done(self) -> int:
        """Updates that happened so far: fewer than steps if some were skipped."""

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Its state as ``<parameter name>/<state name>``; empty before ``allocate``."""

    def restore(self, model: nn.Module, tensors: dict[str, torch.Tensor], updates: int) -> None:
        """Put ``tensors`` back after so many updates; rates and betas stay the configuration's.

        KeyError if the state of a parameter is missing.
        """


OPTIMIZERS = {"adamw": AdamW}  # what a second one needs beside this: doc/extending.md


def build_optimizer(model: nn.Module, section: OptimSection, name: str = "adamw") -> Optimizer:
    """The optimizer of that name; matrices decay, vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {id(p) for p in parameters if p.dim() >= 2} - {*map(id, undecayed_matrices(model))}
    decay = section.weight_decay
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]], section)


def undecayed_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What is a vector in the shape of a matrix, a norm per head, or marked so by its model."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    found = {id(p) for module in norms for p in module.parameters(recurse=False)}

    def is_vector(p: nn.Parameter) -> bool:
        is_long = p.dim() > 2 and p.squeeze().dim() < 2
        return id(p) in found or is_long or getattr(p, "_no_weight_decay", False)

    return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2 and is_vector(p)]
