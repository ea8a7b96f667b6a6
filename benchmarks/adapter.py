"""A step of an adapter beside HF Trainer with peft, and beside a step of all weights.

LoRA of rank 8 on all linear layers; one thread, each loop a command of its own, in turn, five and
three rounds. Beside Trainer: a Llama of 13M parameters, 4 samples of 256 tokens; losses have to
agree. Beside all weights: the shape of SmolLM2-135M, 2 samples.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import OURS, Case, Loop, Work, judged, make, run  # noqa: E402

SMALL = Work(hidden=320, layers=8, vocab=8192, seq_len=256, batch=4, micro=4, steps=14, skipped=4)
WIDE = Work(576, 30, vocab=49152, seq_len=256, batch=2, micro=2, steps=8, skipped=3, head=64)
RANK = 8
MOST_OF_ALL, ROUNDS = 0.75, 3


def main() -> int:
    case = Case("LoRA", replace(SMALL, lora=RANK), ("trainer",), 1.0, 1.1, is_memory_compared=True)
    return judged("adapter", [case]) | beside_all_weights()


def beside_all_weights() -> int:
    """The time of a step as a share of that of all weights, and how much memory each takes."""
    times, peaks = [], []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as name:
        adapted = replace(WIDE, lora=RANK)
        make(Path(name), WIDE)
        for _ in range(ROUNDS):
            whole, part = (run(Path(name), work, Loop(OURS)) for work in (WIDE, adapted))
            times.append(part.step_seconds / whole.step_seconds)
            peaks.append(part.peak / whole.peak)
    share = statistics.median(times)
    verdict = "holds" if share <= MOST_OF_ALL else "falls short"
    print(f"adapter: target {MOST_OF_ALL} of the time of all weights, measured {share:.2f}, "
          f"{statistics.median(peaks):.2f} of its memory, {verdict}")  # fmt: skip
    return int(share > MOST_OF_ALL)


if __name__ == "__main__":
    sys.exit(main())
