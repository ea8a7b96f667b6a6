"""From the command to the end of the first step, beside a bare script, HF Trainer and accelerate.

Ours is ``bash submit.sh --local`` with all its checks; the others are started by torchrun. One
process and two, warm caches: imports, the model, the data, the process group, a step. A tiny Llama,
so that the step itself is nothing.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import COMMAND, Case, Work, judged  # noqa: E402

ONE = Work(hidden=64, layers=2, vocab=512, seq_len=32, batch=4, micro=2, steps=3, skipped=1,
           is_torchrun=True)  # fmt: skip


def main() -> int:
    cases = [
        Case(
            name,
            work,
            ("trainer", "accelerate"),
            1 / 1.1,
            1 / 1.1,
            what="first_seconds",
            ours=COMMAND,
        )
        for name, work in (("one process", ONE), ("two processes", replace(ONE, world_size=2)))
    ]
    return judged("startup", cases)


if __name__ == "__main__":
    sys.exit(main())
