"""Fused AdamW whose update can be withheld."""

import torch
from torch import nn

from trainstack.config.schema import OptimSection


class AdamW(torch.optim.AdamW):
    """See optimizer.Optimizer for what each method promises."""

    STATES = ("exp_avg", "exp_avg_sq")  # with the weights in fp32: 12 bytes per parameter

    def __init__(self, groups: list[dict], section: OptimSection):
        super().__init__(
            groups,
            lr=section.learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            fused=True,
        )

    def prepare(self, is_bad: torch.Tensor, divisor: torch.Tensor | None) -> None:
        # torch's fused kernels leave weights and state alone if found_inf is not zero, and divide
        # by grad_scale what they read anyway: so torch.amp.GradScaler skips an update and unscales.
        self.found_inf = is_bad
        self.grad_scale = divisor

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate

    def updates_done(self) -> int:
        return max((int(state["step"]) for state in self.state.values()), default=0)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{state}": self.state[parameter][state]
            for name, parameter in model.named_parameters()
            if parameter in self.state
            for state in self.STATES
        }

    def restore(self, model: nn.Module, tensors: dict[str, torch.Tensor], updates: int) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.state[parameter] = {
                    "step": torch.tensor(float(updates), device=parameter.device),
                    **{s: tensors[f"{name}/{s}"].to(parameter.device) for s in self.STATES},
                }
