"""torchrun with two changes: its end leaves a report of who failed, and SIGTERM saves first.

``python -m trainstack.job.launch --run DIR --job ID --attempt N --stop-file FILE -- OPTIONS``,
with torchrun's options.

torchrun knows by which signal a rank died, prints it among forty other lines and forgets it; and on
SIGTERM it ends its workers after thirty seconds, whether or not they have saved. It is imported
late, for that takes seconds, in which Slurm may preempt the job.
"""

import argparse
import contextlib
import gc
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trainstack.errors import ConfigError
from trainstack.job.preflight import is_same, meet_hosts, meeting_point, preflight
from trainstack.processes import cgroup_files, first_gpu, tell
from trainstack.run.folder import TORCHRUN_GOT, RunFolder
from trainstack.run.states import EXIT_CODES
from trainstack.storage import files
from trainstack.storage.kept_folder import pack_when_quiet, unpack
from trainstack.units import time_of
from trainstack.waits import (
    AWAKE_SECONDS,
    HEARTBEAT_SECONDS,
    LOCKED_LOOKS,
    LOOK_SECONDS,
    SHUTDOWN_SECONDS,
    STOPPED_SECONDS,
)

QUIET_SECONDS = 10.0  # without a new kernel, then those there are kept
CPU = Path("/proc/cpuinfo")


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.launch", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    options = parser.parse_args(arguments[:split])
    run, job, attempt = RunFolder(options.run), options.job, options.attempt
    failed_mark = run.failed_mark(job, attempt)
    stop_by_signal(options.stop_file, failed_mark)
    torchrun_arguments = arguments[split + 1 :]
    head, _ = meeting_point(torchrun_arguments)
    if is_head := not head or is_same(socket.gethostname(), head):  # one heartbeat of a thousand
        threading.Thread(target=beat, args=(run, job), daemon=True).start()
        known = run.last_time("attempt", "start")
        say(f"starting: the nodes meet, and each process imports torch{known}")
    if scratch := os.environ.get("TMPDIR"):  # of this node, which job.sh removes
        Path(scratch).mkdir(mode=0o700, parents=True, exist_ok=True)
        bring_kernels(run, is_head)
    killed_before = kernel_kills()
    try:
        if remark := preflight(torchrun_arguments, run.logs):
            say(remark)
    except ConfigError as error:
        note_agent(run, job, attempt, str(error), error.code)  # it is not tried again
        return 1
    threading.Thread(target=end_with_others, args=(failed_mark,), daemon=True).start()
    threading.Thread(target=end_locked, args=(run, job, attempt), daemon=True).start()
    os.environ["TRAINSTACK_PARENT"] = str(os.getpid())  # for the ranks' die_with_parent
    return run_ranks(run, job, attempt, torchrun_arguments, killed_before)


def bring_kernels(run: RunFolder, is_head: bool) -> None:
    """Kernels that an earlier job compiled, onto this node's disk; the head keeps new ones.

    Compiling takes minutes, and on a shared disk ranks trip over each other's.
    """
    path, folder = run.path / "config.yaml", Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    config = yaml.safe_load(path.read_text()) if path.exists() else {}
    if not config or not config["train"]["torch_compile"] or not folder.is_absolute():
        return
    made_for = f"{config['model']['name']} torch {version('torch')} {device_name()}"
    name = re.sub(r"[^\w.-]+", "-", made_for)
    kept = run.path.parent.parent / "cache" / "kernels" / str(os.getuid())  # nobody else's are run
    archive = kept / f"{name}.tar"
    if not folder.exists() and unpack(archive, folder) and is_head:
        say(f"with kernels of earlier jobs: {archive}")
    if is_head:
        keeping = (folder, archive, QUIET_SECONDS)
        threading.Thread(target=pack_when_quiet, args=keeping, daemon=True).start()


