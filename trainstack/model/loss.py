"""The loss of a causal LM, in chunks, so that its logits are never whole in fp32."""

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.schema import TrainSection
from trainstack.model import trial
from trainstack.model.attention import OURS, THEIRS, apart, check_apart, choose, configs_with, use
from trainstack.model.causal_lm import DIGITS, DTYPES

log = logging.getLogger("trainstack")
# Logits that exist at once: few stay in the cache of a CPU, many keep a GPU busy. Each chunk also
# adds to the gradient of the whole head, so that it has some tokens at least.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
LEAST_TOKENS = 256
# The kernels of a GPU for bf16 and fp16 want rows of whole blocks: a vocabulary of 50,257 is slow.
MULTIPLE = {"cpu": 1, "cuda": 64}


class CausalLMLoss(nn.Module):
    """The sum of the next-token losses of a batch; ``forward`` is what DDP wraps.

    If the model's logits are just its head on its last hidden state, the loss is computed in
    chunks, so that the logits are never whole in fp32. ConfigError if the model cannot learn to
    continue text, or if ``packing`` puts documents into a row and the model mixes them. Parameters
    that a sequence of ``seq_len`` tokens does not reach are frozen.

    Where the configuration asks for the balancing loss of experts, it is in the gradient, not in
    the value: a mean over a batch, times the batch's target tokens. So a step has the mean over its
    batches, weighted by their targets: alike whichever rank has which batch, but not whichever
    samples share a batch, since it is not linear in tokens.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        train: TrainSection,
        device: torch.device,
        packing: str = "concat",
        seq_len: int = trial.TOKENS,
        like: "CausalLMLoss | None" = None,
    ):
        """``like``: of a small copy, whose trials count, for a model that has no values to try."""
        super().__init__()
        self.causal_lm = causal_lm.to(device)
        if train.activation_checkpointing:
            enable_activation_checkpointing(self.causal_lm)
        self.device_type = device.type
        self.autocast_dtype = DTYPES[train.precision]
        self.is_autocast = train.precision in ("bf16", "fp16")
        self.hits: torch.Tensor | None = None  # where to count targets with the largest logit
        self.is_compiled, self.is_fused = train.torch_compile, False  # not in the trials below
        self._body, self._sometimes, self._hidden = [causal_lm], [], []  # lists: no submodules
        self.balancing = trial.balancing_of(causal_lm)
        self._balance = Balance(causal_lm)
        if like is None:
            self._try_out(packing, seq_len)
        else:
            self._take_over(like)
        self.is_fused = self.is_compiled and device.type == "cuda"  # a CPU gains nothing
        if self.is_compiled:
            self._body = [torch.compile(self._body[0])]

    def _try_out(self, packing: str, seq_len: int) -> None:
        causal_lm = self.causal_lm
        with self._trying():
            use(causal_lm, is_packed=packing != "concat")
        with self._trying():
            self.is_chunked = trial.has_plain_head(causal_lm)
        self._choose_body()
        if not self.is_chunked:
            log.info("model: its logits are more than a linear head; the loss keeps them whole")
        if packing == "best_fit":  # with none the rest of a row is padding
            with self._trying():
                check_apart(causal_lm)
        with self._trying():
            trial.check_own_loss(causal_lm, self.balancing)
        self.train()  # from_pretrained leaves a model in eval mode: without dropout
        with trial.trying(causal_lm, is_training=True):
            self._sometimes = trial.freeze_unreached(self, seq_len)

    def _choose_body(self) -> None:
        if self.is_chunked and self.balancing:  # transformers computes it behind the head
            self.causal_lm.base_model.register_forward_hook(self._keep_hidden)
        elif self.is_chunked:
            self._body = [self.causal_lm.base_model]

    def _take_over(self, like: "CausalLMLoss") -> None:
        self.is_chunked = like.is_chunked
        self._choose_body()
        if like.causal_lm.config._attn_implementation == OURS:
            choose(configs_with(self.causal_lm, THEIRS), OURS)
        frozen = {DIGITS.sub("", n) for n, p in like.named_parameters() if not p.requires_grad}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(DIGITS.sub("", name) not in frozen)
        self.train()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        bounds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All int64 [micro_batch_size, seq_len], labels already shifted; returns a scalar.

        A position 0 begins a document, which sees nothing of the documents before it; ``bounds``
        of those as data.packing.document_bounds has them.
        """
        arguments = apart(self.causal_lm, input_ids, position_ids, bounds)
        if self.is_chunked and self.balancing:
            arguments["logits_to_keep"] = 1  # of its own code only the balancing loss is needed
        with self.autocast(), self._balance.without_padding(position_ids):
            output = self._body[0](**arguments, use_cache=False, return_dict=True)
            if not self.is_chunked:
                logits = output.logits.flatten(0, 1)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                count_hits(logits, labels.flatten(), logits.shape[1], self.hits)
                loss = nn.functional.cross_entropy(
                    logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
                )
            else:
                hidden = self._hidden.pop() if self.balancing else output.last_hidden_state
                hidden = hidden.flatten(0, 1)
                compute = self.autocast_dtype if self.is_autocast else hidden.dtype
                weight = self.causal_lm.get_output_embeddings().weight
                weight = weight if torch.is_grad_enabled() else weight.detach()  # costs a third
                targets = labels.flatten()
                loss = ChunkedCrossEntropy.apply(
                    hidden, weight, targets, compute, self.is_fused, self.hits
                )
        if self.balancing and torch.is_grad_enabled():
            targets = (labels != IGNORED_LABEL).sum()
            balance = self.balancing * output.aux_loss * targets
            loss = loss + (balance - balance.detach())
        return WithZeros.apply(loss, *self._sometimes) if self._sometimes else loss

    def count(self, is_wanted: bool) -> None:
        """Whether the targets that get the largest logit are counted from now on, from 0."""
        self.hits = None
        if is_wanted:
            device = next(self.parameters()).device
            self.hits = torch.zeros((), dtype=torch.float64, device=device)

    def _keep_hidden(self, _body: nn.Module, _inputs: tuple, output: Any) -> None:
        self._hidden[:] = [output.last_hidden_state]

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        # Flash attention knows no fp32. autocast keeps the weights that it has cast, so each trial
        # has a context of its own.
        with trial.trying(self.causal_lm), self.autocast():
            yield

    def autocast(self):
        """What a pass in this precision runs within."""
        if not self.is_autocast:  # torch.autocast warns of fp64 even if it is off
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)


