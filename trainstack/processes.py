"""How a process ends: with its parent, or at once on Ctrl-C; and whether one is alive."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process with its parent, whose id the parent itself has told.

    The parent may have died before the request took effect: then this process ends here.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def mute(descriptor: int) -> None:
    """Its reader has gone: what is written there from now on, at the exit too, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def tell(text: str) -> None:
    """A line on stderr; whoever read it may be gone, as ``tee`` is after Ctrl-C."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        mute(2)


def first_gpu(columns: str, uuid: str | None = None) -> str:
    """What nvidia-smi says of the first GPU that a job may use, by its columns; empty without one.

    ``columns``: ``name``, or ``name,driver_version``. ``uuid``: of that GPU instead.
    """
    ask = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader"]
    ask += [f"--id={uuid}"] if uuid else []
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command and exit by its code; Ctrl-C and a reader that went away end it quietly."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # as of ... | head
        mute(1)
        code = 141
    sys.exit(code)


def end_on_interrupt(line: str) -> None:
    """Let Ctrl-C print a line and end this process at once.

    An exception would wait for threads and processes that may never answer.
    """

    def end(*_) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of this host that took a lease has ended (or its pid was used again)."""
    return process_start(holder["pid"]) != holder["process_started"]


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot with the boot's id; None if it has ended.

    Field 22 of /proc/<pid>/stat, counted from behind the command's closing parenthesis (proc(5)).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    is_over = fields[0] in "ZX"  # a zombie, or dead
    return None if is_over else f"{boot}/{fields[19]}"


def cgroup_files(controller: str, version_1: str, version_2: str) -> list[Path]:
    """A file of this process's cgroup, by its names in both versions; cgroups(7)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found.append(Path("/sys/fs/cgroup") / path.lstrip("/") / version_2)
            elif controller in controllers.split(","):
                found.append(Path("/sys/fs/cgroup") / controller / path.lstrip("/") / version_1)
    return [path for path in found if path.exists()]
