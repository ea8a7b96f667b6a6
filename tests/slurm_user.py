"""A user of the test cluster: the commands of a checkout, and what the runs left."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lab import Trace, check_why
from slurm_cluster import SlurmCluster
from trainstack.run.folder import RunFolder

TWO_NODES = ("--", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4", "--time=10")
PAIR = ("--", "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2", "--time=10")
ONE = ("--", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=2", "--time=10")


class Site:
    """The commands of a user of the cluster."""

    def __init__(self, checkout: Path, cluster: SlurmCluster):
        self.checkout, self.cluster = checkout, cluster
        self.shared = checkout.parent
        self.environment = {
            **os.environ, **cluster.env(), "SHARED_DIR": str(self.shared), "NPROC_PER_NODE": "",
            "HF_TOKEN": "hf_thisMustNeverBeSeenAnywhere",
        }  # fmt: skip

    def submit(self, *arguments: str, fault: str = "") -> str:
        result = self.run("submit.sh", *arguments, TRAINSTACK_FAULT=fault)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"\d+\n", result.stdout), result.stdout
        return result.stdout.strip()

    def run(self, script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.checkout / script), *arguments], env={**self.environment, **changes},
            capture_output=True, text=True, timeout=120, cwd="/",
        )  # fmt: skip

    def why(self, run: str, row: str, *words: str) -> str:
        """What ``monitor.sh RUN --why`` says; it must be readable, and hold all ``words``."""
        return check_why(row, self.run("monitor.sh", run, "--why"), *words)

    def folder(self, run: str) -> RunFolder:
        return RunFolder(self.shared / "trainstack" / "runs" / run)

    def log(self, run: str, job: str) -> str:
        path = self.folder(run).logs / f"{job}.out"
        return path.read_text() if path.exists() else "(no log)"

    def wait_until(self, condition, what: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen"
            time.sleep(0.1)

    def trace(self, run: str) -> Trace:
        """What a run left, with the log of all its jobs."""
        logs = sorted(self.folder(run).logs.glob("*.out"))
        return Trace(self.folder(run), "".join(path.read_text() for path in logs))

    def steps(self, run: str) -> int:
        path = self.folder(run).path / "metrics.jsonl"
        return path.read_bytes().count(b'"loss"') if path.exists() else 0


def processes_of(run: str, *signs: str) -> Iterator[int]:
    """Processes of a run's job whose command line or environment holds all ``signs``."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        is_ours = any(f"runs/{run}/code/train.py" in word for word in command)
        if is_ours and all(sign in environment or sign in command for sign in signs):
            yield int(path.name)


def rank_process(run: str, rank: int) -> int:
    """The pid of one rank of a run."""
    return next(processes_of(run, f"RANK={rank}"))
