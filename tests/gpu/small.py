"""Small models and batches, and how far apart their gradients are."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.load import load
from trainstack.data.packing import document_bounds
from trainstack.model.loss import CausalLMLoss

ROOT = Path(__file__).resolve().parent.parent.parent


def is_gpu(device: str) -> bool:
    return device == "cuda"


def wait(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize()


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
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n.removeprefix("causal_lm."): p.grad for n, p in learned.items()}
    return value.item(), {n: (g.double() / scale).cpu() for n, g in found.items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of ``other``."""
    difference = sum((one[n] - g).square().sum() for n, g in other.items())
    return float((difference / sum(g.square().sum() for g in other.values())).sqrt())


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
