"""What a micro step of a model costs: its operations and its memory, found without either.

The model runs forwards and backwards with tensors that have shapes and no values (torch's
FakeTensorMode), as a run would: same attention, same loss, same precision. Each operation that
torch would call is counted, and each tensor for as long as it would exist.
"""

import contextlib
import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainstack.config.schema import Config
from trainstack.errors import ConfigError, first_words
from trainstack.model import loss as loss_file
from trainstack.model.causal_lm import build_causal_lm, count_parameters, read_config
from trainstack.model.loss import CausalLMLoss
from trainstack.model.rehearsal import changed, loss_of, small_copy
from trainstack.plan.estimate import Cost

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")
# Of these an operation reads a few rows, not the whole.
ROWS = (aten.embedding, aten.index, aten.gather, aten.index_select)


def cost_of(folder: Path, config: Config, is_gpu: bool, keeps_gradients: bool) -> Cost:
    """Of the model in ``folder``, as it would be trained; ConfigError if its code needs values.

    ``keeps_gradients``: they are there already, as with DDP or from the micro step before.
    """
    real = read_config(folder)
    if config.model.attn_implementation == "flash_attention_2":  # costs what ours does
        config = changed(config, "model", "attn_implementation", "auto")
    try:
        loss_model = loss_without_values(folder, real, config)
        rows, seq_len = config.train.micro_batch_size, config.data.seq_len
        chunk = {"cpu": loss_file.CHUNK_LOGITS["cuda" if is_gpu else "cpu"]}
        with mock.patch.dict(loss_file.CHUNK_LOGITS, chunk):
            tracer = traced(loss_model, rows, seq_len, config.data.packing, keeps_gradients)
            flops = flops_per_token(loss_model, seq_len)
    except ConfigError:
        raise
    except Exception as error:  # of a model's code that wants values, or is new to torch's fakes
        raise ConfigError(
            f"model {config.model.name}: what a step takes cannot be found without values "
            f"({first_words(error)}); run some: train.max_steps=20"
        ) from None
    learned = sum(p.numel() for p in loss_model.parameters() if p.requires_grad)
    logits, copies = tracer.peak["logits"], 2 * learned * loss_model.is_autocast
    return Cost(
        count_parameters(loss_model), learned, flops,
        [(*each, count) for each, count in tracer.ops.items()], sum(tracer.peak.values()),
        logits, logits * loss_model.is_chunked + copies, keeps_gradients,
    )  # fmt: skip


def loss_without_values(folder: Path, real: Any, config: Config) -> CausalLMLoss:
    """The loss of the whole model on torch's device meta; a small copy was tried in its place."""
    small, reason = small_copy(real)
    if small is None:
        raise ValueError(f"of small copies {reason}")
    train = config.train.model_copy(update={"torch_compile": False})
    with torch.device(META):
        arguments = (config.model, train.precision, config.run.seed, config.adapter)
        causal_lm = build_causal_lm(folder, "scratch", *arguments)
    return CausalLMLoss(causal_lm, train, META, like=loss_of(small, config))


def traced(
    loss_model: CausalLMLoss, rows: int, seq_len: int, packing: str, keeps_gradients: bool
) -> "Tracer":
    """What one micro step does; the model's own tensors are not touched."""
    embedding = tuple(loss_model.causal_lm.get_input_embeddings().weight.shape)
    with stand_ins(loss_model) as (tensors, device):
        batch = plain_batch(rows, seq_len, packing, embedding[0], device)
        if keeps_gradients:
            for tensor in tensors.values():
                tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None
        with Tracer(embedding) as tracer:
            functional_call(Pass(loss_model), tensors, batch)
    return tracer


def plain_batch(
    rows: int, seq_len: int, packing: str, vocabulary: int, device: torch.device = CPU
) -> tuple[torch.Tensor, ...]:
    """What CausalLMLoss takes: each row is one document."""
    tokens = torch.arange(rows * seq_len, device=device).remainder(vocabulary).view(rows, seq_len)
    if packing == "concat":
        return tokens, tokens
    bounds = seq_len * torch.arange(rows + 1, dtype=torch.int32, device=device)
    return tokens, tokens, torch.arange(seq_len, device=device).repeat(rows, 1), bounds


class Pass(nn.Module):
    """Forward and backward, as one call: activation checkpointing needs the weights in both."""

    def __init__(self, loss_model: CausalLMLoss):
        super().__init__()
        self.loss_model = loss_model

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        loss = self.loss_model(*batch)
        if torch.is_grad_enabled():
            loss.backward()
        return loss


