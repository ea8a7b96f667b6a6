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
from typing import Any

import torch
from torch import nn

from gpu.attending import attention_share, documents, which_attention  # noqa: F401  # by name
from gpu.small import ROOT, distance, gradients_of, is_gpu, llama, loss_model, wait
from trainstack.adapter.lora import adapter_of, add_adapter
from trainstack.config.load import load
from trainstack.model import loss
from trainstack.model.loss import DTYPES

SCALE = 1024.0  # of a loss in fp16, so that its gradients do not vanish
REPEATS = 10
COMPILED = "train.torch_compile=true"


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


def recompute(device: str) -> dict[str, Any]:
    """Four micro steps, eager, and compiled with activations recomputed; and their memory."""
    shape = {"hidden": 1024, "num_hidden_layers": 24} if is_gpu(device) else {"hidden": 64}
    rows, length, vocab = (4, 1024, 50257) if is_gpu(device) else (2, 64, 512)
    causal_lm, made, found = llama(vocab, True, device, **shape), {}, {}
    batches = [torch.randint(0, vocab, (2, rows, length), device=device) for _ in range(4)]
    saves = "train.activation_checkpointing=true"
    ways = {"eager": (), "saving": (saves,), "compiled": (saves, COMPILED)}
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


def adapter(device: str) -> dict[str, Any]:
    """LoRA's gradients in bf16, eager and compiled, to those in fp64; its step to all weights'."""
    shape = {"hidden": 1024, "num_hidden_layers": 12} if is_gpu(device) else {"hidden": 128}
    causal_lm = llama(512, True, device, **shape)
    whole, ids = loss_model(causal_lm, "bf16", device), torch.randint(0, 512, (4, 256)).to(device)
    section = load(ROOT / "config.yaml", ["model.init=pretrained", "adapter.type=lora"]).adapter
    add_adapter(causal_lm, section, seed=3)
    with torch.no_grad():
        for _, parameter in adapter_of(causal_lm):  # half of them begin as 0
            parameter.normal_(std=0.05)

    def step(own: nn.Module) -> torch.Tensor:
        return own(ids, ids.roll(-1, 1)) / ids.numel()

    ways = {"fp64": ("fp64",), "bf16": ("bf16",), "compiled": ("bf16", COMPILED)}
    own = {name: loss_model(causal_lm, way[0], device, *way[1:]) for name, way in ways.items()}
    made = {name: gradients_of(m, lambda m=m: step(m))[1] for name, m in own.items()}
    pair = own["bf16"], whole
    times = [seconds_of(lambda m=m: step(m).backward(), device) for m in pair]
    found = {name: distance(made[name], made["fp64"]) for name in ("bf16", "compiled")}
    return {**found, "learned": len(made["fp64"]), "step": times[0] / times[1]}


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
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
