"""What the nodes need to meet: a free port, names that resolve, clocks that agree."""

import contextlib
import ipaddress
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError, Failed
from trainstack.storage import files
from trainstack.waits import LOOK_SECONDS, MARK_SECONDS, REACH_SECONDS

PORTS_TRIED = 50
MOST_SKEW_SECONDS = 10  # torchrun evicts a node whose clock is fifteen seconds off
TOLD_SKEW_SECONDS = 2
NEIGHBOURS = 8  # nodes that each node tries to reach before the ranks do


def free_port(first: int) -> int:
    """The first port from ``first`` on that nothing on this host listens at."""
    for port in range(first, first + PORTS_TRIED):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as probe:
            probe.bind(("", port))
            return port
    raise SystemExit(f"train.slurm: error: no free port in {first}..{port} on this node")


def preflight(torchrun_arguments: list[str], logs: Path) -> str | None:
    """A line on what may make the meeting fail or hang; ConfigError for what surely will.

    ``logs``: a folder on the file system that all nodes share, whose clock they have in common.
    """
    host = socket.gethostname()
    head, _ = meeting_point(torchrun_arguments)
    if head:
        check_name(host, head)
    skew = clock_skew(logs)
    clock = f"the clock of {host} is"
    if abs(skew) > MOST_SKEW_SECONDS:
        raise ConfigError(f"{clock} {skew:+.0f} s off that of the file system; fix its NTP")
    if abs(skew) > TOLD_SKEW_SECONDS:
        return f"{clock} {skew:+.1f} s off that of the file system"
    return None


def meeting_point(torchrun_arguments: list[str]) -> tuple[str, int]:
    """Host and port where the nodes meet; an empty host if there is only one."""
    endpoint = next((w for w in torchrun_arguments if w.startswith("--rdzv-endpoint=")), "")
    head, _, port = endpoint.partition("=")[2].rpartition(":")
    return head, int(port or 0)


def meet_hosts(torchrun_arguments: list[str], folder: Path) -> None:
    """Wait until this node reaches the others; ConfigError, which names both, if it cannot.

    torchrun and the ranks would wait ten minutes and name neither. Each node listens on a port that
    the system chooses, as ranks do, and the head also where torchrun will meet. Each leaves its
    address in ``folder``, which all share, connects to some others, and leaves word that it did.
    """
    head, port = meeting_point(torchrun_arguments)
    count = int(next(w for w in torchrun_arguments if w.startswith("--nnodes=")).partition("=")[2])
    if not head or count == 1:
        return
    host = socket.gethostname()
    files.make_folder(folder)
    with contextlib.ExitStack() as stack:
        ports = [listen(number, stack) for number in ([0, port] if is_same(host, head) else [0])]
        mark = {"host": host, "address": address_of(head), "ports": ports}
        files.replace_file(folder / f"{host}.json", json.dumps(mark).encode())
        for path in neighbours(wait_for(folder, "*.json", count), host, head):
            other = json.loads(path.read_bytes())
            for number in other["ports"]:
                reach(host, other, number)
        (folder / f"{host}.met").touch()
        wait_for(folder, "*.met", count)
    if is_same(host, head):
        (folder / "open").touch()  # the port is torchrun's now
    else:
        wait_for(folder, "open", 1)


def listen(port: int, stack: contextlib.ExitStack) -> int:
    """Accept connections until the end of ``stack``, and drop each; returns the port."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=is_dual)

    def accept() -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                server.accept()[0].close()

    def end() -> None:
        server.shutdown(socket.SHUT_RDWR)  # close alone would leave the port to a thread in accept
        thread.join()
        server.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    stack.callback(end)
    return server.getsockname()[1]


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    """The files of all nodes, in order; ConfigError if some never came.

    A name made here first brings the listing up to date where a client of NFS answers from a cache.
    """
    deadline = time.monotonic() + MARK_SECONDS
    probe = folder / f".look.{socket.gethostname()}"
    while True:
        probe.touch()
        probe.unlink(missing_ok=True)
        found = sorted(folder.glob(pattern))
        if len(found) >= count:
            return found
        if time.monotonic() > deadline:
            here = ", ".join(path.stem for path in found)
            raise Failed(
                f"only {len(found)} of {count} nodes began within {MARK_SECONDS:.0f} s ({here}); "
                "leave out the others: -- --exclude=NODE"
            )
        time.sleep(max(LOOK_SECONDS / 4, count / 100))  # a thousand nodes look at one folder


def neighbours(marks: list[Path], host: str, head: str) -> list[Path]:
    """The marks of those that a node tries: the head, and the nodes that follow it in order."""
    at = next(i for i, path in enumerate(marks) if path.stem == host)
    following = (marks[at + 1 :] + marks[:at])[:NEIGHBOURS]
    heads = [path for path in marks if is_same(path.stem, head) and path.stem != host]
    return list(dict.fromkeys([*heads, *following]))


def reach(host: str, other: dict[str, Any], port: int) -> None:
    """Connect once; ConfigError if that does not come about in REACH_SECONDS."""
    try:
        socket.create_connection((other["address"], port), REACH_SECONDS).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ConfigError(
            f"{host} cannot reach {other['host']} ({other['address']}) at port {port}: {why}; it "
            "looks like a firewall between the two: tell your admin (nodes of a job need all ports "
            f"of each other), or leave one out: -- --exclude={host}"
        ) from None


def address_of(head: str) -> str:
    """How others find this host: its address on the network that leads to the head.

    The head itself has none: it may take its own name for 127.0.1.1. Its name has to do.
    """
    family, _, _, _, address = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    return head if ipaddress.ip_address(own).is_loopback else own


def is_same(host: str, other: str) -> bool:
    return host.partition(".")[0] == other.partition(".")[0]  # one may have its domain


def check_name(host: str, head: str) -> None:
    """ConfigError if this host cannot find the head node: torchrun would wait ten minutes."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(head, None)}
    except OSError as error:
        raise ConfigError(
            f"{host} cannot find {head}, where the nodes meet ({error}); fix its DNS or hosts"
        ) from None
    if not is_same(host, head) and all(
        ipaddress.ip_address(address).is_loopback for address in found
    ):
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
