"""Attention without masks: of plain rows, and of documents in a row that do not see each other.

transformers makes a mask [B, 1, S, S] for packed rows, and whenever it is compiled; kernels then
compute all of it, with the keys of each head apart. Under a name for which it knows no mask, the
function of that name gets the rows as they are (transformers.AttentionInterface), and the bounds of
documents by the arguments that its flash attention takes too.
"""

import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainstack.data.packing import document_bounds
from trainstack.errors import ConfigError, first_words
from trainstack.model.trial import in_full_precision, logits_of, some_tokens

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

log = logging.getLogger("trainstack")
OURS, THEIRS = "by_document", "sdpa"  # names of attention in transformers
MASKS = "model: attention has masks, which are slower"
# In the code of a model that does otherwise for the name sdpa.
ASKS_WHICH = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b).*sdpa")
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings of what a token sees
HALF = (torch.bfloat16, torch.float16)  # what the kernel for documents of a GPU knows
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **more,
) -> tuple[torch.Tensor, None]:
    """Causal attention, as transformers calls it, within the documents that the bounds tell.

    query [B, heads, S, head_size], key and value with as many heads or a part of them; returns
    [B, S, heads, head_size]. ``cu_seq_lens_q``: see document_bounds; without them a row is one.
    ``sliding_window``: how many tokens a token sees, itself included.
    """
    device, (rows, _, length, size) = query.device.type, query.shape
    window = sliding_window if sliding_window and sliding_window < length else 0
    is_whole = cu_seq_lens_q is None and (not window or key.shape[2] != length)
    if is_whole or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("attention with more than a mask")
    bounds = cu_seq_lens_q
    if bounds is None:
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    if torch.is_autocast_enabled(device):  # which does not know these kernels
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    scale, channels = size**-0.5 if scaling is None else scaling, value.shape[-1]
    if channels < size:  # of latent attention; the kernels have one size
        value = nn.functional.pad(value, (0, size - channels))
    if device == "cpu" and not dropout and channels <= size:
        out, _ = on_cpu(query, key, value, bounds, scale, window)
    elif has_kernel(query, window) and not dropout and channels <= size:
        out = on_gpu(query, key, value, bounds, scale, window)
    else:
        mask = dense_mask(bounds, rows, length, window)
        key, value = repeated(query, key, value)  # else torch computes all scores, and keeps them
        out = scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return out[..., :channels].transpose(1, 2).contiguous(), None


AttentionInterface.register(OURS, by_document)


def dense_mask(bounds: torch.Tensor, rows: int, length: int, window: int) -> torch.Tensor:
    """bool [B, 1, S, S]: for what no kernel knows documents, as fp32 on a GPU, or dropout."""
    tokens = torch.arange(rows * length, dtype=bounds.dtype, device=bounds.device)
    document = torch.bucketize(tokens, bounds, right=True).view(rows, 1, length)
    mask = (document.transpose(1, 2) == document).tril()
    return (mask.triu(1 - window) if window else mask).unsqueeze(1)


def has_kernel(query: torch.Tensor, window: int) -> bool:
    """Whether torch's kernel for rows of documents takes such queries, by its own conditions."""
    is_able = varlen_attn is not None and query.dtype in HALF and query.device.type == "cuda"
    size = query.shape[-1]
    return (
        is_able
        and (not window or "window_size" in inspect.signature(varlen_attn).parameters)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and size <= 256
        and size % 8 == 0
    )


def repeated(query: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys or values with as many heads as queries."""
    return [tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in tensors]


def on_gpu(query, key, value, bounds, scale, window) -> torch.Tensor:
    """Documents by the kernel of torch, whose arguments differ from 2.10 to 2.13."""
    known, (rows, _, length, size) = inspect.signature(varlen_attn).parameters, query.shape
    more = {"window_size": (window - 1 if window else -1, 0)}
    if "window_size" not in known:
        more = {"is_causal": True}
    if "scale" in known:
        more["scale"] = scale
    else:
        query = query * (scale * size**0.5)
    if "enable_gqa" in known:
        more["enable_gqa"] = True
    else:
        key, value = repeated(query, key, value)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    out = varlen_attn(*flat, bounds, bounds, length, length, **more)
    return out.unflatten(0, (rows, length)).transpose(1, 2)


@torch.library.custom_op("trainstack::documents", mutates_args=(), device_types="cpu")
def on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor,
    scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One document after the other; one node of the graph, so that it also compiles as one.

    Returns the output, as query, and the logarithms of the sums of its exponentials.
    """
    out, sums = outputs_like(query)
    for part in parts(bounds, query.shape[2]):
        own = [tensor[part] for tensor in (query, key, value)]
        mask = band(own[0], window)
        out[part], sums[part] = flash(*own, 0.0, mask is None, attn_mask=mask, scale=scale)
    return out, sums


@on_cpu.register_fake
def _(query, key, value, bounds, scale, window):
    return outputs_like(query)


@torch.library.custom_op("trainstack::documents_backward", mutates_args=(), device_types="cpu")
def on_cpu_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for part in parts(bounds, query.shape[2]):
        own = [tensor[part] for tensor in (grad, query, key, value, out, sums)]
        mask = band(own[1], window)
        made = flash_backward(*own, 0.0, mask is None, attn_mask=mask, scale=scale)
        for whole, of_part in zip(grads, made, strict=True):
            whole[part] = of_part
    return tuple(grads)


@on_cpu_backward.register_fake
def _(grad, query, key, value, out, sums, bounds, scale, window):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _keep(ctx, inputs, output):
    *tensors, bounds, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output, bounds)


def _backward(ctx, grad, _):
    grads = on_cpu_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None


