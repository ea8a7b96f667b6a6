"""What the nodes need to meet: a free port, names that resolve, clocks that agree."""

import contextlib
import ipaddress
import os
import socket
import tempfile
import time
from pathlib import Path

from trainstack.errors import ConfigError

PORTS_TRIED = 50
MOST_SKEW_SECONDS = 10  # torchrun evicts a node whose clock is fifteen seconds off
TOLD_SKEW_SECONDS = 2


def free_port(first: int) -> int:
    """The first port from ``first`` on that nothing on this host listens at."""
    for port in range(first, first + PORTS_TRIED):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as probe:
            probe.bind(("", port))
            return port
    raise SystemExit(f"train.slurm: error: no free port in {first}..{port}; set MASTER_PORT")


def preflight(torchrun_arguments: list[str], logs: Path) -> str | None:
    """A line on what may make the meeting fail or hang; ConfigError for what surely will.

    ``logs``: a folder on the file system that all nodes share, whose clock they have in common.
    """
    host = socket.gethostname()
    endpoint = [w for w in torchrun_arguments if w.startswith("--rdzv-endpoint=")]
    head = endpoint[0].partition("=")[2].rpartition(":")[0] if endpoint else None
    if head:
        check_name(host, head)
    skew = clock_skew(logs)
    clock = f"the clock of {host} is"
    if abs(skew) > MOST_SKEW_SECONDS:
        raise ConfigError(f"{clock} {skew:+.0f} s off that of the file system; fix its NTP")
    if abs(skew) > TOLD_SKEW_SECONDS:
        return f"{clock} {skew:+.1f} s off that of the file system"
    return None


def check_name(host: str, head: str) -> None:
    """ConfigError if this host cannot find the head node: torchrun would wait ten minutes."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(head, None)}
    except OSError as error:
        raise ConfigError(
            f"{host} cannot find {head}, where the nodes meet ({error}); fix its DNS or hosts"
        ) from None
    is_head = host.partition(".")[0] == head.partition(".")[0]  # one may have its domain
    if not is_head and all(ipaddress.ip_address(address).is_loopback for address in found):
        raise ConfigError(
            f"{host} takes {head}, where the nodes meet, for itself ({', '.join(found)}); fix "
            "its /etc/hosts"
        )


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
