"""peft's linear layer with fewer and faster passes over what it gives; loads peft."""

import torch
from peft.tuners.lora import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainstack.checkpoint.snapshot import ADAPTER_NAME


class Layer(Linear):
    """The same with its products added in place, and without a cast of its input under autocast."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        base, dropout = self.base_layer, self.lora_dropout[ADAPTER_NAME]
        down, up = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        device = x.device.type
        is_cast = torch.is_autocast_enabled(device)
        is_usual = type(base) in (nn.Linear, Conv1D) and (is_cast or x.dtype == down.dtype)
        if args or kwargs or self.disable_adapters or self.merged or not is_usual:
            return super().forward(x, *args, **kwargs)
        weight = base.weight.T if type(base) is Conv1D else base.weight
        dtype = torch.get_autocast_dtype(device) if is_cast else x.dtype
        x, weight, down, up = (tensor.to(dtype) for tensor in (x, weight, down, up))
        bias = None if base.bias is None else base.bias.to(dtype)
        dropped = None if isinstance(dropout, nn.Identity) else dropout(x)
        scale = self.scaling[ADAPTER_NAME]
        return AdaptedLinear.apply(x, weight, bias, dropped, down, up, scale)


class AdaptedLinear(torch.autograd.Function):
    """x weight^T + bias + scale * dropped down^T up^T, of a frozen weight; all of one type.

    x and dropped (..., in), weight (out, in), down (r, in), up (out, r); dropped: None for x. Each
    product has its long side last in memory: on a processor, those that autograd would make of the
    small matrices take four times as long.
    """

    @staticmethod
    def forward(context, x, weight, bias, dropped, down, up, scale):
        result = nn.functional.linear(x, weight, bias)
        given = (x if dropped is None else dropped).flatten(0, -2)
        low = down @ given.T  # (r, rows)
        result.flatten(0, -2).addmm_(low.T, up.T, alpha=scale)
        context.save_for_backward(weight, given, down, up, low)
        context.scale, context.is_dropped = scale, dropped is not None
        return result

    @staticmethod
    def backward(context, gradient):
        weight, given, down, up, low = context.saved_tensors
        rows, shape = gradient.flatten(0, -2), (*gradient.shape[:-1], weight.shape[1])
        of_low = (up.T.contiguous() @ rows.T).mul_(context.scale)  # (r, rows)
        of_up = (low @ rows).mul_(context.scale).T
        of_x = of_dropped = None
        if context.needs_input_grad[0]:  # else it comes from what is frozen
            of_x = rows @ weight
            if context.is_dropped:
                of_dropped = (of_low.T @ down).view(shape)
            else:
                of_x.addmm_(of_low.T, down)
            of_x = of_x.view(shape)
        return of_x, None, None, of_dropped, of_low @ given, of_up, None


def quicken(causal_lm: nn.Module) -> None:
    """Let peft's linear layers of a model be ours; their tensors and names stay."""
    for module in causal_lm.modules():
        if type(module) is Linear:
            module.__class__ = Layer
