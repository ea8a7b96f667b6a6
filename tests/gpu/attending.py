"""Attention of ours: which kernels do it, whether they are right, and their share of a step."""

from typing import Any

import torch
from torch import nn

from gpu.small import distance, gradients_of, is_gpu, llama, loss_model, packed_batch, wait
from trainstack.model import attention


def documents(device: str) -> dict[str, Any]:
    """Attention by document against a dense mask: the kernel alone, then a whole model."""
    low, length = (torch.bfloat16, 1024) if is_gpu(device) else (torch.float32, 160)
    *_, bounds = packed_batch(2, length, 9, device)
    found: dict[str, Any] = {}
    for window in (0, length // 5):
        shapes = [(2, heads, length, 64) for heads in (8, 2, 2, 8)]
        *inputs, grad = (torch.randn(shape, device=device, dtype=low) for shape in shapes)
        exact = attended(dense, [t.double() for t in inputs], grad.double(), bounds, window)
        ours, theirs = (attended(way, inputs, grad, bounds, window) for way in (by_document, dense))
        for name, one, other, true in zip(("out", "q", "k", "v"), ours, theirs, exact, strict=True):
            key = f"{name}_window" if window else name
            found[key] = float((one - true).norm() / true.norm())
            found[f"{key}_to_dense"] = found[key] / float((other - true).norm() / true.norm())
    query = torch.zeros(1, 8, 8, 64, device=device, dtype=low)
    found["kernel"] = "varlen_attn" if attention.has_kernel(query, 0) else "documents"
    return found | packed_model(device)


def by_document(query, key, value, bounds, window):
    out, _ = attention.by_document(
        nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, sliding_window=window
    )
    return out.transpose(1, 2)


def dense(query, key, value, bounds, window):
    rows, _, length, _ = query.shape
    mask = attention.dense_mask(bounds, rows, length, window)
    return nn.functional.scaled_dot_product_attention(
        query, *attention.repeated(query, key, value), attn_mask=mask
    )


def attended(way, inputs, grad, bounds, window) -> list[torch.Tensor]:
    """Output and gradients, fp64."""
    own = [tensor.detach().requires_grad_() for tensor in inputs]
    out = way(*own, bounds, window)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, own, grad))]


def packed_model(device: str) -> dict[str, float]:
    """Loss and gradients of packed rows: by document, with transformers' own mask, and in fp64."""
    precision, length = ("bf16", 1024) if is_gpu(device) else ("fp32", 160)
    batch, found = packed_batch(2, length, 512, device), {}
    causal_lm, made = llama(512, True, device), {}
    for name in ("exact", "ours", "masked"):
        own = loss_model(
            causal_lm, "fp64" if name == "exact" else precision, device, packing="best_fit"
        )
        if name != "ours":
            attention.choose([own.causal_lm.config], attention.THEIRS)
        arguments = batch if name == "ours" else batch[:3]
        made[name] = gradients_of(own, lambda o=own, a=arguments: o(*a) / a[1].numel())
    for name in ("ours", "masked"):
        found[f"gradients_{name}"] = distance(made[name][1], made["exact"][1])
        found[f"loss_{name}"] = abs(made[name][0] / made["exact"][0] - 1)
    found["gradients_to_masked"] = found["gradients_ours"] / found["gradients_masked"]
    return found


def which_attention(device: str) -> dict[str, Any]:
    """Operators and kernels of attention in a step, and tensors that are a mask or all scores."""
    length = 1088 if is_gpu(device) else 224
    batch, found = packed_batch(2, length, 512, device), {}
    precision = "bf16" if is_gpu(device) else "fp32"
    for packing in ("concat", "best_fit"):
        values = {}
        for is_compiled in (False, True):
            more = f"train.torch_compile={str(is_compiled).lower()}"
            own = loss_model(
                llama(512, True, device), precision, device, more, packing=packing
            )  # ConfigError if documents see each other
            arguments = batch[:2] if packing == "concat" else batch
            for _ in range(2):
                own(*arguments).backward()
            wait(device)
            with torch.profiler.profile(record_shapes=True) as profile:
                value = own(*arguments)
                value.backward()
                wait(device)
            values[is_compiled] = value.item()
            name = f"{packing}_{'compiled' if is_compiled else 'eager'}"
            found[name] = sorted(attention_in(profile))
            found[f"{name}_square"] = sum(is_square(event, length) for event in profile.events())
        found[f"{packing}_compiled_loss"] = abs(values[True] / values[False] - 1)
    return found


def attention_share(device: str) -> dict[str, float]:
    """Of the time of all kernels of a pass forward and backward, at 1.1B parameters."""
    shape = {"hidden": 2048, "num_hidden_layers": 22, "intermediate_size": 5456}
    causal_lm = llama(32000, True, device, **shape) if is_gpu(device) else llama(512, True, device)
    own = loss_model(causal_lm, "bf16", device)
    batch = torch.randint(0, 512, (2, 2, 2048) if is_gpu(device) else (2, 2, 128), device=device)
    own(*batch).backward()
    with torch.profiler.profile() as profile:
        own(*batch).backward()
        wait(device)
    times = {}
    for event in profile.events():
        if not is_gpu(device):
            spent = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spent = event.self_device_time_total
        else:
            continue
        times[event.name] = times.get(event.name, 0.0) + spent
    share = sum(time for name, time in times.items() if attends(name)) / sum(times.values())
    return {"share": share, "ms": sum(times.values()) / 1e3}


def attention_in(profile: Any) -> set[str]:
    """Names of what attends, shortened: operators as torch calls them, kernels as the GPU does."""
    names = {event.name for event in profile.events()}
    return {name[:70] for name in names if attends(name) and "##" not in name}


def attends(name: str) -> bool:
    signs = ("attention", "attn", "flash", "fmha", "trainstack::", "sdpa")
    return any(sign in name.lower() for sign in signs)


def is_square(event: Any, length: int) -> bool:
    return any(list(shape[-2:]) == [length] * 2 for shape in event.input_shapes or () if shape)
