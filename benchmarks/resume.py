"""From the command to the first step of a run that is resumed, beside a new one; and HF Trainer's.

A tiny Llama that has trained 1,000 steps and has a checkpoint, all caches warm. How long it takes
to find the place in the data is measured by ``sampler``.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from runs import OURS, ROUNDS, Loop, Work, make, run  # noqa: E402

MOST = 1.2  # of a new one
DONE = 1000  # steps
WORK = Work(hidden=64, layers=2, vocab=512, seq_len=32, batch=4, micro=4, steps=DONE + 5, skipped=1,
            is_torchrun=True)  # fmt: skip


def main() -> int:
    found: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as folder:
        home = Path(folder)
        make(home, WORK)
        for _ in range(ROUNDS):
            for name in (OURS, "trainer"):
                first = run(home, replace(WORK, steps=DONE), Loop(name))
                again = run(home, WORK, Loop(name), done=DONE)
                for is_resumed, result in enumerate((first, again)):
                    found.setdefault((name, bool(is_resumed)), []).append(result.first_seconds)
    median = {key: statistics.median(values) for key, values in found.items()}
    for (name, is_resumed), seconds in median.items():
        kind = "resumed" if is_resumed else "new"
        print(f"resume: {name}, {kind}: {seconds:.2f} s to the first step", flush=True)
    pairs = zip(found[OURS, True], found[OURS, False], strict=True)
    measured = statistics.median(resumed / new for resumed, new in pairs)
    verdict = "holds" if measured <= MOST else "falls short"
    print(f"resume: target {MOST:.2f} of a new run, measured {measured:.2f}, {verdict}")
    return 0 if verdict == "holds" else 1


if __name__ == "__main__":
    sys.exit(main())
