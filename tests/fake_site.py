"""A site for the scripts: a checkout under hostile names, and fakes of Slurm's commands."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import tiny
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.config.load import load
from trainstack.job.freeze import copy_code
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.storage.files import write_file
from trainstack.storage.manifest import write_manifest

BASH = shutil.which("bash")
TOOLS = (
    "awk", "bash", "cat", "chmod", "cp", "date", "df", "dirname", "env", "find", "git", "grep",
    "id", "ln", "ls", "mkdir", "mktemp", "mv", "nproc", "paste", "readlink", "rm", "sed", "sh",
    "sha256sum", "sleep", "sort", "stat", "tail", "timeout", "touch", "tr", "uname", "uniq", "wc",
)  # fmt: skip
HOSTILE = 'it\'s "a" $(touch canary) `touch canary` & é;#'
SECRET = "hf_thisMustNeverBeSeenAnywhere0"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_TOKEN", "OMP_API_KEY")
SCRIPTS = (
    "setup.sh", "download_data_model.sh", "submit.sh", "monitor.sh", "tests/run.sh", "tests/gpu.sh",
)  # fmt: skip


class Commands:
    """A folder for PATH: everyday tools, and fakes of what a site has, whose calls are kept."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "bin", folder / "calls"
        self.folder.mkdir()
        self.log.mkdir()
        for name in TOOLS:
            found = shutil.which(name)
            assert found, f"these tests need {name}"
            (self.folder / name).symlink_to(found)

    def add(self, name: str, body: str = "", path: Path | None = None) -> None:
        """A fake that keeps its arguments and environment, then does ``body``."""
        path = path or self.folder / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{BASH}\n{self.keep(name)}\n{body}\n")
        path.chmod(0o755)

    def keep(self, name: str) -> str:
        """Bash that keeps this call: arguments end in NUL, calls in RS."""
        log = shlex.quote(str(self.log / name))
        return f"{{ printf '%s\\0' \"$@\"; printf '\\036'; }} >>{log}; env -0 >{log}.environment"

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def calls(self, name: str) -> list[list[str]]:
        path = self.log / name
        calls = path.read_text().split("\x1e")[:-1] if path.exists() else []
        return [call.split("\0")[:-1] for call in calls]

    def environment(self, name: str) -> dict[str, str]:
        """The environment of the last call."""
        entries = (self.log / f"{name}.environment").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if entry)


class Site:
    """A user's checkout and shared folder under hostile names, and the commands of a cluster."""

    def __init__(self, folder: Path, home: Path):
        self.folder = folder
        self.checkout, self.shared = folder / f"checkout {HOSTILE}", folder / f"shared {HOSTILE}"
        self.home = self.shared / "trainstack"
        self.run_dir = self.home / "runs" / "first"
        shutil.copytree(home, self.home, symlinks=True, ignore=shutil.ignore_patterns("runs"))
        tiny.make_checkout(self.checkout, self.shared, run__name="first")
        self.python = self.home / "venv" / "bin" / "python"
        self.commands = Commands(folder)
        self.sbatch("echo 4711")
        for name in ("squeue", "sinfo", "scontrol", "srun"):
            self.commands.add(name)
        self.cwd = folder / "elsewhere"  # with files that Python must not take for its own modules
        self.cwd.mkdir()
        for name in ("json.py", "yaml.py"):
            (self.cwd / name).write_text(f"open({str(folder / 'canary')!r}, 'w')\n")
        self.environment = {
            "PATH": str(self.commands.folder), "HOME": str(folder), "LANG": "C.UTF-8",
            "SHARED_DIR": str(self.shared), **dict.fromkeys(SECRETS, SECRET),
        }  # fmt: skip

    def run(self, script: str, *arguments, cwd: Path | None = None, **changes: str | None):
        """``bash script ...`` in the folder of somebody else; None takes a variable away."""
        changed = {**self.environment, **changes}
        return subprocess.run(
            [BASH, self.checkout / script, *map(str, arguments)], capture_output=True, text=True,
            cwd=cwd or self.cwd, timeout=60,
            env={name: value for name, value in changed.items() if value is not None},
        )  # fmt: skip

    def sbatch(self, body: str, trial: str = "") -> None:
        """Let sbatch do ``body``, and ``trial`` where it is only to try the job."""
        self.commands.add("sbatch", f'case " $* " in *--test-only*) {trial}\nexit ;; esac\n{body}')

    def submissions(self) -> list[list[str]]:
        """The calls of sbatch that were no trial."""
        calls = self.commands.calls("sbatch")
        return [call for call in calls if "--test-only" not in call]

    def queue(self, *jobs: str) -> None:
        """Let squeue know of jobs, each ``id state``, between the banners of a site."""
        lines = [f"job|{'|'.join(job.split())}|1:00:00|None|gpu-07" for job in jobs]
        text = "\n".join(["Welcome; 12 RUNNING", *lines, "job of the day: clean /scratch"])
        self.commands.add("squeue", f"cat <<'EOF'\n{text}\nEOF")

    def submit(self, *arguments, **options) -> subprocess.CompletedProcess:
        return self.run("submit.sh", *arguments, **options)

    def make_checkpoint(self, step: int, **changes) -> None:
        """What a run of this configuration leaves, as far as submit.sh looks at it."""
        loaded = load(self.checkout / "config.yaml", [])
        (store,) = (p for p in (self.home / "tokens").iterdir() if not p.is_symlink())
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        saved = {**identity(loaded, store.name), **changed}
        folder = self.run_dir / "checkpoints" / f"checkpoint-{step}"
        (folder / STATE).parent.mkdir(parents=True)
        state = TrainState.at_start(saved, loaded.model_dump(), left_out=[], data_sets=1)
        state.step = step
        entry = write_file(folder / STATE, state.to_json())
        write_manifest(folder, {STATE: entry})

    def files(self) -> dict[Path, int]:
        """Everything in the shared folder, with the time of its last change."""
        return {path: path.stat().st_mtime_ns for path in self.shared.rglob("*")}


