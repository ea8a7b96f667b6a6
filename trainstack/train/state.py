"""What the loop works with, and what a checkpoint remembers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trainstack.checkpoint.saver import Saver
from trainstack.config.batch import BatchPlan
from trainstack.config.schema import Config
from trainstack.data import order
from trainstack.data.corpus import Corpus
from trainstack.distributed import World
from trainstack.resilience.faults import Faults
from trainstack.resilience.guard import Guard
from trainstack.resilience.stop import Stop
from trainstack.resilience.watchdog import Watch
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, Owner


@dataclass
class Parts:
    """What the loop works with; built once, in the order of train.py's main."""

    config: Config
    world: World
    plan: BatchPlan
    run: RunFolder
    lease: Lease
    owner: Owner
    max_steps: int
    corpus: Corpus
    causal_lm: torch.nn.Module
    ddp: torch.nn.parallel.DistributedDataParallel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    guard: Guard
    sampler: order.StepSampler
    saver: Saver
    small_files: dict[str, bytes]
    stop: Stop
    watch: "Watch"
    faults: Faults


@dataclass
class Resumed:
    """Where a run goes on: step 0 and no checkpoint where it begins."""

    step: int = 0
    checkpoint: Path | None = None
    is_evaluated: bool = True  # whether the evaluation due at this step was made
    skips_in_a_row: int = 0
    drawn: list[int] | None = None  # sequences of each data set of a mixture
