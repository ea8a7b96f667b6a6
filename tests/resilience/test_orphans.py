"""No rank outlives what started it: an orphan would hold the GPU and write into the run folder."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import tiny
from trainstack.run.folder import RunFolder

MARKER = "TRAINSTACK_TEST_MARKER"
GRACE_SECONDS = 3


def marked(value: str) -> dict[int, str]:
    """Live processes that inherited this marker: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if f"{MARKER}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = command
    return found


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_killed_torchrun_leaves_no_rank_behind(home, tmp_path):
    """torchrun starts ranks in sessions of their own: nothing but the kernel ends them with it."""
    value, run = uuid.uuid4().hex, RunFolder(home / "runs/orphans")
    command = tiny.train_command(home, 2, "run.name=orphans", "train.max_steps=1000000")
    with (tmp_path / "output").open("w") as output:
        torchrun = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT,
            env=tiny.environment(**{MARKER: value}),
        )  # fmt: skip
    try:
        is_training = wait_for((run.path / "metrics.jsonl").exists, seconds=120)
        assert is_training, (tmp_path / "output").read_text()[-3000:]
        ranks = marked(value).keys() - {torchrun.pid}
        assert len(ranks) >= 2
        torchrun.send_signal(signal.SIGKILL)
        torchrun.wait()
        wait_for(lambda: not marked(value), GRACE_SECONDS)
        assert marked(value) == {}
    finally:
        for pid in marked(value):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        torchrun.wait()
