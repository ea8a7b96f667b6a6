"""Is this update good? Decided on the device, before the optimizer changes anything, on all ranks.

No host waits for the answer: the fused AdamW leaves weights and state alone where ``found_inf`` is
not zero (the flag that torch.amp.GradScaler uses), and the host reads the verdict one step late.
"""

from typing import Any

import torch

from trainstack.config.schema import GuardSection

WINDOW = 128  # steps whose loss and norm tell what is usual (as OLMo-core's SkipStep)
FEWEST = 32  # below that many no spike is called


class Guard:
    """Judges loss and gradient norm of a step; remembers the last good ones for the spike test.

    Its memory is part of the run's state: a run that goes on must judge as one never stopped.
    """

    def __init__(self, section: GuardSection, device: torch.device, is_scaled: bool):
        # With fp16 the GradScaler alone decides: it skips what is not finite.
        self.is_spike_test = section.on_divergence != "stop" and not is_scaled
        self.spike_sigma = section.spike_sigma
        self.recent = torch.zeros((WINDOW, 2), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 where the update must not happen, else 0.0; both scalars are those of all ranks."""
        numbers = torch.stack([loss.to(torch.float64), grad_norm.to(torch.float64)])
        is_bad = ~torch.isfinite(numbers).all()
        if self.is_spike_test and self.spike_sigma is not None:
            is_bad = is_bad | self._is_spike(numbers)
            self._remember(numbers, ~is_bad)
        return is_bad.to(torch.float32)

    def _is_spike(self, numbers: torch.Tensor) -> torch.Tensor:
        known = self.count.clamp(max=WINDOW).to(torch.float64)
        mean = self.recent.sum(0) / known.clamp(min=1)
        is_used = (torch.arange(WINDOW, device=self.recent.device) < known).unsqueeze(1)
        squares = ((self.recent - mean) ** 2 * is_used).sum(0) / (known - 1).clamp(min=1)
        is_far = (numbers - mean > self.spike_sigma * squares.sqrt()).any()
        return is_far & (self.count >= FEWEST)

    def _remember(self, numbers: torch.Tensor, is_good: torch.Tensor) -> None:
        here = torch.arange(WINDOW, device=self.recent.device) == self.count % WINDOW
        self.recent = torch.where((here & is_good).unsqueeze(1), numbers, self.recent)
        self.count = self.count + is_good.to(torch.int64)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; floats that JSON brings back to the last bit."""
        return {"count": int(self.count), "recent": self.recent.tolist()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Put back what ``state`` gave; None, of an older checkpoint, begins anew."""
        if state:
            self.count.fill_(state["count"])
            self.recent.copy_(torch.tensor(state["recent"], dtype=torch.float64))


def withhold(optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> None:
    """Make the optimizer's next step do nothing where ``is_bad`` is 1.0."""
    optimizer.found_inf = is_bad
    optimizer.grad_scale = None


class Diverged(Exception):
    """Loss or gradient norm is not finite, or a spike; that update did not happen."""

    def __init__(self, step: int, text: str, is_rollback: bool = False):
        super().__init__(text)
        self.step, self.is_rollback = step, is_rollback