class Job(Site):
    """A submitted run, and the batch shell that Slurm starts of it, from a spool folder."""

    def __init__(self, folder: Path, home: Path):
        super().__init__(folder, home)
        self.run = RunFolder(self.run_dir)
        self.run.create()
        copy_code(self.checkout, self.run_dir / "code")
        shutil.copy(self.checkout / "config.yaml", self.run_dir / "config.yaml")
        spool = folder / "spool" / "job00077"
        spool.mkdir(parents=True)
        self.script = spool / "slurm_script"
        shutil.copy(self.checkout / "train.slurm", self.script)
        self.stop_file = self.run_dir / "logs" / "77.0.stop"
        self.release = folder / "release"
        self.commands.add("scontrol", "printf 'gpu-07\\ngpu-08\\n'")
        self.ranks(self.status("DONE"))
        self.environment |= {
            "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "first-5eed1e55",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
            "SLURM_JOB_END_TIME": "1900000000", "TMPDIR": str(folder),
        }  # fmt: skip

    def ranks(self, body: str) -> None:
        """What srun does when it starts the ranks; the job's other steps do nothing."""
        self.commands.add("srun", f'[[ " $* " == *" --attempt "* ]] || exit 0\n{body}')

    def launches(self) -> list[list[str]]:
        """The arguments of each srun that started ranks."""
        return [call for call in self.commands.calls("srun") if "--attempt" in call]

    def status(self, state: str, job: str = "") -> str:
        """Bash by which the fake ranks say how they ended, in the attempt that they were told."""
        text = '{"state": "%s", "job": "%s", "attempt": %s, "step": 9}'
        path = shlex.quote(str(self.run_dir / "status.json"))
        return (
            'words="$*"; job="${words#*--job }"; attempt="${words#*--attempt }"\n'
            f'printf \'{text}\' {state} "{job or "${job%% *}"}" "${{attempt%% *}}" >{path}'
        )

    def in_turn(self, *bodies: str) -> str:
        """Bash of fake ranks that do something else in each attempt."""
        cases = [f'*" --attempt {n} "*)\n{body}\n;;' for n, body in enumerate(bodies, start=1)]
        return 'case " $* " in\n' + "\n".join(cases) + "\n*) exit 99 ;;\nesac"

    def attempts(self) -> list[str]:
        """The attempts that were launched."""
        return [call[call.index("--attempt") + 1] for call in self.launches()]

    def start(self, **changes: str | None) -> subprocess.Popen:
        changed = {**self.environment, **changes}
        self.process = subprocess.Popen(
            [BASH, self.script, self.run_dir], cwd=self.run_dir, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={name: value for name, value in changed.items() if value is not None},
        )  # fmt: skip
        return self.process

    def wait(self, **changes: str | None) -> tuple[int, str]:
        """Exit code and stderr of the batch shell."""
        process = self.start(**changes)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def command(self) -> list[str]:
        (call,) = self.launches()
        return call

    def value(self, option: str) -> str:
        """The value of an option in the command of srun, written with a space or with =."""
        call = self.command()
        if option in call:
            return call[call.index(option) + 1]
        (word,) = [word for word in call if word.startswith(f"{option}=")]
        return word.partition("=")[2]


def complaint(result: subprocess.CompletedProcess, code: int, script: str = "submit.sh") -> str:
    """The one line of an error; fails where there is more, less, a traceback or another code."""
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}: error: ")
    return lines[0]


def end_group(process: subprocess.Popen) -> None:
    """End what a test started and what that left behind, also where the test failed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
