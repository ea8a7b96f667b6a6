"""What can be read on this host that may explain why this rank is slow; takes seconds."""

import contextlib
import os
import time
from collections import Counter
from pathlib import Path

from trainstack import processes

SAMPLE_SECONDS = 2.0
BUSY = 0.2  # of a core, from which another process is named
MOST_NAMED = 3
TICKS = os.sysconf("SC_CLK_TCK")
# Of nvidia-smi --help-query-gpu; what holds the clock back, as new drivers call it, and old ones.
COLUMNS = "clocks.sm,clocks.max.sm,temperature.gpu,power.draw,power.limit"
HELD = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
REASONS = {  # bits of that, by NVML's nvmlClocksEventReasons; what is in order is left out
    0x4: "its power limit",
    0x8: "its hardware",
    0x20: "its temperature",
    0x40: "its temperature, by hardware",
    0x80: "the power supply",
}


def find_evidence(data_seconds: float, gpu: str | None) -> str:
    """A line for people; ``data_seconds``: for which a step waits for data; ``gpu``: its UUID."""
    began, before, busy_before = time.monotonic(), own_seconds(), cpu_seconds()
    time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - began
    ran, waited, held = ((b - a) / seconds for a, b in zip(before, own_seconds(), strict=True))
    shares = {of: (now - busy_before.get(of, now)) / seconds for of, now in cpu_seconds().items()}
    busiest = Counter(shares).most_common(MOST_NAMED)
    busy = [f"{name} (pid {pid}) {share:.0%}" for (pid, name), share in busiest if share > BUSY]
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    text = f"{data_seconds:.4f} s of a step wait for data; it may use {cores}, "
    text += f"load {os.getloadavg()[0]:.1f}; its main thread ran {ran:.0%} of the time"
    text += f" and waited {waited:.0%} for a core"
    text += f"; the quota of its cgroup held it back {held:.0%}" if held > 0 else ""
    text += f"; beside it: {', '.join(busy)}" if busy else ""
    return f"{text}; {state}" if gpu and (state := gpu_state(gpu)) else text


def own_seconds() -> tuple[float, float, float]:
    """So far: in which the main thread ran, waited for a core, and its cgroup was held back."""
    ran = waited = held = 0.0
    with contextlib.suppress(OSError, ValueError):  # proc(5); not every kernel has it
        ran, waited, _ = (int(n) / 1e9 for n in Path("/proc/self/schedstat").read_text().split())
    for file in processes.cgroup_files("cpu", "cpu.stat", "cpu.stat"):
        for folder in file.parents:  # a quota may be that of the job, above it
            with contextlib.suppress(OSError, ValueError):
                words = (folder / "cpu.stat").read_text().split()
                stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
                held = max(held, stat.get("throttled_usec", 0) / 1e6)
                held = max(held, stat.get("throttled_time", 0) / 1e9)  # of version 1
    return ran, waited, held


def cpu_seconds() -> dict[tuple[str, str], float]:
    """CPU time so far by pid and name, of processes that are no ranks of this job; proc(5)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            head, _, rest = path.read_text(errors="replace").rpartition(")")  # a name is any bytes
            pid, _, name = head.partition(" (")
            fields = rest.split()
            if int(pid) != os.getpid() and int(fields[1]) != os.getppid():
                found[pid, name] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def gpu_state(uuid: str) -> str:
    """Clock, temperature and power of a GPU, and what holds its clock back; empty if unknown."""
    answers = (processes.first_gpu(f"{COLUMNS},{name}", uuid) for name in HELD)
    told = next(filter(None, answers), "")
    if told.count(", ") != COLUMNS.count(",") + 1:
        return told and f"nvidia-smi says: {told}"
    clock, most, heat, power, limit, bits = told.split(", ")
    text = f"GPU at {clock} of {most}, {heat} C, {power} of {limit}"
    with contextlib.suppress(ValueError):
        if held := [word for bit, word in REASONS.items() if int(bits, 16) & bit]:
            text += f", held back by {', '.join(held)}"
    return text
