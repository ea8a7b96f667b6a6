"""Runs that are broken on purpose: jobs of submit.sh --local on real ranks, and what they left."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import tiny
from trainstack.checkpoint.names import checkpoints
from trainstack.run.folder import RunFolder
from trainstack.storage import layout

SETTINGS = {
    "train__max_steps": 60,
    "checkpoint__save_steps": 10,
    "eval__eval_steps": 30,
}


class Lab:
    """A checkout, a project folder, and one user of both."""

    def __init__(self, home: Path, shared: Path, **settings):
        self.shared, self.checkout = shared, shared / "checkout"
        self.home = shared / "trainstack"
        shutil.copytree(home, self.home, symlinks=True, ignore=shutil.ignore_patterns("runs"))
        tiny.make_checkout(self.checkout, shared, **{**SETTINGS, **settings})

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            **os.environ, "SHARED_DIR": str(self.shared), "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "2", **changes,
        }  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        return ["bash", str(self.checkout / "submit.sh"), "--local", *arguments]

    def train(
        self, run: str, *overrides: str, fault: str = "", code: int = 0, **changes: str
    ) -> "Trace":
        """Train with faults until the job ends; its exit code must be ``code``."""
        environment = self.environment(TRAINSTACK_FAULT=fault, **changes)
        done = subprocess.run(
            self.command(f"run.name={run}", *overrides), env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stdout[-6000:]
        return self.trace(run, done.stdout)

    def start(self, run: str, *overrides: str, fault: str = "", **changes: str):
        """The same in the background, in a process group of its own."""
        return subprocess.Popen(
            self.command(f"run.name={run}", *overrides),
            env=self.environment(TRAINSTACK_FAULT=fault, **changes), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def why(self, run: str, row: str, *words: str) -> str:
        """What ``monitor.sh RUN --why`` says; it must be readable, and hold all ``words``."""
        command = ["bash", str(self.checkout / "monitor.sh"), run, "--why"]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=60
        )
        return check_why(row, done, *words)

    def trace(self, run: str, output: str = "") -> "Trace":
        return Trace(RunFolder(layout.run_folder(self.home, run)), output)


@dataclass
class Trace:
    """What a run left: enough to say what its interruptions cost."""

    run: RunFolder
    output: str

    def events(self, *names: str) -> list[dict]:
        return [event for event in self.run.events() if event["event"] in names]

    def losses(self) -> dict[int, float]:
        return tiny.metrics(self.run.path.parent.parent, self.run.path.name)

    def weights_hash(self) -> str:
        newest = checkpoints(self.run.checkpoints)[0][1]
        return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()

    def steps(self) -> list[dict]:
        """Every executed step that was recorded, in order of time."""
        path = self.run.path / "samples.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def redone(self) -> int:
        """Steps that had to be executed again, as far as they were recorded before."""
        return len(self.steps()) - len({record["step"] for record in self.steps()})

    def recovery_seconds(self) -> list[float]:
        """From the last recorded step of an attempt to the first of the next."""
        steps = self.steps()
        pairs = zip(steps, steps[1:], strict=False)
        return [b["at"] - a["at"] for a, b in pairs if a["attempt"] != b["attempt"]]

    def ledger(self) -> str:
        """What the ledger says; fails if a sample was repeated or skipped."""
        result = tiny.run_command("ledger", self.run.path, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "repeated = 0, skipped = 0" in result.stdout
        return result.stdout

    def equals(self, reference: "Trace") -> bool:
        """Whether all losses and the final weights are the same to the last bit."""
        same_losses = self.losses() == reference.losses()
        return same_losses and self.weights_hash() == reference.weights_hash()

    def record(self, row: str, fault: str, reference: "Trace", message: str, code: int = 0):
        """Check the promises, and leave the row's measured figures for doc/fault-matrix.md."""
        is_equal = self.equals(reference)
        assert is_equal, f"{row}: losses or weights differ from those of a run left alone"
        self.ledger()
        write_row(row, fault=fault, redone=self.redone(), repeated=0, skipped=0,
                  identical=is_equal, seconds=max(self.recovery_seconds(), default=0.0),
                  code=code, message=message)  # fmt: skip


def write_row(row: str, **facts) -> None:
    """Append a row of the fault matrix to the file that FAULT_MATRIX names, if it does."""
    path = os.environ.get("FAULT_MATRIX")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"row": row, **facts}) + "\n")


def check_why(row: str, done: subprocess.CompletedProcess, *words: str) -> str:
    """A post-mortem holds all ``words`` and fits a screen; FAULT_WHY names a file that keeps it."""
    text = done.stdout
    if path := os.environ.get("FAULT_WHY"):
        with open(path, "a") as file:
            file.write(f"{row}\n{text}\n")
    assert not done.stderr, done.stderr
    lines = text.splitlines()
    assert 1 <= len(lines) <= 15 and max(map(len, lines)) <= 110, text
    said = " ".join(text.split())
    assert not [word for word in words if word not in said], f"{row}: {words}\n{text}"
    return said


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)
