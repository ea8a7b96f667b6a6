"""peft's linear layer with fewer passes over what it gives; loads peft."""

import torch
from peft.tuners.lora import Linear
from torch import nn

from trainstack.checkpoint.snapshot import ADAPTER_NAME


class Layer(Linear):
    """The same in one product where peft multiplies and adds, each a pass over the result.

    Under autocast it does not cast its input to fp32 and back either.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        down, up = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        is_usual = x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type)
        if args or kwargs or self.disable_adapters or self.merged or not is_usual:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        low = nn.functional.linear(self.lora_dropout[ADAPTER_NAME](x), down).flatten(0, -2)
        rows, scale = result.flatten(0, -2), self.scaling[ADAPTER_NAME]
        return torch.addmm(rows, low, up.T, alpha=scale).view(result.shape)


def quicken(causal_lm: nn.Module) -> None:
    """Let peft's linear layers of a model be ours; their tensors and names stay."""
    for module in causal_lm.modules():
        if type(module) is Linear:
            module.__class__ = Layer
