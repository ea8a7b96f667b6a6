"""Documents that share a sample and do not see each other."""

import contextlib

import torch
from torch import nn

from trainstack.errors import ConfigError


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
def check_apart(causal_lm: nn.Module, device: torch.device) -> None:
    """ConfigError if this model lets a document see another one of its sample.

    Tried on eight tokens: another first document must not change the logits of the second. In full
    precision but for flash attention, which knows none: the rounding of experts would change them.
    """
    vocab_size = causal_lm.get_input_embeddings().num_embeddings
    tokens = torch.arange(16, device=device).remainder(vocab_size).view(2, 8)
    changed = tokens.clone()
    changed[:, :4] = tokens[:, :4].flip(1)
    positions = torch.arange(4, device=device).repeat(2, 2)
    is_flash = causal_lm.config._attn_implementation.startswith("flash")
    was_training = causal_lm.training
    causal_lm.eval()
    with contextlib.nullcontext() if is_flash else torch.autocast(device.type, enabled=False):
        outputs = [
            causal_lm(**apart(causal_lm, inputs, positions), use_cache=False)
            for inputs in (tokens, changed)
        ]
    causal_lm.train(was_training)
    before, after = (output.logits.view(2, 8, -1)[:, 4:] for output in outputs)
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigError(
            f"{type(causal_lm).__name__} lets documents of one sequence see each other; "
            "write data.packing=none or concat, or choose another model"
        )
