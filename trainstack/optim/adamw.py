"""Fused AdamW whose update can be withheld."""

from collections.abc import Iterator

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
        self._lists: list[tuple] | None = None  # what an update takes; made by the first one

    @torch.no_grad()
    def step(self) -> None:
        # torch's own looks each time for state, devices and dtypes of each parameter, which takes
        # as long as the update of a small model. Its kernel is this one.
        self.allocate()
        for group, parameters, averages, squares, step in self._lists:
            step += 1
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                parameters, [p.grad for p in parameters], averages, squares, [],
                [step] * len(parameters), lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False, grad_scale=self.grad_scale, found_inf=self.found_inf,
            )  # fmt: skip
            step -= self.found_inf

    def allocate(self) -> None:
        self._lists = self._lists or list(self._gathered())

    def _gathered(self) -> Iterator[tuple]:
        """The parameters of each group and dtype with their state, and one count for them all."""
        for group in self.param_groups:
            for dtype in {p.dtype: None for p in group["params"]}:
                own = [p for p in group["params"] if p.dtype == dtype]
                step = self.state[own[0]].get("step", torch.zeros((), device=own[0].device))
                for parameter in own:
                    state = self.state[parameter]
                    state["step"] = step
                    for name in self.STATES:
                        if name not in state:
                            state[name] = torch.zeros_like(parameter)
                states = ([self.state[p][name] for p in own] for name in self.STATES)
                yield group, own, *states, step

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
        self._lists = None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.state[parameter] = {
                    "step": torch.tensor(float(updates), device=parameter.device),
                    **{s: tensors[f"{name}/{s}"].to(parameter.device) for s in self.STATES},
                }
