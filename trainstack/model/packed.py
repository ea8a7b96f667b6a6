"""Documents that share a sample and do not see each other."""

import contextlib

import torch
from torch import nn

from trainstack.errors import ConfigError
from trainstack.model.trial import logits_of, some_tokens


def apart(
    causal_lm: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The model's arguments that keep documents apart.

    transformers 5 makes the mask block-diagonal from positions alone, if it gets neither a mask nor
    a cache; its flash attention does so only for a batch of one row (5.23, _is_packed_sequence).
    """
    if position_ids is None:
        return {"input_ids": input_ids}
    if causal_lm.config._attn_implementation.startswith("flash"):
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
    return {"input_ids": input_ids, "position_ids": position_ids}


@torch.no_grad()
def check_apart(causal_lm: nn.Module) -> None:
    """ConfigError if this model, in eval mode, lets a document see another one of its sample.

    Tried on eight tokens: another first document must not change the logits of the second. In full
    precision but for flash attention, which knows none: the rounding of experts would change them.
    """
    tokens = some_tokens(causal_lm, 16).view(2, 8)
    changed = tokens.clone()
    changed[:, :4] = tokens[:, :4].flip(1)
    positions = torch.arange(4, device=tokens.device).repeat(2, 2)
    is_flash = causal_lm.config._attn_implementation.startswith("flash")
    device = tokens.device.type
    with contextlib.nullcontext() if is_flash else torch.autocast(device, enabled=False):
        before, after = (
            logits_of(causal_lm, **apart(causal_lm, inputs, positions)).view(2, 8, -1)[:, 4:]
            for inputs in (tokens, changed)
        )
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigError(
            f"{type(causal_lm).__name__} lets documents of one sequence see each other; "
            "write data.packing=none or concat, or choose another model"
        )
