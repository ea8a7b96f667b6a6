"""torchrun with two changes: its end leaves an account of who failed, and SIGTERM saves first.

``python -m trainstack.job.launch --run DIR --job ID --attempt N --stop-file FILE -- OPTIONS``,
with torchrun's options.

torchrun knows by which signal a rank died, prints it among forty other lines and forgets it; and on
SIGTERM it ends its workers after thirty seconds, whether or not they have saved.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainstack.errors import USAGE_ERROR
from trainstack.job.preflight import preflight
from trainstack.run.folder import TORCHRUN_GOT, RunFolder
from trainstack.run.states import EXIT_CODES
from trainstack.storage import files
from trainstack.units import time_of

LOOK_SECONDS = 1.0
SHUTDOWN_SECONDS = 8  # for accounts, stacks and a last line of ranks that lost a peer


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.launch", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    options = parser.parse_args(arguments[:split])
    # Its table of failures says less than the accounts below.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    problem = preflight(options, arguments[split + 1 :])
    if problem:
        note_agent(options, problem, USAGE_ERROR)  # not tried again
        return 1
    killed_before = kernel_kills()
    stop_by_signal(options)
    os.environ["TRAINSTACK_PARENT"] = str(os.getpid())  # for the ranks' die_with_parent
    threading.Thread(target=end_with_others, args=(options,), daemon=True).start()
    # What is not in that list torchrun leaves to the handlers above.
    command = ["--signals-to-handle", "SIGQUIT", *arguments[split + 1 :]]
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        note_failures(options, error, kernel_kills() - killed_before)
        return 1
    except SignalException as error:
        say(f"ended by {signal.Signals(error.sigval).name}")
        return 1
    except Exception as error:  # the meeting failed: a name that does not resolve, a node missing
        text = " ".join(str(error).split())[:300]
        cause = f"torchrun on {socket.gethostname()}: {type(error).__name__}: {text}"
        note_agent(options, cause, EXIT_CODES["FAILED"])
        return 1
    return 0


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def stop_by_signal(options: argparse.Namespace) -> None:
    """A signal becomes the stop file, which the ranks look for each step.

    Two are meant otherwise: a second Ctrl-C, and the SIGTERM by which srun ends the other nodes
    once a rank has failed. Nothing can be saved then: torchrun ends its workers.
    """
    seen: list[int] = []

    def on_signal(number: int, _frame) -> None:
        seen.append(number)
        is_failed = RunFolder(options.run).failed_mark(options.job, options.attempt).exists()
        if is_failed or seen.count(signal.SIGINT) > 1:
            raise SignalException("a rank failed, or Ctrl-C twice", signal.Signals(number))
        with contextlib.suppress(OSError):
            if not options.stop_file.exists():
                reason = f"{TORCHRUN_GOT} {signal.Signals(number).name}\n"
                files.replace_file(options.stop_file, reason.encode())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, on_signal)


def end_with_others(options: argparse.Namespace) -> None:
    """Kill the ranks of this node once a rank of any node has failed and these did not end.

    torchrun asks politely for thirty seconds and knows of its own node only; a rank that waits in
    a collective of NCCL, or is stopped, does not hear it.
    """
    mark = RunFolder(options.run).failed_mark(options.job, options.attempt)
    while not mark.exists():
        time.sleep(LOOK_SECONDS)
    time.sleep(SHUTDOWN_SECONDS)
    for pid in Path("/proc/self/task").glob("*/children"):
        for child in pid.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def note_failures(options: argparse.Namespace, error: ChildFailedError, kernel_killed: int) -> None:
    """Leave an account for each rank that could not: killed, crashed, or gone without a word."""
    run = RunFolder(options.run)
    have = {record["rank"] for record in run.failures(options.job, options.attempt)}
    for rank, failure in error.failures.items():
        if rank in have:
            continue
        state, stacks = "FAILED", run.stacks_file(options.job, options.attempt, rank)
        if failure.exitcode == 1 and stacks.exists() and stacks.stat().st_size:
            state, cause = "HANG", f"no progress, with Python's own lock held; stacks: {stacks}"
        elif failure.exitcode == -signal.SIGKILL and kernel_killed > 0:
            cause = f"killed by the kernel: out of memory (host memory{memory_limit()})"
        elif failure.exitcode == -signal.SIGKILL:
            cause = "killed by SIGKILL (out of memory, or somebody's kill -9)"
        elif failure.exitcode < 0:
            cause = f"killed by {signal.Signals(-failure.exitcode).name}"
        else:
            cause = f"ended with code {failure.exitcode} and left no word"
        # The signal of a stop, or of torchrun when a sibling failed: not where it began.
        seen_at = min(time.time(), failure.timestamp + 1)  # torchrun notes whole seconds
        run.add_failure(
            options.job, options.attempt, rank, state, EXIT_CODES[state], cause,
            failure.exitcode == -signal.SIGTERM, is_second_hand=True,
            is_abort=failure.exitcode == -signal.SIGABRT, at=time_of(seen_at),
        )  # fmt: skip
        say(f"rank {rank} (local {failure.local_rank}) on {socket.gethostname()}: {cause}")


def note_agent(options: argparse.Namespace, cause: str, code: int) -> None:
    """Leave this node's own account: it did not come to any rank."""
    run, name = RunFolder(options.run), f"agent-{socket.gethostname()}"
    run.add_failure(
        options.job, options.attempt, name, "FAILED", code, cause, False, is_second_hand=True
    )
    say(f"error: {cause}")


def kernel_kills() -> int:
    """How often the kernel killed in this process's memory cgroup (v1 or v2); 0 where unknown."""
    total = 0
    for path in memory_files("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError, ValueError):
            words = path.read_text().split()
            total += int(words[words.index("oom_kill") + 1])
    return total


def memory_limit() -> str:
    for path in memory_files("memory.limit_in_bytes", "memory.max"):
        with contextlib.suppress(OSError, ValueError):
            return f", limit {int(path.read_text()) / 2**20:,.0f} MiB"
    return ""


def memory_files(version_1: str, version_2: str) -> list[Path]:
    """A file of this process's memory cgroup; cgroups(7)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found.append(Path("/sys/fs/cgroup") / path.lstrip("/") / version_2)
            elif "memory" in controllers.split(","):
                found.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / version_1)
    return [path for path in found if path.exists()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
