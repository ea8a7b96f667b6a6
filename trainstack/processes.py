"""How a process ends: with its parent, or at once on Ctrl-C."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process with its parent, whose id is told by the parent itself.

    For the parent may have died before the request took effect.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_on_interrupt(line: str) -> None:
    """Let Ctrl-C print a line and end this process at once.

    An exception would wait for threads and processes that may never answer.
    """

    def end(*_) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)
