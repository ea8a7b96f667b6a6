"""DDP: the whole model on every rank, gradients averaged."""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainstack.adapter.lora import saved_parameters
from trainstack.checkpoint.load import read_optimizer
from trainstack.checkpoint.snapshot import Share, replicated_share
from trainstack.checkpoint.state import TrainState
from trainstack.config.batch import BatchPlan
from trainstack.config.schema import OptimSection
from trainstack.data.feed import Batch
from trainstack.distributed import World
from trainstack.model.causal_lm import saved_weights
from trainstack.model.loss import CausalLMLoss
from trainstack.model.strategy import Strategy
from trainstack.optim.optimizer import build_optimizer


class DataParallel(Strategy):
    """Every rank has all weights and all of the optimizer; see Strategy for the methods."""

    def __init__(
        self,
        loss_model: CausalLMLoss,
        optim: OptimSection,
        precision: str,
        plan: BatchPlan,
        world: World,
    ):
        """Rank 0's weights become those of all ranks. Collective."""
        self.causal_lm, self.loss_model = loss_model.causal_lm, loss_model
        self.plan, self.world = plan, world
        # One rank has nothing to average, and DDP costs as much time as a small model.
        self.ddp = wrap(loss_model, world) if world.world_size > 1 else loss_model
        self.parameters = [p for p in self.causal_lm.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.causal_lm, optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

    def warm_up(self, batches: Iterable[Batch]) -> None:
        # DDP regroups its buckets after its first backward pass, and with three or more ranks the
        # order of summation depends on the grouping. Done before the first step of every attempt, a
        # resumed run sums as one that was never stopped. It also compiles, and finds out whether
        # memory suffices.
        self.optimizer.allocate()
        self.ddp(*next(iter(batches))).backward()
        self._zero()

    def gradients(
        self,
        batches: Iterable[Batch],
        target_tokens: int,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        # DDP averages over ranks, the loss is a sum over all of them: hence the factor world_size.
        scale = self.plan.world_size / target_tokens
        for micro_step, batch in enumerate(batches, start=1):
            is_last = micro_step == self.plan.gradient_accumulation_steps
            # Only the last micro step communicates: the gradients of the others are just added up.
            is_sent = is_last or self.world.world_size == 1
            with contextlib.nullcontext() if is_sent else self.ddp.no_sync():
                loss = self.ddp(*batch)
                if is_last:
                    before_waiting()
                self.scaler.scale(loss * scale).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        return loss_sum, total_norm([p.grad for p in self.parameters])

    def update(
        self, is_bad: torch.Tensor, grad_norm: torch.Tensor, max_grad_norm: float | None
    ) -> None:
        divisor = None  # that clips
        if max_grad_norm is not None:
            divisor = (grad_norm / max_grad_norm).clamp(min=1)
            # The update divides, in fp32, unless the scaler has taken that place for itself.
            if self.scaler.is_enabled() or divisor.dtype != torch.float32:
                torch._foreach_div_([p.grad for p in self.parameters], divisor)
                divisor = None
        self.optimizer.prepare(is_bad, divisor)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self._zero()

    def share(self) -> Share:
        world = self.world  # of some models, what is saved is a copy, in another form
        weights = saved_weights(self.causal_lm) if world.is_main else {}
        size = sum(weight.nbytes for weight in saved_parameters(self.causal_lm))
        optimizer = self.optimizer.tensors(self.causal_lm)
        return replicated_share(weights, size, optimizer, world.rank, world.world_size)

    def load(self, checkpoint: Path, state: TrainState) -> None:
        self.optimizer.restore(self.causal_lm, read_optimizer(checkpoint), state.updates)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)

    def _zero(self) -> None:
        # DDP's buckets hold the gradients, if nobody takes them away: else it copies them there.
        if self.world.world_size > 1:
            torch._foreach_zero_([p.grad for p in self.parameters])
        else:
            for parameter in self.parameters:
                parameter.grad = None


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all of them; nn.utils.get_total_norm, without its look at each one's device."""
    if len({gradient.dtype for gradient in gradients}) > 1:
        return nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def wrap(loss_model: CausalLMLoss, world: World) -> DistributedDataParallel:
    """DDP over all ranks, with rank 0's weights. Collective: every rank must call this."""
    size = sum(p.nbytes for p in loss_model.parameters() if p.requires_grad) / 2**20
    # A compiled model is cut where a bucket ends: few graphs, and still some to overlap.
    bucket = min(max(25, size / 6), 500) if loss_model.is_compiled else None
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )
    return DistributedDataParallel(
        loss_model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        bucket_cap_mb=bucket,
        gradient_as_bucket_view=True,  # saves one copy of the gradients
        **{sync_buffers: False},  # causal LMs have none that training changes
    )
