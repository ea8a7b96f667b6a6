"""peft's linear layer with fewer and faster passes over what it gives; loads peft."""

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
        result, scale = self.base_layer(x), self.scaling[ADAPTER_NAME]
        given = self.lora_dropout[ADAPTER_NAME](x).to(result.dtype)
        return AddLowRank.apply(result, given, down.to(result.dtype), up.to(result.dtype), scale)


class AddLowRank(torch.autograd.Function):
    """result + scale * x down^T up^T; all of one type.

    result (..., out), x (..., in), down (r, in), up (out, r). Each product has its long side last
    in memory: on a processor those that autograd would make take four times as long.
    """

    @staticmethod
    def forward(context, result, x, down, up, scale):
        low = down @ x.flatten(0, -2).T  # (r, rows)
        context.save_for_backward(x, down, up, low)
        context.scale = scale
        added = torch.addmm(result.flatten(0, -2), low.T, up.T, alpha=scale)
        return added.view(result.shape)

    @staticmethod
    def backward(context, gradient):
        x, down, up, low = context.saved_tensors
        rows = gradient.flatten(0, -2)
        of_up = (low @ rows).mul_(context.scale).T
        of_low = (up.T.contiguous() @ rows.T).mul_(context.scale)  # (r, rows)
        of_x = (of_low.T @ down).view(x.shape) if context.needs_input_grad[1] else None
        return gradient, of_x, of_low @ x.flatten(0, -2), of_up, None


def quicken(causal_lm: nn.Module) -> None:
    """Let peft's linear layers of a model be ours; their tensors and names stay."""
    for module in causal_lm.modules():
        if type(module) is Linear:
            module.__class__ = Layer
