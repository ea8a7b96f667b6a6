"""Ours, a bare loop and HF Trainer on the same work.

``python -m gpu.beside WORK DEVICE FOLDER make`` makes model and data in FOLDER. In place of make,
loops: ours, bare, trainer; with a + they are compiled. A line of JSON for each. Every loop is a
process of its own (benchmarks/peers).
"""

import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
import runs  # noqa: E402

WORKS = {
    "124m": runs.Work(hidden=768, layers=12, vocab=50257, seq_len=1024, batch=16, micro=16,
                      steps=32, skipped=12, precision="bf16", head=64, device="cuda"),
    "350m": runs.Work(hidden=1024, layers=24, vocab=50257, seq_len=1024, batch=16, micro=16,
                      steps=32, skipped=12, precision="bf16", head=64, device="cuda"),
    "1b": runs.Work(hidden=2048, layers=22, vocab=32000, seq_len=2048, batch=8, micro=8,
                    steps=24, skipped=10, precision="bf16", head=64, device="cuda"),
}  # fmt: skip
ON_CPU = runs.Work(hidden=64, layers=2, vocab=512, seq_len=32, batch=4, micro=4, steps=30,
                   skipped=10)  # fmt: skip


def main(name: str, device: str, folder: str, *loops: str) -> int:
    home, work = Path(folder), WORKS[name] if device == "cuda" else ON_CPU
    if loops == ("make",):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        runs.make(home, work)
        return 0
    for loop in loops:
        kind = loop.removesuffix("+")
        if kind == "trainer" and not importlib.util.find_spec("accelerate"):
            print(f"{loop} is left out: HF Trainer needs accelerate, which is not here", flush=True)
            continue
        result = runs.run(home, work, runs.Loop(kind, is_compiled=loop.endswith("+")))
        speed = work.batch * work.seq_len / result.step_seconds
        told = {
            "loop": loop, "tokens_per_second": speed, "first_seconds": result.first_seconds,
            "flops_per_second": speed * flops_of(home, work), "loss": result.losses[COMPARED],
        }  # fmt: skip
        if kind == runs.OURS:
            told["data_share"] = data_share(home)
        print(json.dumps(told), flush=True)
        shutil.rmtree(home / "runs", ignore_errors=True)  # checkpoints of 13 GB
    return 0


COMPARED = 10  # the step whose loss is told


def flops_of(home: Path, work: runs.Work) -> float:
    """Of a token, forward and backward: 6 N + 12 L H S, after the PaLM paper (Chowdhery 2022)."""
    weights = sum(path.stat().st_size for path in (home / "peer").glob("*.safetensors"))
    return 6 * weights / 4 + 12 * work.layers * work.hidden * work.seq_len


def data_share(home: Path) -> float:
    """Of the time of a step, that for which it waited for samples."""
    path = home / "runs" / "benchmark" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return statistics.median(
        line["data_seconds"] / line["step_seconds"] for line in lines if "data_seconds" in line
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