def device_name() -> str:
    """What compiled kernels depend on: the GPU's name, or what this CPU knows."""
    if name := first_gpu("name"):
        return name
    flags = next((line for line in CPU.read_text().splitlines() if line.startswith("flags")), "")
    return f"CPU {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def run_ranks(
    run: RunFolder, job: str, attempt: int, torchrun_arguments: list[str], killed_before: int
) -> int:
    """Meet the other nodes, start the ranks, wait for their end, report; the exit code.

    ``killed_before``: how often the kernel had killed for memory on this node.
    """
    gc.disable()  # it looks at what is imported again and again
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gc.freeze()
    gc.enable()
    # Its table of failures says less than the reports below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Signals that are not in this list torchrun leaves to the handlers of stop_by_signal.
    options = torchrun.parse_args(["--signals-to-handle", "SIGQUIT", *torchrun_arguments])
    try:
        meet_hosts(torchrun_arguments, run.meeting(job, attempt))
        torchrun.run(options)
    except ConfigError as error:
        note_agent(run, job, attempt, str(error), error.code)
        return 1
    except ChildFailedError as error:
        note_failures(run, job, attempt, error.failures, kernel_kills() - killed_before)
        return 1
    except SignalException as error:
        say(f"ended by {signal.Signals(error.sigval).name}")
        return 1
    except Exception as error:  # the meeting failed: a name that does not resolve, a node missing
        text = " ".join(str(error).split())[:300]
        cause = f"torchrun on {socket.gethostname()}: {type(error).__name__}: {text}"
        note_agent(run, job, attempt, cause, EXIT_CODES["FAILED"])
        return 1
    return 0


def say(text: str) -> None:
    tell(f"launch: {text}")


def stop_by_signal(stop_file: Path, failed_mark: Path) -> None:
    """Make a signal the stop file, which the ranks look for each step.

    Two are meant otherwise: a second Ctrl-C, and the SIGTERM by which srun ends the other nodes
    once a rank has failed. Nothing can be saved then: torchrun ends its workers.
    """
    seen: list[int] = []

    def on_signal(number: int, _frame) -> None:
        seen.append(number)
        if failed_mark.exists() or seen.count(signal.SIGINT) > 1:
            end_ranks(number)
        with contextlib.suppress(OSError):
            if not stop_file.exists():  # else somebody gave a better reason
                reason = f"{TORCHRUN_GOT} {signal.Signals(number).name}\n"
                files.replace_file(stop_file, reason.encode())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, on_signal)


def end_ranks(number: int) -> None:
    """End what torchrun started, by the exception that it knows, once it is imported."""
    api = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    if not hasattr(api, "SignalException"):
        os._exit(128 + number)
    raise api.SignalException("a rank failed, or Ctrl-C twice", signal.Signals(number))


def beat(run: RunFolder, job: str) -> None:
    """Show that the job is alive, also to those from whom Slurm hides it."""
    while True:
        run.beat(job)
        time.sleep(HEARTBEAT_SECONDS)


def end_with_others(failed_mark: Path) -> None:
    """Kill the ranks of this node once a rank of any node has failed and these did not end.

    torchrun asks politely for thirty seconds and knows of its own node only; a rank that waits in
    a collective of NCCL, or is stopped, does not hear it.
    """
    while not failed_mark.exists():
        time.sleep(LOOK_SECONDS)
    time.sleep(SHUTDOWN_SECONDS)
    for child in children():
        kill(child)


def end_locked(run: RunFolder, job: str, attempt: int) -> None:
    """Kill a rank of this node whose stacks stay: nobody in it can run to take them away again.

    Counted in looks, not by a clock: while Slurm suspends the job, nobody looks. After that the
    ranks have time to run again.
    """
    looks: Counter[int] = Counter()
    ranks: dict[int, str] = {}  # by pid
    while True:
        before = time.monotonic()
        time.sleep(LOOK_SECONDS)
        if time.monotonic() - before > LOOK_SECONDS + STOPPED_SECONDS:
            looks.clear()
            time.sleep(AWAKE_SECONDS)
        for child in children():
            rank = ranks[child] = ranks.get(child) or rank_of(child)
            is_locked = bool(rank) and has_bytes(run.stacks_file(job, attempt, int(rank)))
            looks[child] = looks[child] + 1 if is_locked else 0
            if looks[child] >= LOCKED_LOOKS:
                kill(child)


