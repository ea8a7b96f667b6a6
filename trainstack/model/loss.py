"""The loss of a causal LM, in chunks, so that its logits are never whole in fp32."""

import contextlib
import logging

import torch
from torch import nn

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.schema import TrainSection
from trainstack.model.packed import apart, check_apart

log = logging.getLogger("trainstack")
CHUNK_LOGITS = 1 << 24  # logits that exist at once in fp32: 64 MiB
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class CausalLMLoss(nn.Module):
    """The sum of the next-token losses of a batch; ``forward`` is what DDP wraps.

    If the model's logits are just its head on its last hidden state, which is checked on a few
    tokens, the loss is computed in chunks, so that the logits are never whole in fp32. ConfigError
    if ``packing`` keeps documents apart and the model does not.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        train: TrainSection,
        device: torch.device,
        packing: str = "concat",
    ):
        super().__init__()
        self.causal_lm = causal_lm.to(device)
        if train.activation_checkpointing:
            enable_activation_checkpointing(self.causal_lm)
        self.device_type = device.type
        self.autocast_dtype = DTYPES[train.precision]
        self.is_autocast = train.precision in ("bf16", "fp16")
        with self._autocast():  # flash attention knows no fp32
            self.is_chunked = has_plain_head(self.causal_lm, device)
            if packing != "concat":
                check_apart(self.causal_lm, device)
        body = self.causal_lm.base_model if self.is_chunked else self.causal_lm
        self._body = [torch.compile(body) if train.torch_compile else body]  # no second submodule

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All int64 [micro_batch_size, seq_len], labels already shifted; returns a scalar.

        A position 0 begins a document, which sees nothing of the documents before it.
        """
        arguments = apart(self.causal_lm, input_ids, position_ids)
        with self._autocast():
            output = self._body[0](**arguments, use_cache=False)
            if not self.is_chunked:
                logits = output.logits.flatten(0, 1)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                return nn.functional.cross_entropy(
                    logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
                )
            hidden = output.last_hidden_state.flatten(0, 1)
            compute = self.autocast_dtype if self.is_autocast else hidden.dtype
            weight = self.causal_lm.get_output_embeddings().weight
            return ChunkedCrossEntropy.apply(hidden, weight, labels.flatten(), compute)

    def _autocast(self):
        if not self.is_autocast:  # torch.autocast warns of fp64 even if it is off
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``hidden @ weight.T``, summed, with both gradients made in the forward pass.

    hidden [tokens, hidden_size], weight [vocab_size, hidden_size], labels int64 [tokens]; matrix
    products in ``compute`` dtype, the softmax in fp32 (fp64 for fp64). The gradient of a sum of
    losses with respect to the logits is softmax minus one-hot, so a chunk of logits is needed once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, compute):
        needs_grad = any(ctx.needs_input_grad)
        accumulate = torch.float64 if compute == torch.float64 else torch.float32
        low_weight = weight.to(compute)
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            low_hidden = hidden[rows].to(compute)
            logits = (low_hidden @ low_weight.T).to(accumulate)
            is_target = labels[rows] != IGNORED_LABEL
            targets = labels[rows].clamp(min=0).unsqueeze(1)
            norm = logits.logsumexp(1, keepdim=True)
            loss += ((norm - logits.gather(1, targets)).squeeze(1) * is_target).sum()
            if needs_grad:  # now, while the chunk is there
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
                grad = grad.mul_(is_target.unsqueeze(1)).to(compute)
                grad_hidden[rows] = grad @ low_weight
                grad_weight += grad.T @ low_hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None


@torch.no_grad()
def has_plain_head(causal_lm: nn.Module, device: torch.device) -> bool:
    """Whether the logits are the output embedding applied to the last hidden state, no more.

    Some models scale or cap their logits or add a bias; the chunked loss would be wrong there.
    """
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        tokens = torch.arange(8, device=device).remainder(head.out_features).unsqueeze(0)
        logits = causal_lm(input_ids=tokens, use_cache=False).logits
        body = causal_lm.base_model(input_ids=tokens, use_cache=False)
        hidden = getattr(body, "last_hidden_state", None)
        is_plain = hidden is not None and torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-3)
    finally:
        causal_lm.train(was_training)
    if not is_plain:
        log.info("model: its logits are more than a linear head; the loss keeps them whole")
    return is_plain


def enable_activation_checkpointing(causal_lm: nn.Module) -> None:
    """Recompute activations in the backward pass; transformers 5.20 renamed the switch."""
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)
    if enable is None:
        arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        causal_lm.gradient_checkpointing_enable(**arguments)
    else:
        enable()
