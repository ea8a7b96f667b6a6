"""A step beside the same step of HF Trainer, accelerate and Lightning, and beside the floor.

The floor is a bare loop: tensors that are there, forward, backward, fused AdamW; no data, no log,
no clip, no checkpoint, nothing that notices a fault. Each loop is a command of its own, one thread,
in turn, five rounds; peers at their best, of which the best counts, and the tiny one at their
default too. Losses have to agree. Tiny: 2 layers of 64 channels, 4 samples of 32 tokens, where what
a loop adds weighs most. Small: a Llama of 3M parameters, 4 samples of 256 tokens; eager and
compiled, in bf16 too if the processor has it.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import Case, Work, judged  # noqa: E402

TINY = Work(hidden=64, layers=2, vocab=512, seq_len=32, batch=4, micro=4, steps=400, skipped=50)
SMALL = Work(hidden=192, layers=4, vocab=8192, seq_len=256, batch=4, micro=4, steps=14, skipped=4)
PEERS = ("trainer", "accelerate", "lightning")


def main() -> int:
    cases = [
        Case("tiny", TINY, PEERS, least_floor=1 / 1.05, least_peers=1.4, has_defaults=True),
        Case("small", SMALL, PEERS, least_floor=1.0, least_peers=1.0, is_memory_compared=True),
        Case("small, compiled", SMALL, ("trainer",), 1.0, 1.1, is_compiled=True),
    ]
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        cases.append(Case("small, bf16", replace(SMALL, precision="bf16"), PEERS, 1.0, 1.0))
    return judged("step", cases)


if __name__ == "__main__":
    sys.exit(main())
