"""Makes the checks: those of right and safe side by side, then the timings, one alone at a time.

``python -m gpu.driver``, which tests/gpu.sh starts. A check that fails, raises or is late gives
its line, and the others go on.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu import correct, fast, safe  # noqa: F401  # they enter their checks
from gpu.bench import CHECKS, Bench, Check, Site, TimedOut, make_site

PASSED, FAILED, NEEDS_GPU, ERROR = "passed", "failed", "needs a GPU", "error"
BESIDE = {"cuda": 0.6, "cpu": 0.75}  # of the time is for checks side by side, if timings follow
LEAST_SECONDS = 5  # below that a check is not begun
ON_CPU = 3  # times as long may a check take
NO_TIME = "no time was left: more --minutes, or --only this one"
SAID = 110  # characters of a row's figures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{each.name:20} {each.about}" for each in CHECKS))
        return 0
    for name in options.only:
        if not fnmatch.filter([each.name for each in CHECKS], name):
            parser.error(f"no check {name}; there are: {', '.join(c.name for c in CHECKS)}")
    asked = options.only or ["*"]
    chosen = [c for c in CHECKS if any(fnmatch.fnmatch(c.name, name) for name in asked)]
    out = options.out or Path(tempfile.mkdtemp(prefix="gpu-proof-"))
    out.mkdir(parents=True, exist_ok=True)
    device, card = find_device(options.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu-site-", ignore_cleanup_errors=True) as folder:
        site = make_site(Path(folder), device, card)
        try:
            return prove(chosen, site, out / "gpu.jsonl", options.minutes * 60)
        finally:
            site.end_all()


def find_device(wanted: str | None) -> tuple[str, str]:
    """The device of the checks, and its name and versions for people."""
    code = (
        "import torch, transformers as t, sys; g = torch.cuda.is_available();"
        "print(torch.cuda.get_device_name() if g else '');"
        "print(f'torch {torch.__version__}, transformers {t.__version__}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tests/gpu.sh: error: {sys.executable} cannot be used: {done.stderr[-500:]}")
    name, versions = done.stdout.splitlines()[-2:]
    if wanted == "cuda" and not name:
        sys.exit("tests/gpu.sh: error: --device cuda: torch sees no GPU")
    device = wanted or ("cuda" if name else "cpu")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
        name += f", driver {told.stdout.strip()}"
    return device, f"{name if device == 'cuda' else 'CPU'}, {versions}"


def prove(checks: list[Check], site: Site, path: Path, seconds: float) -> int:
    """Make all checks within ``seconds``; 0 if none failed. Their lines go to ``path`` too."""
    started, lines, lock = time.monotonic(), [], threading.Lock()
    ends_at = started + seconds
    beside = [each for each in checks if not each.is_timing]
    alone = [each for each in checks if each.is_timing]
    beside_until = started + seconds * BESIDE[site.device] if alone else ends_at
    path.unlink(missing_ok=True)

    def make(check: Check, until: float) -> None:
        line = one(check, site, until)
        with lock:
            lines.append(line)
            text = json.dumps(line)
            print(text, flush=True)
            with path.open("a") as file:
                file.write(text + "\n")

    # A check keeps two or three cores busy, and the card is shared.
    workers = max(1, min(6, (os.cpu_count() or 1) // 2 - 1))
    with ThreadPoolExecutor(workers) as pool:
        # Those that take long begin first, to end with the others; alone on a core, they come last.
        for each in sorted(beside, key=lambda c: c.seconds, reverse=workers > 1):
            pool.submit(make, each, beside_until)
    for each in alone:
        make(each, ends_at)
    order = {each.name: place for place, each in enumerate(checks)}
    lines.sort(key=lambda line: order[line["check"]])
    print_table(lines, site, time.monotonic() - started)
    return int(any(line["result"] in (FAILED, ERROR) for line in lines))


def one(check: Check, site: Site, until: float) -> dict[str, Any]:
    """Make one check; its line, whatever happens."""
    started = time.monotonic()
    allowed = check.seconds * (1 if site.device == "cuda" else ON_CPU)
    bench, error, result = Bench(site, check.name, min(until, started + allowed)), "", PASSED
    try:
        if until - started < LEAST_SECONDS:
            raise TimedOut(NO_TIME)
        check.run(bench)
    except TimedOut as late:
        result, error = FAILED, f"took longer than {time.monotonic() - started:.0f} s: {late}"
        if str(late) == NO_TIME:
            result, error = ERROR, NO_TIME
    except Exception as problem:
        first = str(problem).partition("\n")[0]
        result, error = ERROR, f"{type(problem).__name__}: {first}\n{traceback.format_exc()}"
    if result == PASSED and check.needs_gpu and not bench.is_gpu:
        result = NEEDS_GPU
    elif result == PASSED and bench.missed:
        result = FAILED
    for path in (site.home / "runs").glob(f"{check.name}-*"):
        shutil.rmtree(path, ignore_errors=True)  # a checkpoint has up to 4 GB
    line = {"check": check.name, "result": result, "measured": bench.measured}
    line |= {"limit": bench.limits, "seconds": round(time.monotonic() - started, 1)}
    line |= {"card": site.card}
    line |= {"missed": bench.missed} if result == FAILED and bench.missed else {}
    return line | ({"error": shortened(error)} if error else {})


def shortened(error: str) -> str:
    """Its head and its end."""
    return error if len(error) < 4000 else f"{error[:1000]} ... {error[-3000:]}"


def print_table(lines: list[dict[str, Any]], site: Site, seconds: float) -> None:
    print(f"\n{'check':20} {'result':12} {'s':>6}  measured (limit)")
    for line in lines:
        limits = line["limit"]
        figures = [f"{name} {value} ({limits[name]})" if name in limits else f"{name} {value}"
                   for name, value in line["measured"].items()]  # fmt: skip
        problems = line.get("missed") or line.get("error", "").splitlines()[:1]
        text = "; ".join(problems or figures)
        shown = text if len(text) <= SAID else f"{text[:SAID]}..."
        mark = line["result"].upper() if line["result"] in (FAILED, ERROR) else line["result"]
        print(f"{line['check']:20} {mark:12} {line['seconds']:6.1f}  {shown}")
    counts = Counter(line["result"] for line in lines)
    told = ", ".join(f"{counts[name]} {name}" for name in (PASSED, FAILED, ERROR) if counts[name])
    print(f"\n{site.card}: {told} in {seconds:.0f} s", flush=True)
    if counts[NEEDS_GPU]:
        print(f"{counts[NEEDS_GPU]} NEED A GPU: of these only the check itself was tried, and "
              "nothing is proved", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
