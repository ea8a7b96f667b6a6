"""What the nodes need to meet: a free port, names that resolve, clocks that agree."""

import contextlib
import ipaddress
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PORTS_TRIED = 50
MOST_SKEW_SECONDS = 10  # torchrun evicts a node whose clock is fifteen seconds off
TOLD_SKEW_SECONDS = 2


@dataclass(frozen=True)
class Finding:
    """What may keep the nodes from meeting, in one line."""

    text: str
    is_fatal: bool


def free_port(first: int) -> int:
    """The first port from ``first`` on that nothing on this host listens at."""
    for port in range(first, first + PORTS_TRIED):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as probe:
            probe.bind(("", port))
            return port
    raise SystemExit(f"train.slurm: error: no free port in {first}..{port}; set MASTER_PORT")


def preflight(torchrun_arguments: list[str], logs: Path) -> Finding | None:
    """What would make the meeting fail or hang, found before it; None if there is nothing.

    ``logs``: a folder on the file system that all nodes share, whose clock they have in common.
    """
    host = socket.gethostname()
    endpoint = [w for w in torchrun_arguments if w.startswith("--rdzv-endpoint=")]
    head = endpoint[0].partition("=")[2].rpartition(":")[0] if endpoint else None
    problem = name_problem(host, head) if head else None
    if problem:
        return Finding(problem, is_fatal=True)
    skew = clock_skew(logs)
    clock = f"the clock of {host} is"
    if abs(skew) > MOST_SKEW_SECONDS:
        text = f"{clock} {skew:+.0f} s off that of the file system; fix its NTP"
        return Finding(text, is_fatal=True)
    if abs(skew) > TOLD_SKEW_SECONDS:
        return Finding(f"{clock} {skew:+.1f} s off that of the file system", is_fatal=False)
    return None


def name_problem(host: str, head: str) -> str | None:
    """Why this host would not find the head node: torchrun would wait ten minutes for it."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(head, None)}
    except OSError as error:
        return f"{host} cannot find {head}, where the nodes meet ({error}); fix its DNS or hosts"
    is_head = host.partition(".")[0] == head.partition(".")[0]  # one may have its domain
    if not is_head and all(ipaddress.ip_address(address).is_loopback for address in found):
        return (
            f"{host} takes {head}, where the nodes meet, for itself ({', '.join(found)}); fix "
            "its /etc/hosts"
        )
    return None


def clock_skew(folder: Path) -> float:
    """Seconds by which this node's clock is ahead of the file system's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        written = os.fstat(file.fileno()).st_mtime
        after = time.time()
    return max(before - written, 0.0) or min(after - written, 0.0)
