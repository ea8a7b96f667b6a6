"""Is this update good? Decided on the device, before the optimizer changes anything, on all ranks.

No host waits for the answer: the optimizer withholds the update by a flag on the device (see
optim/optimizer.py), and the host reads the verdict one step late. Policy then decides what follows.
"""

import math
from typing import Any

import torch

from trainstack.config.schema import GuardSection

WINDOW = 128  # steps whose loss and norm tell what is usual (as OLMo-core's SkipStep)
FEWEST = 32  # below that many no spike is called
MOST_OVERFLOWS = 20  # of fp16 in a row: each halves the scale, 65,536 at first, so it is below 1


class Guard:
    """Judges loss and gradient norm of a step; remembers the last good ones for the spike test.

    Its memory is part of the run's state: a resumed run must judge as one never stopped.
    """

    def __init__(self, section: GuardSection, device: torch.device, is_scaled: bool):
        # With fp16 the GradScaler alone skips what is not finite: in step() its flag replaces ours.
        self.is_spike_test = section.on_divergence != "stop" and not is_scaled
        self.spike_sigma = section.spike_sigma
        self.recent = torch.zeros((WINDOW, 2), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 if the update must not happen, else 0.0; scalars that all ranks have alike."""
        total = loss + grad_norm  # neither can take away what is odd of the other
        is_bad = (total - total) != 0  # that of infinity is no number
        if self.is_spike_test and self.spike_sigma is not None:
            numbers = torch.stack([loss.to(torch.float64), grad_norm.to(torch.float64)])
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

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave; an empty one is that of a new run."""
        if state:
            self.count.fill_(state["count"])
            self.recent.copy_(torch.tensor(state["recent"], dtype=torch.float64))


class Diverged(Exception):
    """Loss or gradient norm is not finite, or a spike; that update did not happen."""

    def __init__(self, step: int, text: str, is_rollback: bool = False):
        super().__init__(text)
        self.step, self.is_rollback = step, is_rollback


class Policy:
    """What follows an update that was withheld: skip it, roll back, or stop (on_divergence)."""

    def __init__(self, section: GuardSection, learning_rate: float, is_scaled: bool):
        self.section, self.learning_rate, self.is_scaled = section, learning_rate, is_scaled

    def skips_after(
        self, step: int, loss: float, grad_norm: float, is_withheld: bool, skips_in_a_row: int
    ) -> int:
        """Bad updates in a row up to this step; Diverged if the run cannot continue like this.

        ``skips_in_a_row``: before this step. All ranks have the same numbers and decide the same.
        """
        if not is_withheld:
            return 0
        text, action = describe_bad(step, loss, grad_norm), self.section.on_divergence
        # fp16 whose scale is too large: the scaler skips the update and lowers the scale.
        if self.is_scaled and math.isfinite(loss):
            if skips_in_a_row + 1 < MOST_OVERFLOWS:
                return skips_in_a_row + 1
            text += f"; fp16 overflowed in {MOST_OVERFLOWS} steps in a row, at each lower scale"
        if action == "rollback":
            raise Diverged(step, text, is_rollback=True)
        if action == "skip" and skips_in_a_row < self.section.max_skips:
            return skips_in_a_row + 1
        if action == "skip":
            text += f"; {self.section.max_skips} updates in a row were skipped before"
        advice = f"lower optim.learning_rate (now {self.learning_rate:g}), or look at the data"
        if self.is_scaled:
            advice = f"fp16 overflows beyond 65,504: set train.precision=bf16 or fp32, {advice}"
        raise Diverged(step, f"{text}; {advice}")


def describe_bad(step: int, loss: float, grad_norm: float) -> str:
    numbers = {f"loss {loss:.4g}": loss, f"gradient norm {grad_norm:.4g}": grad_norm}
    bad = [text for text, number in numbers.items() if not math.isfinite(number)]
    if not bad:
        return f"step {step}: a spike of {', '.join(numbers)}"
    others = f" ({', '.join(numbers.keys() - bad)})" if len(bad) < len(numbers) else ""
    return f"step {step}: not finite: {', '.join(bad)}{others}"
