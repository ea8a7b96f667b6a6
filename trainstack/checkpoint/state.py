"""TrainState: what a checkpoint remembers beside tensors; the only one who knows state.json."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainstack.errors import Refused

STATE = "training/state.json"  # within a checkpoint


@dataclass
class TrainState:
    """Where a run is. The loop carries it along; a save writes it, a resume reads it.

    Only what step and configuration do not tell is really needed; the rest is there for people.
    """

    step: int  # updates that were due so far, from 0
    updates: int  # that the optimizer made: fewer than steps if some were skipped
    samples_seen: int  # over all ranks
    tokens_seen: int
    is_evaluated: bool  # False: a stop came before the evaluation that was due at this step
    skips_in_a_row: int  # bad updates up to this step
    drawn: list[int] | None  # sequences of each data set of a mixture so far; None: one data set
    left_out: list[dict[str, int]]  # windows of data that rollbacks left out, see run/folder.py
    identity: dict[str, Any]  # what may not change when the run is resumed
    settings: dict[str, dict]  # all of config.yaml, to tell what changed
    scaler: dict[str, Any]  # of fp16; empty otherwise
    guard: dict[str, Any]  # the losses and norms by which a spike is judged
    world_size: int
    torch: str  # its version
    undecayed: bool = False  # norms and other vectors in the shape of a matrix; once they decayed
    loss_sum: float = 0.0  # of the steps since the last log line
    loss_steps: int = 0  # how many they are
    best_step: int = 0  # of the lowest held-out loss; 0: none was finite yet
    best_loss: float | None = None
    evaluations_without_better: int = 0  # in a row, up to this step

    @classmethod
    def at_start(
        cls,
        identity: dict[str, Any],
        settings: dict[str, dict],
        left_out: list[dict[str, int]],
        data_sets: int,
    ) -> "TrainState":
        """Before the first step of a run."""
        return cls(
            step=0, updates=0, samples_seen=0, tokens_seen=0, is_evaluated=True, skips_in_a_row=0,
            drawn=[0] * data_sets if data_sets > 1 else None, left_out=left_out, identity=identity,
            settings=settings, scaler={}, guard={}, world_size=0, torch="", undecayed=True,
        )  # fmt: skip

    def add_loss(self, loss: float) -> None:
        """Count the loss of a step. One that is not finite has no mean with others."""
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_steps += 1

    def take_mean_loss(self) -> float:
        """Mean loss of the steps since this was called last; NaN if none was finite."""
        mean = self.loss_sum / self.loss_steps if self.loss_steps else math.nan
        self.loss_sum, self.loss_steps = 0.0, 0
        return mean

    def take_in(self, loss: float) -> bool:
        """Remember the held-out loss of this step; whether it is the lowest so far.

        One that is equal to an earlier one is not, nor is a NaN.
        """
        is_best = loss < (math.inf if self.best_loss is None else self.best_loss)
        if is_best:
            self.best_step, self.best_loss = self.step, loss
        self.evaluations_without_better = 0 if is_best else self.evaluations_without_better + 1
        return is_best

    def to_json(self) -> bytes:
        """The content of state.json; floats come back to the last bit."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, origin: str) -> "TrainState":
        """Read ``to_json``; ``origin`` names the file in messages.

        ValueError if it is not JSON. Refused if another version wrote it: nothing is guessed.
        """
        values = json.loads(content)
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        odd = ", ".join(sorted((needed - values.keys()) | (values.keys() - known)))
        if odd:
            raise Refused(
                f"{origin} was written by another version (it differs in {odd}); resume this run "
                "with the version that began it (its environment.json names the commit), or choose "
                "another run.name"
            )
        return cls(**values)


def read_state(checkpoint: Path) -> TrainState:
    """The state of a checkpoint. OSError, ValueError or Refused if it cannot be read."""
    path = checkpoint / STATE
    return TrainState.from_json(path.read_bytes(), str(path))
