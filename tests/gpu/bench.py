"""What a check works with: runs of train.py, measurements in a process of their own, a verdict.

Nothing here imports torch: whatever does is a process, which is ended when its check is out of
time.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from trainstack.checkpoint.names import checkpoints
from trainstack.run.folder import RunFolder
from trainstack.storage import layout

ROOT = tiny.ROOT
SAID = 2000  # characters of a process's output that an error shows


class TimedOut(Exception):
    """A check, or a part of it, took longer than it may."""


@dataclass(frozen=True)
class Check:
    """A check by name: ``run`` gets a Bench, and says there what it measured and expected."""

    name: str
    run: Callable[["Bench"], None]
    seconds: float  # that it may take on a GPU
    needs_gpu: bool  # a CPU only shows that the check itself works
    is_timing: bool  # nothing else may run meanwhile

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


CHECKS: list[Check] = []  # in the order in which they are made


def check(seconds: float, needs_gpu: bool = False, is_timing: bool = False):
    """Enter a function as a check of its name."""

    def enter(run: Callable[["Bench"], None]) -> Callable:
        CHECKS.append(Check(run.__name__, run, seconds, needs_gpu, is_timing))
        return run

    return enter


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    seconds: float
    output: str
    peak_gb: float  # of host memory


@dataclass
class Run(Ended):
    """A run of train.py, and what it left."""

    folder: RunFolder
    told: list[dict[str, Any]]  # by inside.py

    def values(self, key: str) -> dict[int, float]:
        """Of metrics.jsonl, by step."""
        return tiny.metrics(self.folder.path.parent.parent, self.folder.path.name, key)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.folder.events() if event["event"] == name]

    def steps(self) -> list[dict[str, Any]]:
        lines = (self.folder.path / "samples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def all_told(self, key: str) -> list[Any]:
        return [line[key] for line in self.told if key in line]

    @property
    def state(self) -> str:
        return self.folder.status().get("state", "")

    def weights_hash(self) -> str:
        newest = checkpoints(self.folder.checkpoints)[0][1]
        return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


@dataclass
class Site:
    """What all checks share: a project folder with small models and data, and the device."""

    folder: Path
    device: str  # cuda or cpu
    card: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: dict[str, threading.Lock] = field(default_factory=dict)
    processes: set[int] = field(default_factory=set)  # groups of them, to be ended with the driver

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Make something that several checks need; the others wait for it."""
        with self.lock:
            own = self.made.setdefault(name, threading.Lock())
        with own:
            mark = self.folder / f"{name}.made"
            if not mark.exists():
                make()
                mark.touch()

    def end_all(self) -> None:
        for group in list(self.processes):
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)


