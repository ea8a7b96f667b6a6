"""What would make the meeting of the nodes fail, told before it."""

import argparse
import ipaddress
import os
import socket
import tempfile
import time
from pathlib import Path

from trainstack.job.launch import say

MOST_SKEW_SECONDS = 10


def preflight(options: argparse.Namespace, torchrun_arguments: list[str]) -> str | None:
    """What would make the meeting of the nodes fail or hang, in one line; None where nothing.

    torchrun evicts a node whose clock differs by more than fifteen seconds, and waits ten minutes
    for one that cannot find the meeting point.
    """
    host = socket.gethostname()
    endpoint = [w for w in torchrun_arguments if w.startswith("--rdzv-endpoint=")]
    head = endpoint[0].partition("=")[2].rpartition(":")[0] if endpoint else None
    if head:
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(head, None)}
        except OSError as error:
            return (
                f"{host} cannot find {head}, where the nodes meet ({error}); mend its DNS or hosts"
            )
        is_head = host.partition(".")[0] == head.partition(".")[0]  # one may have its domain
        if not is_head and all(ipaddress.ip_address(address).is_loopback for address in found):
            return (
                f"{host} takes {head}, where the nodes meet, for itself ({', '.join(found)}); mend "
                "its /etc/hosts"
            )
    skew = clock_skew(options.run / "logs")
    if abs(skew) > MOST_SKEW_SECONDS:
        return f"the clock of {host} is {skew:+.0f} s off that of the file system; mend its NTP"
    if abs(skew) > MOST_SKEW_SECONDS / 5:
        say(f"the clock of {host} is {skew:+.1f} s off that of the file system")
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
