"""Measurements within one process: ``python -m gpu.measure NAME DEVICE ...`` prints JSON.

Each compares code of ours with the same in full precision, or says what it does. On a CPU the same
code is tried with small tensors.
"""

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.load import load
from trainstack.data.packing import document_bounds
from trainstack.model import attention, loss
from trainstack.model.loss import DTYPES, CausalLMLoss

ROOT = Path(__file__).resolve().parent.parent.parent
SCALE = 1024.0  # of a loss in fp16, so that its gradients do not vanish
REPEATS = 10


def is_gpu(device: str) -> bool:
    return device == "cuda"


def wait(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], Any], device: str) -> float:
    """The mean of several, after two."""
    for _ in range(2):
        action()
    wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        action()
    wait(device)
    return (time.perf_counter() - started) / REPEATS


def card(device: str) -> dict[str, Any]:
    """What the card does at most: products, copies, to the host, and how fast memory is pinned."""
    edge, size = (8192, 4 << 30) if is_gpu(device) else (256, 1 << 22)
    a, b = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_gpu(device))
    started = time.perf_counter()
    torch.empty(2 * size, dtype=torch.uint8, pin_memory=is_gpu(device))
    pinned = time.perf_counter() - started
    return {
        "tflops": 2 * edge**3 / seconds_of(lambda: a @ b, device) / 1e12,
        "copy_tb_s": 2 * size / seconds_of(lambda: target.copy_(source), device) / 1e12,
        "to_host_gb_s": size / seconds_of(lambda: host.copy_(source), device) / 1e9,
        "pinning_gb_s": 2 * size / pinned / 1e9,
        "cudnn": torch.backends.cudnn.version() if is_gpu(device) else None,
    }


