"""AdamW with decay groups, and the learning rate as a function of the step."""

import torch
from torch import nn

from trainstack.config.schema import OptimSection

STATES = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state as ``<parameter name>/<state name>``; empty before the first step."""
    return {
        f"{name}/{state}": optimizer.state[parameter][state]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for state in STATES
    }


def updates_done(optimizer: torch.optim.AdamW) -> int:
    """Optimizer updates so far: fewer than steps where fp16 skipped some."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor], updates: int
) -> None:
    """Put saved state back after ``updates`` optimizer updates; rates and betas stay the config's.

    Raises KeyError where a parameter's state is missing.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                **{s: tensors[f"{name}/{s}"].to(parameter.device) for s in STATES},
            }
