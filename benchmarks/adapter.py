"""LoRA beside HF Trainer with peft, beside a bare loop with peft, and beside our own full training.

The adapter has rank 16 in all linear layers. Beside peers: the small Llama of step.py, on the same
samples from the same weights; losses have to agree. Beside full training: a model of the shape of
SmolLM2-135M, two samples of 256 tokens; an adapter's step may take 0.75 of the time, its memory has
to be less.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import OURS, Case, Loop, Work, judged, make, run  # noqa: E402

SMALL = Work(
    hidden=192, layers=4, vocab=8192, seq_len=256, batch=4, micro=4, steps=14, skipped=4,
    adapter_rank=16,
)  # fmt: skip
SMOL = Work(
    hidden=576, layers=30, vocab=49152, seq_len=256, batch=2, micro=2, steps=7, skipped=3, head=64
)
ROUNDS, MOST_OF_FULL = 3, 0.75


def main() -> int:
    code = judged("adapter", [Case("small", SMALL, ("trainer",), 1.0, 1.1)])
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as folder:
        home, pairs = Path(folder), []
        make(home, SMOL)
        for _ in range(ROUNDS):
            whole, small = (
                run(home, replace(SMOL, adapter_rank=rank), Loop(OURS)) for rank in (0, 16)
            )
            pairs.append((small.step_seconds / whole.step_seconds, small.peak / whole.peak))
            print(f"135M parameters: full {whole.step_seconds:.2f} s a step, {whole.peak:.2f} GB; "
                  f"LoRA {small.step_seconds:.2f} s, {small.peak:.2f} GB", flush=True)  # fmt: skip
    seconds, memory = (statistics.median(values) for values in zip(*pairs, strict=True))
    is_met = seconds <= MOST_OF_FULL and memory < 1
    print(f"adapter: target {MOST_OF_FULL} of the step of full training, less memory, measured "
          f"{seconds:.2f}, {memory:.2f}, {'holds' if is_met else 'falls short'}")  # fmt: skip
    return 0 if code == 0 and is_met else 1


if __name__ == "__main__":
    sys.exit(main())