def flops_per_token(loss_model: CausalLMLoss, seq_len: int) -> float:
    """Of training, as the FLOPs of MFU are counted: three times those of the forward pass.

    Two times beside an adapter, since weights that stay need no gradient.
    Attention counts whole, and nothing that is computed again (Chowdhery et al., PaLM, 2022,
    appendix B). Of a model of any device; takes no memory, and about a second.
    """
    embedding = tuple(loss_model.causal_lm.get_input_embeddings().weight.shape)
    with stand_ins(loss_model) as (tensors, device), torch.no_grad():
        tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
        with Tracer(embedding) as tracer:
            functional_call(Pass(loss_model), tensors, (tokens, tokens))
    passes = 2 if hasattr(loss_model.causal_lm, "peft_config") else 3
    return passes * sum(flops * count for (flops, _), count in tracer.ops.items()) / seq_len


@contextlib.contextmanager
def stand_ins(loss_model: CausalLMLoss) -> Iterator[tuple[dict[str, torch.Tensor], torch.device]]:
    """Tensors in place of a model's own, tied ones once, without values; and their device."""
    before = next(loss_model.parameters()).device
    device = CPU if before == META else before
    whole = Pass(loss_model)
    named = [*whole.named_parameters(), *whole.named_buffers()]
    loss_model.device_type = device.type
    try:
        with FakeTensorMode(), torch.compiler.set_stance("force_eager"):
            made = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in named}
            yield {n: made[n].requires_grad_(t.requires_grad) for n, t in named}, device
    finally:
        loss_model.device_type = before.type


class Tracer(TorchDispatchMode):
    """Counts operations, by their FLOPs and bytes, and the bytes that exist, by what they are."""

    def __init__(self, embedding: tuple[int, int]):
        """``embedding``: vocabulary and channels, by which logits are known."""
        super().__init__()
        self.embedding = embedding
        self.ops: Counter[tuple[int, int]] = Counter()
        self.peak = {"logits": 0, "other": 0}
        self._live, self._known = dict(self.peak), {}

    def __enter__(self) -> "Tracer":
        gc.collect()
        gc.disable()  # what waits for it would be in the peak by chance
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        gc.enable()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = tensors_in((args, kwargs))
        for tensor in read:
            self._known.setdefault(tensor.untyped_storage()._cdata, 0)  # it was there before
        run = without_values if func is aten._grouped_mm.default else func
        out = run(*args, **kwargs)
        made = tensors_in(out)
        is_new = [self._enter(tensor) for tensor in made]
        if func.namespace != "prim":  # a question about a tensor
            is_view = not any(is_new) and not func._schema.is_mutable
            count = flop_counter.flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count else 0
            self.ops[flops, 0 if is_view else bytes_of(func, read, made)] += 1
        return out

    def _enter(self, tensor: torch.Tensor) -> bool:
        """Count what a tensor holds until nobody has it; False if it was there before."""
        storage = tensor.untyped_storage()
        key, size, shape = storage._cdata, storage.nbytes(), tuple(tensor.shape)
        if key in self._known:
            return False
        vocab, channels = self.embedding
        is_logits = vocab in shape and shape not in ((vocab, channels), (channels, vocab), (vocab,))
        what = "logits" if is_logits else "other"
        self._known[key] = size
        self._live[what] += size
        if sum(self._live.values()) > sum(self.peak.values()):
            self.peak = dict(self._live)
        weakref.finalize(storage, self._leave, key, what)
        return True

    def _leave(self, key: int, what: str) -> None:
        self._live[what] -= self._known.pop(key)


def without_values(rows: torch.Tensor, experts: torch.Tensor, ends=None, *_, **__) -> torch.Tensor:
    """What _grouped_mm makes; torch 2.13 knows that of bf16 alone, and computes it for all."""
    sizes = [*rows.shape[-2:-1], experts.shape[-1]]
    is_grouped = rows.dim() == experts.dim()
    return rows.new_empty([len(ends) if rows.dim() == 2 else len(rows), *sizes][not is_grouped :])


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def bytes_of(func: Any, read: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """That an operation reads and writes."""
    written = sum(map(in_memory, made))
    if func._overloadpacket in ROWS:
        return 2 * written
    return written + sum(map(in_memory, read))


def in_memory(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; what is repeated without a copy counts once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


@flop_counter.register_flop_formula(
    [aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.trainstack.documents]
)
def _(query, key, value, *_, out_shape=None, **__) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


@flop_counter.register_flop_formula(
    [
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        torch.ops.trainstack.documents_backward,
    ]
)
def _(grad, query, key, value, *_, out_shape=None, **__) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


@flop_counter.register_flop_formula(aten._grouped_mm)
def _(rows, experts, *_, out_shape=None, **__) -> int:
    """[tokens, channels] by [experts, channels, outputs], or what its gradients are made of."""
    return 2 * math.prod(rows) * experts[-1]