def children() -> list[int]:
    """The ranks: what any thread of this process has started."""
    found: list[str] = []
    for thread in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            found += thread.read_text().split()
    return [int(pid) for pid in found]


def rank_of(pid: int) -> str:
    """The RANK that torchrun gave a process; empty if it has none, or is gone."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(v.partition(b"=")[::2] for v in variables).get(b"RANK", b"").decode()
    return ""


def has_bytes(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def note_failures(
    run: RunFolder, job: str, attempt: int, failures: dict[int, Any], kernel_killed: int
) -> None:
    """Leave a failure report for each rank that could not write one: killed, crashed, or silent.

    ``failures``: torchrun's own, by rank.
    ``kernel_killed``: how often the kernel killed for memory on this node meanwhile.
    """
    reported = {record["rank"] for record in run.failures(job, attempt)}
    for rank, failure in failures.items():
        if rank in reported:
            continue
        stacks = run.stacks_file(job, attempt, rank)
        state, cause = describe_end(failure.exitcode, stacks, kernel_killed)
        # torchrun notes whole seconds, too early by up to one; reports are put in order by time.
        seen_at = min(time.time(), failure.timestamp + 1)
        # A victim ended by the signal of a stop, or of torchrun after another rank failed.
        is_victim = failure.exitcode == -signal.SIGTERM
        run.add_failure(
            job, attempt, rank, state, EXIT_CODES[state], cause, is_victim, is_second_hand=True,
            is_abort=failure.exitcode == -signal.SIGABRT, at=time_of(seen_at),
        )  # fmt: skip
        say(f"rank {rank} (local {failure.local_rank}) on {socket.gethostname()}: {cause}")


def describe_end(exit_code: int, stacks: Path, kernel_killed: int) -> tuple[str, str]:
    """State and cause of a rank that did not report; a signal is a negative exit code."""
    if exit_code == -signal.SIGKILL and has_bytes(stacks):  # by end_locked
        return "HANG", f"no progress, with Python's own lock held; stacks: {stacks}"
    if exit_code == -signal.SIGKILL and kernel_killed > 0:
        return "FAILED", f"killed by the kernel: out of memory (host memory{memory_limit()})"
    if exit_code == -signal.SIGKILL:
        return "FAILED", "killed by SIGKILL (out of memory, or somebody's kill -9)"
    if exit_code < 0:
        return "FAILED", f"killed by {signal.Signals(-exit_code).name}"
    return "FAILED", f"exited without reporting a cause (code {exit_code})"


def note_agent(run: RunFolder, job: str, attempt: int, cause: str, code: int) -> None:
    """Leave this node's own failure report: no rank was started, or all were ended."""
    name = f"agent-{socket.gethostname()}"
    run.add_failure(job, attempt, name, "FAILED", code, cause, False, is_second_hand=True)
    say(f"error: {cause}")


def kernel_kills() -> int:
    """How often the kernel killed in this process's memory cgroup (v1 or v2); 0 if unknown."""
    total = 0
    for path in cgroup_files("memory", "memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError, ValueError):
            words = path.read_text().split()
            total += int(words[words.index("oom_kill") + 1])
    return total


def memory_limit() -> str:
    """``, limit 3,072 MiB``, or nothing."""
    for path in cgroup_files("memory", "memory.limit_in_bytes", "memory.max"):
        with contextlib.suppress(OSError, ValueError):
            return f", limit {int(path.read_text()) / 2**20:,.0f} MiB"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