def llama(vocab: int, is_tied: bool, device: str, **shape: int) -> nn.Module:
    hidden = shape.pop("hidden", 256 if is_gpu(device) else 64)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=max(2, hidden // 64), num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=4096, tie_word_embeddings=is_tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.update(shape)
    return LlamaForCausalLM(config).float()


def loss_model(causal_lm: nn.Module, precision: str, device: str, *more: str, packing="concat"):
    section = load(ROOT / "config.yaml", [f"train.precision={precision}", *more]).train
    own = copy.deepcopy(causal_lm)
    own = own.double() if precision == "fp64" else own
    return CausalLMLoss(own, section, torch.device(device), packing)


def gradients_of(
    model: nn.Module, step: Callable[[], torch.Tensor], scale: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients in fp64, on the host."""
    model.zero_grad()
    value = step()
    (value * scale).backward()
    found = {n.removeprefix("causal_lm."): p.grad for n, p in model.named_parameters()}
    return value.item(), {n: (g.double() / scale).cpu() for n, g in found.items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of ``other``."""
    difference = sum((one[n] - g).square().sum() for n, g in other.items())
    return float((difference / sum(g.square().sum() for g in other.values())).sqrt())


def gradients(device: str) -> dict[str, Any]:
    """Of the loss model in each precision against fp64; of plain transformers beside it."""
    rows, length = (4, 512) if is_gpu(device) else (4, 256)
    worst: dict[str, float] = {}
    for vocab in (49152, 50257) if is_gpu(device) else (1152, 1153):
        ids = torch.randint(0, vocab, (rows, length), device=device)
        labels = torch.randint(0, vocab, (rows, length), device=device)
        for is_tied in (True, False):
            causal_lm = llama(vocab, is_tied, device)
            for name, value in errors(causal_lm, ids, labels, device).items():
                worst[name] = max(worst.get(name, 0.0), value)
    return worst


def errors(
    causal_lm: nn.Module, ids: torch.Tensor, labels: torch.Tensor, device: str
) -> dict[str, float]:
    """Of gradients, to those of transformers in fp64; ``_to_plain``: over its own errors."""
    found, tokens = {}, labels.numel()

    def plain(dtype: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(causal_lm).to(device)
        model = model.double() if dtype == torch.float64 else model
        is_on = dtype in (torch.bfloat16, torch.float16)

        def step() -> torch.Tensor:
            with torch.autocast(device, dtype) if is_on else contextlib.nullcontext():
                return model(ids, labels=ids, shift_labels=labels, use_cache=False).loss

        return gradients_of(model, step, scale)[1]

    exact = plain(torch.float64)
    for precision in ("fp64", "fp32", "bf16", "fp16"):
        scale, own = SCALE if precision == "fp16" else 1.0, loss_model(causal_lm, precision, device)
        _, ours = gradients_of(own, lambda own=own: own(ids, labels) / tokens, scale)
        found[precision] = distance(ours, exact)
        if precision != "fp64":
            theirs = distance(plain(DTYPES[precision], scale), exact)
            found[f"{precision}_to_plain"] = found[precision] / theirs
        if precision == "bf16":
            found["chunks"] = distance(ours, in_chunks(own, ids, labels, device))
    return found


def in_chunks(own: nn.Module, ids: torch.Tensor, labels: torch.Tensor, device: str) -> dict:
    """The gradients if the logits are made in many small chunks."""
    usual = loss.CHUNK_LOGITS[device]
    loss.CHUNK_LOGITS[device] = 1 << (24 if is_gpu(device) else 18)
    _, found = gradients_of(own, lambda: own(ids, labels) / labels.numel())
    loss.CHUNK_LOGITS[device] = usual
    return found


def packed_batch(rows: int, length: int, vocab: int, device: str) -> tuple[torch.Tensor, ...]:
    """Rows of documents of odd lengths, their ends filled up: ids, labels, positions, bounds."""
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(0, vocab, (rows, length), generator=generator) for _ in range(2))
    positions = torch.empty(rows, length, dtype=torch.long)
    for row in positions:
        at = 0
        while at < length:
            size = int(torch.randint(1, length // 3, (), generator=generator))
            row[at : at + size] = torch.arange(size)[: length - at]
            at += size
    positions[:, -5:], labels[:, -5:] = 0, IGNORED_LABEL
    bounds = document_bounds(positions.numpy(), labels.numpy(), rows * 40)
    return tuple(t.to(device) for t in (ids, labels, positions, torch.from_numpy(bounds)))


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
    found["kernel"] = "varlen_attn" if attention.has_kernel(query) else "documents"
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


def attention_in(profile: Any) -> set[str]:
    """Names of what attends, shortened: operators as torch calls them, kernels as the GPU does."""
    signs = ("attention", "attn", "flash", "fmha", "trainstack::")
    names = {event.name for event in profile.events()}
    return {n[:70] for n in names if any(sign in n.lower() for sign in signs) and "##" not in n}


def is_square(event: Any, length: int) -> bool:
    return any(list(shape[-2:]) == [length] * 2 for shape in event.input_shapes or () if shape)


def recompute(device: str) -> dict[str, Any]:
    """Four micro steps, eager, and compiled with activations recomputed; and their memory."""
    shape = {"hidden": 1024, "num_hidden_layers": 24} if is_gpu(device) else {"hidden": 64}
    rows, length, vocab = (4, 1024, 50257) if is_gpu(device) else (2, 64, 512)
    causal_lm, made, found = llama(vocab, True, device, **shape), {}, {}
    batches = [torch.randint(0, vocab, (2, rows, length), device=device) for _ in range(4)]
    saves = "train.activation_checkpointing=true"
    ways = {"eager": (), "saving": (saves,), "compiled": (saves, "train.torch_compile=true")}
    for name, more in ways.items():
        own = loss_model(causal_lm, "bf16", device, *more)

        def step(own=own):
            parts = (own(*batch) / batch[0].numel() / 4 for batch in batches)
            return sum(backward_but_last(parts))

        made[name] = gradients_of(own, step)[1]
        if name != "compiled":
            found[f"kept_gb_{name}"] = kept_bytes(own, batches[0]) / 1e9
        if is_gpu(device):
            found[f"peak_gb_{name}"] = torch.cuda.max_memory_allocated() / 1e9
            del own, step
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    found["gradients"] = distance(made["compiled"], made["eager"])
    found["kept"] = found["kept_gb_saving"] / found["kept_gb_eager"]
    return found


def backward_but_last(parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each loss; all but the last have gone backward, and count as numbers."""
    for number, part in enumerate(parts, start=1):
        if number < 4:
            part.backward()
        yield part if number == 4 else part.detach()


def kept_bytes(own: nn.Module, batch: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    sizes = {}
    weights = {p.untyped_storage().data_ptr() for p in own.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        own(*batch).backward()
    return sum(sizes.values())


def leave(device: str, how: str, gigabytes: str) -> dict[str, Any]:
    """Fill the card, queue a second of work, say so, and leave, or wait to be killed."""
    size = int(float(gigabytes) * 1e9)
    kept = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    wait(device)
    if is_gpu(device):
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
    print("ready", kept.numel(), flush=True)
    if how == "exit":
        os._exit(0)
    time.sleep(600)
    return {}


if __name__ == "__main__":
    known = {f.__name__: f for f in (card, gradients, documents, which_attention, recompute, leave)}
    print(json.dumps(known[sys.argv[1]](*sys.argv[2:])))
