"""A step beside the same step of HF Trainer, accelerate and Lightning, and beside the floor.

The floor is a bare loop: tensors that are there, forward, backward, fused AdamW; no data, no log,
no clip, no checkpoint, nothing that notices a fault. Each loop is a command of its own, one thread,
in turn, five rounds; peers at their default and at their best, of which the best counts. Losses
have to agree. Tiny: 2 layers of 64 channels, 4 samples of 32 tokens, in which only what a loop adds
is left. Small: a Llama of 3M parameters, 4 samples of 256 tokens.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import OURS, Loop, Work, compare, ratio  # noqa: E402

ROUNDS = 5
WORKS = {
    "tiny": Work(hidden=64, layers=2, vocab=512, seq_len=32, batch=4, micro=4, steps=400,
                 skipped=50),
    "small": Work(hidden=192, layers=4, vocab=8192, seq_len=256, batch=4, micro=4, steps=24,
                  skipped=4),
}  # fmt: skip
PEERS = ("trainer", "accelerate", "lightning")
TARGETS = {"tiny": (1 / 1.05, 1.4), "small": (1.0, 1.0)}  # of the floor's speed, of the best peer's


def main() -> int:
    ours, floor, holds = Loop(OURS), Loop("bare"), True
    peers = [Loop(name, is_best) for name in PEERS for is_best in (False, True)]
    for name, work in WORKS.items():
        with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as folder:
            found = compare(Path(folder), work, [floor, ours, *peers], ROUNDS)
        for loop in found:
            seconds, peak = ratio(found, ours, loop), ratio(found, ours, loop, "peak")
            own = sorted(result.step_seconds for result in found[loop])
            print(f"{name}: {loop!s:22} {1e3 * own[len(own) // 2]:9.2f} ms a step "
                  f"({1e3 * own[0]:.2f} to {1e3 * own[-1]:.2f}), {seconds:5.2f} of ours; "
                  f"memory {peak:.2f} of ours", flush=True)  # fmt: skip
        of_floor = ratio(found, ours, floor)
        of_peers = min(ratio(found, ours, peer) for peer in peers)
        least_floor, least_peers = TARGETS[name]
        is_met = of_floor >= least_floor and of_peers >= least_peers
        holds &= is_met
        print(f"step: {name}: target {least_floor:.2f} of the floor, {least_peers:.2f} times the "
              f"best peer, measured {of_floor:.2f}, {of_peers:.2f}, "
              f"{'holds' if is_met else 'falls short'}", flush=True)  # fmt: skip
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