class Bench:
    """One check at work."""

    def __init__(self, site: Site, name: str, ends_at: float):
        """``ends_at``: on the clock of time.monotonic."""
        self.site, self.name, self.ends_at = site, name, ends_at
        self.is_gpu = site.device == "cuda"
        self.folder = site.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.measured: dict[str, Any] = {}
        self.limits: dict[str, str] = {}
        self.missed: list[str] = []

    @contextlib.contextmanager
    def within(self, seconds: float):
        """Within it a process may take so long at most."""
        usual = self.ends_at
        self.ends_at = min(usual, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.ends_at = usual

    # --- The verdict

    def note(self, **values: Any) -> None:
        """Something measured that has no limit."""
        self.measured |= {name: rounded(value) for name, value in values.items()}

    def at_most(self, name: str, value: float, limit: float) -> None:
        self._judge(name, value, f"<= {limit:g}", value <= limit)

    def at_least(self, name: str, value: float, limit: float) -> None:
        self._judge(name, value, f">= {limit:g}", value >= limit)

    def equal(self, name: str, value: Any, expected: Any) -> None:
        self._judge(name, value, f"= {rounded(expected)}", value == expected)

    def _judge(self, name: str, value: Any, limit: str, holds: bool) -> None:
        self.note(**{name: value})
        self.limits[name] = limit
        if not holds:
            self.missed.append(f"{name} {rounded(value)}, not {limit}")

    # --- Processes

    def size(self, on_gpu: Any, on_cpu: Any) -> Any:
        """Of something that is small where there is no GPU."""
        return on_gpu if self.is_gpu else on_cpu

    def environment(self, device: str, **changes: str) -> dict[str, str]:
        found = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.folder),
            "TORCHINDUCTOR_CACHE_DIR": str(self.site.folder / "compiled"),
            "TRITON_CACHE_DIR": str(self.site.folder / "compiled" / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": self.size("4", "1"),
            "PROOF_STARTED": str(time.time()),
            "PYTHONSAFEPATH": "1",  # no file beside inside.py takes the name of a package
            **changes,
        }  # fmt: skip
        return found if device == "cuda" else {**found, "CUDA_VISIBLE_DEVICES": ""}

    def start(self, command: list, log: Path, environment: dict[str, str]) -> subprocess.Popen:
        with log.open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.site.processes.add(process.pid)
        return process

    def wait(self, process: subprocess.Popen, log: Path, started: float) -> Ended:
        """Until it ends; TimedOut, and it is killed with all that it started, if that is late."""
        pid = 0
        while not pid:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.monotonic() > self.ends_at:
                os.killpg(process.pid, signal.SIGKILL)
                os.wait4(process.pid, 0)
                process.returncode = -signal.SIGKILL
                raise TimedOut(f"{log.name}: {log.read_text()[-SAID:]}")
            time.sleep(0 if pid else 0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.site.processes.discard(process.pid)
        seconds, peak = time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9
        return Ended(process.returncode, seconds, log.read_text(errors="replace"), peak)

    def call(self, command: list, name: str, device: str = "", **changes: str) -> Ended:
        """Run a command to its end, whatever its code."""
        log, started = self.folder / f"{name}.log", time.monotonic()
        environment = self.environment(device or self.site.device, **changes)
        return self.wait(self.start(command, log, environment), log, started)

    def measure(self, name: str, *arguments: Any) -> dict[str, Any]:
        """What a function of measure.py gives, in a process of its own."""
        command = [sys.executable, "-m", "gpu.measure", name, self.site.device, *arguments]
        ended = self.call(command, "-".join(map(str, [name, *arguments])))
        if ended.code:
            raise RuntimeError(f"{name} ended with code {ended.code}: {ended.output[-SAID:]}")
        return json.loads(ended.output.splitlines()[-1])

    # --- Runs

    def model(self, name: str, **shape: Any) -> str:
        """A Llama of that shape with the tiny tokenizer, in the project's folder; its name."""

        def make() -> None:
            like = layout.model_folder(self.site.home, "tiny")
            content = {p.name: p.read_text() for p in like.iterdir() if p.name != "manifest.json"}
            config = {**json.loads(content["config.json"]), **shape}
            content["config.json"] = json.dumps(config)
            folder = layout.model_folder(self.site.home, name)
            tiny.publish(folder, content, kind="model", weight_bytes=0)

        self.site.once(f"model-{name}", make)
        return f"model.name={name}"

    def tokens(self, *settings: str) -> list[str]:
        """The settings, once there are tokens for them; TRAINED_ON decides which those are."""
        data = [s for s in settings if s.startswith(("data.", "model.name"))]
        key = hashlib.sha256(" ".join(data).encode()).hexdigest()[:12]
        command = [sys.executable, "-m", "trainstack", "prepare", "--home", self.site.home,
                   "--config", self.site.home / "config.yaml", *data]  # fmt: skip

        def make() -> None:
            ended = self.call(command, f"prepare-{key}", "cpu")
            if ended.code:
                raise RuntimeError(f"prepare: {ended.output[-SAID:]}")

        self.site.once(f"tokens-{key}", make)
        return list(settings)

    def command(self, run: str, *settings: str, fault: str = "") -> list:
        """The arguments of train.py."""
        home = self.site.home
        options = ["--home", home, "--config", home / "config.yaml"]
        options += ["--fault", fault] if fault else []
        return [*options, f"run.name={run}", *self.tokens(*settings)]

    def train(
        self, run: str, *settings: str, hooks: str = "", fault: str = "", device: str = "",
        before: tuple = (), code: int | None = 0,
    ) -> Run:  # fmt: skip
        """Train; ``hooks``: of inside.py; ``before``: what starts the script instead of Python.

        RuntimeError if it ends with another code; None: any will do.
        """
        run = f"{self.name}-{run}"
        script = ROOT / ("tests/gpu/inside.py" if hooks else "train.py")
        started = self.site.folder / f"{run}.told"
        arguments = self.command(run, *settings, fault=fault)
        ended = self.call(
            [sys.executable, *before, script, *arguments], run, device, PROOF_HOOKS=hooks,
            PROOF_TOLD=str(started),
        )  # fmt: skip
        if code is not None and ended.code != code:
            said = ended.output[-SAID:]
            raise RuntimeError(f"{run} ended with code {ended.code}, not {code}: {said}")
        return self.left(run, ended)

    def left(self, run: str, ended: Ended) -> Run:
        told = self.site.folder / f"{run}.told"
        lines = told.read_text().splitlines() if told.exists() else []
        folder = RunFolder(layout.run_folder(self.site.home, run))
        return Run(**vars(ended), folder=folder, told=[json.loads(line) for line in lines])


def make_site(folder: Path, device: str, card: str) -> Site:
    """The tiny model of the tests, its data, and texts of many lengths."""
    site = Site(folder, device, card)
    site.home.mkdir(parents=True)
    tiny.make_model(site.home)
    tiny.make_dataset(site.home)
    tiny.write_config(site.home)
    generator, lines = random.Random(7), []
    longest = 2048 if device == "cuda" else 96
    for _ in range(600):
        length = int(min(longest, generator.lognormvariate(0, 1) * longest / 6 + 8))
        start = generator.randrange(len(tiny.WORDS))
        words = [tiny.WORDS[(start + i) % len(tiny.WORDS)] for i in range(length)]
        lines.append(json.dumps({"text": " ".join(words)}))
    content = {"train.jsonl": "\n".join(lines) + "\n"}
    tiny.publish(layout.dataset_folder(site.home, "long", None), content, kind="dataset")
    return site


def rounded(value: Any) -> Any:
    """Numbers as people read them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value
