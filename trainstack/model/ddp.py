"""How the model is spread over ranks: whole on each of them."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainstack.config.batch import BatchPlan
from trainstack.distributed import World
from trainstack.model.loss import CausalLMLoss

Batch = tuple[torch.Tensor, ...]  # inputs, labels, positions: int64 [micro_batch_size, seq_len]


def wrap_ddp(loss_model: CausalLMLoss, world: World) -> DistributedDataParallel:
    """DDP over all ranks, with rank 0's weights. Collective: every rank must call this."""
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )
    return DistributedDataParallel(
        loss_model,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # saves one copy of the gradients
        **{sync_buffers: False},  # causal LMs have none that training changes
    )


def compute_gradients(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
    plan: BatchPlan,
    target_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward passes of one step: this rank's sum of losses, the global gradient norm.

    The only place that knows of micro steps. The loss is divided by the global number of target
    tokens; DDP averages gradients over ranks, hence the factor world_size. Both results stay on the
    device. Collective: every rank must call this.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for micro_step, batch in enumerate(batches, start=1):
        is_last = micro_step == plan.gradient_accumulation_steps
        with contextlib.nullcontext() if is_last else model.no_sync():
            loss = model(*batch)
            scaler.scale(loss * (plan.world_size / target_tokens)).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    return loss_sum, nn.utils.get_total_norm([p.grad for p in _with_gradients(model)])


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    grad_norm: torch.Tensor,
    max_grad_norm: float | None,
) -> None:
    """Clip the gradients to ``max_grad_norm``, let the optimizer use them, and drop them."""
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(_with_gradients(model), max_grad_norm, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def warm_up(model: DistributedDataParallel, batches: Iterator[Batch]) -> None:
    """One forward and backward pass whose gradients are thrown away. Collective.

    DDP regroups its buckets after its first backward pass, and with three or more ranks the order
    of summation depends on the grouping. Done before the first step of every life, a resumed run
    sums as one that was never stopped. It also compiles, and finds out whether memory suffices.
    """
    model(*next(batches)).backward()
    model.zero_grad(set_to_none=True)