on_cpu.register_autograd(_backward, setup_context=_keep)


def outputs_like(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the output, [B, heads, S, head_size] in memory as [B, S, heads, head_size]."""
    rows, heads, length, size = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((rows, length, heads, size)).transpose(1, 2)
    return out, query.new_empty((rows, heads, length), dtype=exact)


def parts(bounds: torch.Tensor, length: int) -> list[tuple]:
    """An index into [B, heads, S, ...] for each document; none for those of no tokens."""
    stops = bounds.tolist()
    return [
        (slice(first // length, first // length + 1), slice(None),
         slice(first % length, first % length + last - first))
        for first, last in zip(stops, stops[1:], strict=False)
        if last > first
    ]  # fmt: skip


def band(query: torch.Tensor, window: int) -> torch.Tensor | None:
    """What is added to the scores of a document that is longer than the window; else None."""
    length = query.shape[2]
    if not window or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    return query.new_zeros(length, length).masked_fill_(~seen, -torch.inf)


def apart(
    causal_lm: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    bounds: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | int]:
    """The model's arguments that keep documents apart; ``bounds`` are found if they are not given.

    Where it has no use for bounds, transformers 5 makes a mask from positions, if it gets neither a
    mask nor a cache. Flash attention takes all rows as one.
    """
    if position_ids is None:
        return {"input_ids": input_ids}
    arguments, kind = {}, causal_lm.config._attn_implementation
    if kind == OURS or kind.startswith("flash"):
        length = input_ids.shape[1]
        if bounds is None:
            found = document_bounds(position_ids.cpu().numpy())
            bounds = torch.from_numpy(found).to(input_ids.device)
        arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        arguments |= {"max_length_q": length, "max_length_k": length}
    if kind.startswith("flash"):
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
    return {"input_ids": input_ids, "position_ids": position_ids, **arguments}


@torch.no_grad()
def use(causal_lm: nn.Module, is_packed: bool) -> None:
    """Let a model attend without masks where that gives what transformers gives; said if not.

    Tried on a few tokens, with documents if rows have some.
    """
    configs = configs_with(causal_lm, THEIRS)
    if causal_lm.config not in configs:
        return
    tokens, *packed = packed_tokens(causal_lm)
    packed, reason = packed if is_packed else (None, None), ""
    source = inspect.getsource(sys.modules[type(causal_lm).__module__])
    if not causal_lm._can_set_attn_implementation() or ASKS_WHICH.search(source):
        reason = "its code does not let it be chosen"
    if not reason:
        reason = difference(causal_lm, configs, [tokens, *packed])
    if reason:
        choose(configs, THEIRS)
        log.info("%s (%s)", MASKS, reason)


def configs_with(causal_lm: nn.Module, attention: str) -> list[Any]:
    """The configurations of a model's parts that have this attention."""
    configs = [getattr(module, "config", None) for module in causal_lm.modules()]
    return [c for c in configs if getattr(c, "_attn_implementation", None) == attention]


def difference(causal_lm: nn.Module, configs: list[Any], batch: list) -> str:
    """What our attention gives that theirs does not; empty if they give the same. Ours is left."""
    try:
        with narrow_windows(causal_lm), in_full_precision(causal_lm):
            theirs = logits_of(causal_lm, **apart(causal_lm, *batch))
            choose(configs, OURS)
            ours = logits_of(causal_lm, **apart(causal_lm, *batch))
    except Exception as error:  # whatever its code raises
        return f"its code fails without: {first_words(error)}"
    is_same = (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    return "" if is_same else "it masks more than documents and windows, or is not told of them"


def choose(configs: list[Any], attention: str) -> None:
    """The attention of a model's parts; only of those that are asked for, unlike transformers'."""
    for config in configs:
        config._attn_implementation_internal = attention


@contextlib.contextmanager
def narrow_windows(causal_lm: nn.Module) -> Iterator[None]:
    """Within it a window ends within a few tokens, wherever a model keeps its size."""
    kept = []
    try:
        for place in (causal_lm.config.get_text_config(), *causal_lm.modules()):
            for name in WINDOWS:
                value = getattr(place, name, None)
                if isinstance(value, int):
                    kept.append((place, name, value))
                    setattr(place, name, 2)
        yield
    finally:
        for place, name, value in kept:  # not as mock does: some names stand for others
            setattr(place, name, value)


def packed_tokens(causal_lm: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows of two documents of four tokens: ids, positions and bounds."""
    tokens = some_tokens(causal_lm, 16).view(2, 8)
    positions = torch.arange(4, device=tokens.device).repeat(2, 2)
    return tokens, positions, 4 * torch.arange(5, dtype=torch.int32, device=tokens.device)


@torch.no_grad()
def check_apart(causal_lm: nn.Module) -> None:
    """ConfigError if this model, in eval mode, lets a document see another one of its sample.

    Tried on eight tokens: another first document must not change the logits of the second. In full
    precision but for flash attention, which knows none: the rounding of experts would change them.
    """
    tokens, *packed = packed_tokens(causal_lm)
    changed = tokens.clone()
    changed[:, :4] = tokens[:, :4].flip(1)
    is_flash = causal_lm.config._attn_implementation.startswith("flash")
    with contextlib.nullcontext() if is_flash else in_full_precision(causal_lm):
        before, after = (
            logits_of(causal_lm, **apart(causal_lm, inputs, *packed)).view(2, 8, -1)[:, 4:]
            for inputs in (tokens, changed)
        )
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigError(
            f"{type(causal_lm).__name__} lets documents of one sequence see each other; "
            "write data.packing=none or concat, or choose another model"
        )
