"""A step of two processes over gloo, beside plain DDP and HF Trainer.

A Llama of 3M parameters, 8 samples of 256 tokens a step, in one micro step and in four, one thread
each. The floor is DDP as it is, with no_sync where gradients are accumulated.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import Case, Work, judged  # noqa: E402

ONCE = Work(hidden=192, layers=4, vocab=8192, seq_len=256, batch=8, micro=4, steps=14, skipped=4,
            world_size=2)  # fmt: skip
OFTEN = Work(hidden=192, layers=4, vocab=8192, seq_len=256, batch=8, micro=1, steps=14, skipped=4,
             world_size=2)  # fmt: skip


def main() -> int:
    cases = [
        Case("one micro step", ONCE, ("trainer",), least_floor=1.1, least_peers=1.1),
        Case("four micro steps", OFTEN, ("trainer",), least_floor=1.1, least_peers=1.1),
    ]
    return judged("two_ranks", cases)


if __name__ == "__main__":
    sys.exit(main())
