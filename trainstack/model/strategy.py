"""Strategy: how the model is spread over the ranks, and what the loop asks of that."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from trainstack.checkpoint.snapshot import Share
from trainstack.checkpoint.state import TrainState
from trainstack.data.feed import Batch
from trainstack.model.loss import CausalLMLoss
from trainstack.optim.optimizer import Optimizer


class Strategy(ABC):
    """The model, its optimizer, and what the loop asks of them.

    Every rank has to call each method at the same point: any of them may be collective. Another
    strategy (a sharded one) is another file beside ddp.py, chosen in train.py's build_strategy.
    doc/extending.md lists places that count on whole weights on each rank.
    """

    causal_lm: nn.Module  # of transformers; generates text
    loss_model: CausalLMLoss  # what an evaluation calls
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # of fp16; does nothing otherwise

    @abstractmethod
    def warm_up(self, batches: Iterable[Batch]) -> None:
        """Whatever only the first backward pass does; changes neither weights nor gradients."""

    @abstractmethod
    def gradients(
        self,
        batches: Iterable[Batch],
        target_tokens: int,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward passes of one step, one micro step for each batch.

        ``target_tokens``: of the step over all ranks, by which the loss is divided.
        ``before_waiting``: called once, before this rank first waits for others. Returns this
        rank's sum of losses (float64) and the gradient norm over all ranks: scalars on the device.
        """

    @abstractmethod
    def update(
        self, is_bad: torch.Tensor, grad_norm: torch.Tensor, max_grad_norm: float | None
    ) -> None:
        """Clip the gradients to ``max_grad_norm`` (None: never), update the weights, drop both.

        Weights and optimizer stay as they are if ``is_bad``, a scalar on the device, is 1.0.
        """

    @abstractmethod
    def share(self) -> Share:
        """The tensors of a checkpoint that this rank writes."""

    @abstractmethod
    def load(self, checkpoint: Path, state: TrainState) -> None:
        """Put the optimizer's state back; the model has its weights already."""