class Balance:
    """The balancing loss of a model's experts, over all tokens but those that fill samples up.

    transformers counts tokens by a mask of attention, which a batch here has not: in its place the
    function of the model's module gets one that is for this alone.
    """

    NAME = "load_balancing_loss_func"

    def __init__(self, causal_lm: nn.Module):
        self.module = sys.modules[type(causal_lm).__module__]
        self.own, self.is_text = getattr(self.module, self.NAME, None), None

    def __call__(self, router_logits: Any, num_experts: int, top_k: int, _mask: Any = None) -> Any:
        return self.own(router_logits, num_experts, top_k, self.is_text)

    @contextlib.contextmanager
    def without_padding(self, position_ids: torch.Tensor | None) -> Iterator[None]:
        """Within it, what is a document of one token does not count: nothing is learned of it."""
        if self.own is None or position_ids is None:
            yield
            return
        is_first = position_ids == 0
        is_last = nn.functional.pad(is_first[:, 1:], (0, 1), value=True)
        is_text = ~(is_first & is_last)
        self.is_text = is_text | ~is_text.any()  # of no tokens there is no mean
        with mock.patch.object(self.module, self.NAME, self):
            yield


class WithZeros(torch.autograd.Function):
    """A loss as it is, and a gradient of zero for parameters that this batch may not have reached.

    DDP waits for a gradient of every parameter; so every rank has one, whatever its tokens are.
    """

    @staticmethod
    def forward(ctx, loss, *parameters):
        ctx.parameters = parameters
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss, *(p.new_zeros(()).expand(p.shape) for p in ctx.parameters)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``hidden @ weight.T``, summed, with both gradients made in the forward pass.

    hidden [tokens, hidden_size], weight [vocab_size, hidden_size], labels int64 [tokens]; matrix
    products in ``compute`` dtype, the softmax in fp32 (fp64 for fp64). The gradient of a sum of
    losses with respect to the logits is softmax minus one-hot, so a chunk of logits is needed once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, compute, is_fused, hits=None):
        needs_grad, is_learned = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        losses = fused_losses() if is_fused and needs_grad else losses_of
        accumulate = torch.float64 if compute == torch.float64 else torch.float32
        vocab_size, device = weight.shape[0], hidden.device
        low_weight = weight.to(compute)
        if rest := -vocab_size % MULTIPLE[device.type]:
            low_weight = nn.functional.pad(low_weight, (0, 0, 0, rest))
        loss = torch.zeros((), dtype=accumulate, device=device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        chunk = max(LEAST_TOKENS, CHUNK_LOGITS[device.type] // vocab_size)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            low_hidden = hidden[rows].to(compute)
            # Nothing else holds the logits: they go as soon as they are not needed.
            part, grad = losses(
                count_hits(low_hidden @ low_weight.T, labels[rows], vocab_size, hits),
                labels[rows], vocab_size, needs_grad,
            )  # fmt: skip
            loss += part
            if needs_grad:  # now, while the chunk is there
                grad_hidden[rows] = grad @ low_weight
                if is_learned:  # else a third of the work of the head is spared
                    grad_weight = added(grad_weight, grad.T, low_hidden, weight.dtype)
                del grad  # before the next chunk comes
        ctx.save_for_backward(grad_hidden, grad_weight[:vocab_size] if is_learned else None)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_loss)
        return grad_hidden.mul_(grad_loss), grad_weight, None, None, None, None


def count_hits(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, hits: torch.Tensor | None
) -> torch.Tensor:
    """The logits as they are; ``hits`` grows by the labels that have the largest one.

    logits [tokens, vocab_size or more], labels int64 [tokens]. Not within ``losses_of``: compiled
    with another pass, that could add up in another order.
    """
    if hits is not None:
        hits += (logits.detach()[:, :vocab_size].argmax(1) == labels).sum()
    return logits


def losses_of(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the losses of some tokens, and its gradient, in the dtype of the logits.

    logits [tokens, vocab_size or more], of which only the first are tokens; they are overwritten.
    """
    dtype = logits.dtype
    logits[:, vocab_size:] = -math.inf  # neither probability nor gradient
    is_target = labels != IGNORED_LABEL
    targets = labels.clamp(min=0).unsqueeze(1)
    logs = logits.to(torch.promote_types(dtype, torch.float32))
    del logits
    torch.log_softmax(logs, 1, out=logs)  # each row is read before it is written
    loss = -(logs.gather(1, targets).squeeze(1) * is_target).sum()
    if not needs_grad:
        return loss, None
    grad = logs.exp_()
    grad.scatter_(1, targets, grad.gather(1, targets) - 1)
    return loss, grad.mul_(is_target.unsqueeze(1)).to(dtype)


@functools.cache
def fused_losses() -> Callable:
    """``losses_of`` as one pass over the logits."""
    return torch.compile(losses_of, dynamic=False)


def added(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``total + left @ right`` in ``dtype``, in place; ``total`` None: nothing so far."""
    if left.is_cuda and left.dtype != dtype:  # cuBLAS adds up in fp32, without a pass of its own
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def enable_activation_checkpointing(causal_lm: nn.Module) -> None:
    """Recompute activations in the backward pass; transformers 5.20 renamed the switch.

    Where a model has no switch, its longest list of layers is recomputed layer by layer.
    """
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)
    if not causal_lm.supports_gradient_checkpointing:
        lists = [m for m in causal_lm.modules() if isinstance(m, nn.ModuleList)]
        for layer in max(lists, key=len, default=()):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    elif enable is None:
        arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        causal_lm.gradient_checkpointing_enable(**arguments)
    else:
        enable()
