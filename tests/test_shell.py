"""The shell scripts against stub commands: golden command lines, hostile paths, truthful ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import tiny
from trainstack import places
from trainstack.runfolder import RunFolder

SCRIPTS = ["setup.sh", "download_data_model.sh", "submit.sh", "monitor.sh", "tests/run.sh"]
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$0" "$@" >>"{log}"
env >"{log}.env"
{body}
"""


@pytest.fixture
def site(home, tmp_path):
    """A checkout and a shared folder whose names would run a command, with stubs for Slurm."""
    return Site(home, tmp_path / 'it\'s a $(touch canary) "place"', tmp_path / "stubs")


class Site:
    def __init__(self, home: Path, root: Path, stubs: Path):
        self.checkout, self.shared, self.stubs = root / "check out", root / "shared", stubs
        shutil.copytree(
            home, self.shared / "trainstack", ignore=shutil.ignore_patterns("runs"), symlinks=True
        )
        tiny.make_checkout(self.checkout, self.shared, run__name="r")
        stubs.mkdir()
        self.stub("sbatch", "echo 4711")
        self.stub("squeue", "true")
        self.stub("scontrol", '[[ "$1" == show ]] && printf "n%s\\n" 1 2 || true')

    def stub(self, name: str, body: str) -> None:
        path = self.stubs / name
        path.write_text(STUB.format(log=self.stubs / f"{name}.log", body=body))
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.stubs / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, **changes: str) -> dict[str, str]:
        names = ("NPROC_PER_NODE", "MASTER_PORT", "OMP_NUM_THREADS")
        kept = {k: v for k, v in os.environ.items() if k not in names and "SLURM" not in k}
        path = f"{self.stubs}:{os.environ['PATH']}"
        return {**kept, "PATH": path, "SHARED_DIR": str(self.shared), **changes}

    def submit(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.checkout / "submit.sh", *arguments], cwd="/", text=True,
            capture_output=True, env=self.environment(**changes), timeout=60,
        )  # fmt: skip

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.shared / "trainstack" / "runs" / "r")


def only_error(result: subprocess.CompletedProcess) -> str:
    """The one error line; fails on a traceback or a second error."""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert result.stdout == ""
    return errors[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_is_its_header(script):
    result = subprocess.run(
        ["bash", tiny.ROOT / script, "--help"], capture_output=True, text=True, cwd="/"
    )
    assert result.returncode == 0
    assert "Usage: bash" in result.stdout
    header = (tiny.ROOT / script).read_text().split("\n\n")[0].splitlines()[2:]
    assert result.stdout.splitlines() == [
        line.removeprefix("#").removeprefix(" ") for line in header
    ]


@pytest.mark.parametrize("script", [s for s in SCRIPTS if not s.startswith("tests")])
def test_an_unknown_option_is_one_line_and_code_two(script):
    result = subprocess.run(
        ["bash", tiny.ROOT / script, "--nosuch"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "--nosuch" in only_error(result)


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        (["shellcheck", "-x"], [*SCRIPTS, "train.slurm", ".ci/run"]),
        (["shfmt", "-i", "2", "-ci", "-d"], [*SCRIPTS, "train.slurm", ".ci/run"]),
        (["ruff", "check"], ["."]),
        (["ruff", "format", "--check"], ["."]),
    ],
    ids=["shellcheck", "shfmt", "ruff check", "ruff format"],
)
def test_the_linters_find_nothing(tool, files):
    result = subprocess.run([*tool, *files], cwd=tiny.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_submitting_prints_the_job_id_alone_and_the_command_is_as_it_should_be(site):
    result = site.submit("--", "--nodes=2", "--gpus-per-node=h100:2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4711\n"
    run = site.run.path
    command = site.calls("sbatch")
    exported = command.pop(5).removeprefix("--export=").split(",")
    assert command == [
        str(site.stubs / "sbatch"), "--parsable", "--job-name=r", f"--output={run}/logs/%j.out",
        f"--chdir={run}", "--nodes=2", "--gpus-per-node=h100:2", f"{run}/code/train.slurm",
        str(run),
    ]  # fmt: skip
    assert {"PATH", "HOME"} <= set(exported)
    assert not (site.checkout / "canary").exists()
    assert not Path("/canary").exists()
    assert site.run.status()["state"] == "QUEUED"
    assert [e["job"] for e in site.run.events() if e["event"] == "submitted"] == ["4711"]


def test_no_token_goes_to_slurm_or_into_the_run_folder(site):
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_TOKEN", "MY_PASSWORD")
    environment = dict.fromkeys(secrets, "verysecret")
    assert site.submit(**environment, NCCL_DEBUG="INFO").returncode == 0
    exported = next(word for word in site.calls("sbatch") if word.startswith("--export="))
    assert "NCCL_DEBUG" in exported
    assert not [name for name in secrets if name in exported]
    for path in site.run.path.rglob("*"):
        assert not path.is_file() or b"verysecret" not in path.read_bytes(), path


def test_what_sbatch_says_comes_out_with_its_code_and_a_hint_and_nothing_is_left(site):
    site.stub("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 3")
    result = site.submit()
    assert result.returncode == 3
    assert "sinfo -s lists the partitions" in only_error(result)
    assert site.run.status() == {}


def test_a_cluster_name_behind_the_job_id_is_cut_off(site):
    site.stub("sbatch", "echo '4711;cluster'")
    assert site.submit().stdout == "4711\n"


def test_a_dry_run_prints_the_command_and_makes_nothing(site):
    result = site.submit("--dry-run", "--", "--nodes=2", "--gpus-per-node=0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sbatch --parsable --job-name=r ")
    assert not site.calls("sbatch")
    assert not site.run.path.exists()


def test_without_slurm_the_way_out_is_named(site):
    (site.stubs / "sbatch").unlink()
    for path in Path("/usr/bin").iterdir():  # all that this machine has, but for Slurm
        if not path.name.startswith("s") and not (site.stubs / path.name).exists():
            (site.stubs / path.name).symlink_to(path)
    for name in ("sed", "stat", "sha256sum", "sort", "sleep"):
        (site.stubs / name).symlink_to(f"/usr/bin/{name}")
    assert "no sbatch here; log in to the cluster, or use --local" in only_error(
        site.submit(PATH=str(site.stubs))
    )


def test_a_controller_that_does_not_answer_is_one_line(site):
    site.stub(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    result = site.submit()
    assert result.returncode == 1
    assert "Unable to contact slurm controller" in result.stderr
    assert not site.calls("sbatch")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["optim.lr=1"], 2, "did you mean optim.learning_rate?"),
        (["--config"], 2, "--config needs a file"),
        (["--config", "/nowhere.yaml"], 2, "/nowhere.yaml: no such file"),
        (["--local", "--", "--nodes=2"], 2, "--local runs without Slurm"),
        (["--", "--nodes=3", "--gpus-per-node=1"], 2, "x 3 processes; write"),
        (["data.name=org/none"], 1, "data set org/none is not here yet; run: bash download_data"),
        (["model.name=org/none"], 1, "model org/none is not here yet; run: bash download_data"),
        (["model.init=pretrained"], 1, "fetched without weights"),
        (["data.text_field=body"], 1, "tokens of tiny are not ready"),
        (
            ["train.global_batch_size=10000", "train.micro_batch_size=1"],
            2,
            "sequences of 32 tokens",
        ),
    ],
)
def test_what_can_be_known_here_is_said_here_in_one_line(site, arguments, code, message):
    result = site.submit(*arguments)
    assert result.returncode == code, result.stderr
    assert message in only_error(result)
    assert not site.calls("sbatch")
    assert not site.run.path.exists()


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to a folder"])
def test_a_run_folder_that_is_none_is_named_and_left_alone(site, kind):
    path = site.run.path
    path.parent.mkdir(exist_ok=True)
    if kind == "a file":
        path.write_text("mine")
    else:
        path.symlink_to(site.stubs if kind.endswith("folder") else "/nowhere")
    before = sorted(site.stubs.iterdir())
    result = site.submit()
    assert result.returncode == 1
    assert "is not a folder; move it away, or choose another run.name" in only_error(result)
    assert path.is_symlink() or path.read_text() == "mine"
    assert not [p for p in site.stubs.iterdir() if p not in before and "squeue" not in p.name]


def test_damaged_tokens_are_named(site):
    path = next((site.shared / "trainstack" / "tokens").glob("*/train.bin"))
    broken = bytearray(path.read_bytes())
    broken[100] ^= 1
    path.write_bytes(broken)
    assert "(train.bin: hash differs)" in only_error(site.submit())


def test_a_run_with_a_job_in_the_queue_is_not_given_to_another(site):
    assert site.submit().returncode == 0
    site.stub("squeue", "echo '4711 PENDING'")
    result = site.submit()
    assert result.returncode == 78
    assert "job 4711 (PENDING) already" in only_error(result)


def test_another_experiment_under_the_same_name_is_refused_with_the_difference(site):
    checkpoint = site.run.checkpoints / "checkpoint-5" / "training"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"identity": {"run.seed": 1}}))
    result = site.submit()
    assert result.returncode == 78
    assert "run.seed=1234 (the run has 1)" in only_error(result)


def test_the_run_keeps_code_settings_and_environment(site):
    assert site.submit("optim.learning_rate=0.5").returncode == 0
    kept = {str(p.relative_to(site.run.path / "code")) for p in site.run.path.glob("code/**/*.*")}
    names = {f"trainstack/{p.name}" for p in (tiny.ROOT / "trainstack").glob("*.py")}
    assert kept == {"train.py", "train.slurm", "requirements.txt", *names}
    assert "learning_rate: 0.5" in (site.run.path / "config.yaml").read_text()
    environment = json.loads((site.run.path / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert {"git_commit", "git_difference", "python"} <= set(environment)


def test_a_disk_that_is_too_small_is_told_with_both_numbers(site):
    manifest = places.model_folder(site.shared / "trainstack", "tiny") / "manifest.json"
    folder = manifest.parent
    content = {p.name: p.read_text() for p in folder.iterdir() if p != manifest}
    shutil.rmtree(folder)
    tiny.publish(folder, content, kind="model", weight_bytes=0, parameters=10**15)
    line = only_error(site.submit())
    assert re.search(r"has [\d,.]+ GB free, two checkpoints of tiny need 24,000,000\.0 GB", line)


# What follows runs train.slurm itself, as Slurm would: a copy, somewhere else.


def batch(site: Site, srun: str, attempt: int = 1, **changes: str) -> subprocess.Popen:
    assert site.run.path.exists() or site.submit().returncode == 0
    site.stub("srun", srun)
    spool = site.stubs / "slurm_script"
    shutil.copy2(site.run.path / "code" / "train.slurm", spool)
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8", "HF_TOKEN": "verysecret",
    }  # fmt: skip
    if attempt > 1:
        slurm["SLURM_RESTART_COUNT"] = str(attempt - 1)
    return subprocess.Popen(
        ["bash", spool, site.run.path], env=site.environment(**{**slurm, **changes}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", start_new_session=True,
    )  # fmt: skip


def write_status(site: Site, state: str) -> str:
    """A stub body that leaves the status as rank 0 would."""
    status = {"run": "r", "state": state, "job": "4711", "attempt": 1, "step": 5}
    return f"cat >'{site.stubs}/status' <<'E'\n{json.dumps(status)}\nE\n" + (
        f'cp "{site.stubs}/status" "$(dirname "$(cat "{site.stubs}/where")")/status.json"\n'
    )


def remember_place(site: Site) -> None:
    site.run.create()
    (site.stubs / "where").write_text(f"{site.run.path}/logs\n")


def test_the_launch_is_as_it_should_be(site):
    process = batch(site, "exit 1", attempt=2, SLURM_JOB_END_TIME="1999999999")
    process.communicate(timeout=60)
    run, home = site.run.path, site.shared / "trainstack"
    words = site.calls("srun")
    port = int(next(w for w in words if w.startswith("--rdzv-endpoint=n1:")).rpartition(":")[2])
    assert 20000 <= port < 30050
    assert words == [
        str(site.stubs / "srun"), "--kill-on-bad-exit=1", "--ntasks-per-node=1", "--export=ALL",
        "--cpus-per-task=8", f"{home}/venv/bin/python", "-m", "torch.distributed.run",
        "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-id=4711.2",
        f"--rdzv-endpoint=n1:{port}", "--nnodes=2", "--nproc-per-node=2", f"{run}/code/train.py",
        "--config", f"{run}/config.yaml", "--home", str(home), "--job", "4711", "--attempt", "2",
        "--stop-file", f"{run}/logs/4711.2.stop", "--expect-world-size", "4",
        "--ends-at", "1999999999",
    ]  # fmt: skip
    environment = (site.stubs / "srun.log.env").read_text()
    assert "verysecret" not in environment
    for wanted in ("HF_HUB_OFFLINE=1", "SLURM_EXPORT_ENV=ALL", "OMP_NUM_THREADS=4"):
        assert wanted in environment


def test_processes_per_node_and_the_end_of_the_job_may_come_from_elsewhere(site):
    site.stub("squeue", '[[ "$*" == *%e* ]] && echo 2030-01-01T00:00:00 || true')
    batch(site, "exit 1", NPROC_PER_NODE="3").communicate(timeout=60)
    words = site.calls("srun")
    assert "--nproc-per-node=3" in words
    assert words[words.index("--expect-world-size") + 1] == "6"
    assert int(words[words.index("--ends-at") + 1]) > 1893000000


def test_a_node_without_gpus_runs_two_processes(site):
    batch(site, "exit 1", SLURM_GPUS_ON_NODE="").communicate(timeout=60)
    assert "--nproc-per-node=2" in site.calls("srun")


def test_two_thousand_hosts_do_not_break_the_choice_of_the_first(site):
    site.stub("scontrol", 'for i in $(seq 1 2000); do printf "n%s\\n" "$i"; done')
    batch(site, "exit 1").communicate(timeout=60)
    assert any(word.startswith("--rdzv-endpoint=n1:") for word in site.calls("srun"))


@pytest.mark.parametrize("code", [0, 42])
def test_an_end_without_a_done_record_is_a_failure_whatever_srun_says(site, code):
    process = batch(site, f"exit {code}")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"r: FAILED at step 0: the processes ended with code {code}" in stderr
    assert site.run.status()["state"] == "FAILED"


@pytest.mark.parametrize(("state", "code"), [("DONE", 0), ("PAUSED", 75), ("DIVERGED", 79)])
def test_the_exit_code_is_that_of_the_status(site, state, code):
    assert site.submit().returncode == 0
    remember_place(site)
    process = batch(site, write_status(site, state) + "exit 1")
    process.communicate(timeout=60)
    assert process.returncode == code
    requeued = "requeue" in site.calls("scontrol")
    assert requeued == (state == "PAUSED")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_shell_asks_the_ranks_and_leaves_srun_alone(site, number):
    assert site.submit().returncode == 0
    remember_place(site)
    waits = f'touch "{site.stubs}/running"; for i in $(seq 100); do sleep 0.1; '
    waits += f'[[ ! -f "{site.stubs}/saved" ]] || break; done; '
    process = batch(site, waits + write_status(site, "PAUSED") + f'touch "{site.stubs}/finished"')
    deadline = time.monotonic() + 30
    while not (site.stubs / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    stop = site.run.logs / "4711.1.stop"
    while not stop.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stop.exists()
    assert process.poll() is None
    (site.stubs / "saved").touch()
    _, stderr = process.communicate(timeout=60)
    assert (site.stubs / "finished").exists(), stderr
    assert process.returncode == 75
    # After TERM Slurm itself cancels or requeues; asking again would fight it.
    assert ("requeue" in site.calls("scontrol")) == (number == signal.SIGUSR1)


def test_a_former_holder_that_slurm_no_longer_knows_is_replaced(site):
    assert site.submit().returncode == 0
    (site.run.path / "lease" / "1.json").write_text(
        json.dumps({"job": "77", "attempt": 1, "host": "x", "pid": 1, "process_started": "b/1"})
    )
    batch(site, "exit 1").communicate(timeout=60)
    assert site.calls("srun")[-2:] == ["--gone", "77"]
    (site.stubs / "srun.log").unlink()
    site.stub("squeue", '[[ "$*" == *%A* ]] && echo 77 || true')
    batch(site, "exit 1").communicate(timeout=60)
    assert "--gone" not in site.calls("srun")


def test_a_launch_that_breaks_leaves_a_failed_status_and_not_a_queued_one(site):
    site.stub("scontrol", "echo 'slurm_load_node error' >&2; exit 1")
    process = batch(site, "exit 0")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert site.run.status()["state"] == "FAILED"
    assert not site.calls("srun")


@pytest.mark.parametrize(
    ("options", "processes"),
    [(["--gres=gpu:3"], 3), (["--gpus-per-node=a100:3"], 3), (["-N", "3"], 3), (["-N3"], 3)],
)
def test_the_command_line_of_sbatch_wins_over_the_file(site, options, processes):
    line = only_error(site.submit("--", *options))
    assert f"x {processes} processes" in line


def test_a_run_that_lives_on_this_machine_is_left_alone(site):
    from trainstack.runfolder import Lease, Owner

    assert site.submit().returncode == 0
    before = (site.run.path / "config.yaml").read_text()
    Lease(site.run.path).take(Owner("local-this-test", 1))
    for arguments in ([], ["--local"]):
        result = site.submit("train.max_steps=99", *arguments)
        assert result.returncode == 78
        assert "is in the hands of job local-this-test" in only_error(result)
    assert (site.run.path / "config.yaml").read_text() == before


def test_the_monitor_tells_a_killed_run_from_a_living_one(site):
    site.run.create()
    from trainstack.runfolder import process_start

    def show(pid: int, host: str = os.uname().nodename) -> str:
        site.run.set_status("RUNNING", job="local-x", attempt=1, pid=pid, host=host, step=3)
        result = subprocess.run(
            ["bash", site.checkout / "monitor.sh"], capture_output=True, text=True,
            env=site.environment(),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert process_start(os.getpid())
    assert "RUNNING" in show(os.getpid())
    assert "KILLED" in show(2**22 + 1)


def test_the_monitor_names_the_runs_that_there_are(site):
    assert site.submit().returncode == 0
    result = subprocess.run(
        ["bash", site.checkout / "monitor.sh", "nosuch"], capture_output=True, text=True,
        env=site.environment(),
    )  # fmt: skip
    assert result.returncode == 1
    assert "no run nosuch; there are: r" in only_error(result)


# setup.sh, with a Python that only pretends to install.


class FakeMachine:
    """A copy of setup.sh with a python3 on the PATH that makes venvs and 'installs' as told."""

    def __init__(self, root: Path):
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir(parents=True)
        for name in ("setup.sh", "requirements.txt"):
            shutil.copy2(tiny.ROOT / name, root / name)
        self.python("3.12.0")

    def python(self, version: str, name: str = "python3") -> None:
        """A python that answers questions for its version, makes venvs, and notes its installs."""
        old = "1" if tuple(map(int, version.split("."))) < (3, 11) else "0"
        path = self.bin / name
        path.write_text(f"""#!/bin/bash
case "$*" in
  *"sys.version_info"*) exit {old} ;;
  *"python_version()"*) echo {version} ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo x >>"{self.root}/installs"; source "{self.root}/install" ;;
  -) cat >/dev/null; echo "Python {version}, pretended" ;;
esac
""")
        path.chmod(0o755)
        (self.root / "install").touch()

    def setup(self, *arguments: str, **changes: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.root), "MIN_FREE_GB": "0",
            "SHARED_DIR": str(self.root / "sha red"), **changes,
        }  # fmt: skip
        # No python3 of the machine, so that the stub's version is what counts.
        return subprocess.Popen(
            ["bash", self.root / "setup.sh", *arguments], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def installs(self) -> int:
        path = self.root / "installs"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def venv(self) -> Path:
        return self.root / "sha red" / "trainstack" / "venv"


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path / "m")


def end(process: subprocess.Popen) -> str:
    _, stderr = process.communicate(timeout=60)
    return stderr


def test_the_second_setup_changes_nothing(machine):
    assert "ready: Python 3.12.0, pretended" in end(machine.setup())
    assert "ready: Python 3.12.0, pretended" in end(machine.setup())
    assert machine.installs() == 1
    check = machine.setup("--check")
    assert end(check) == ""
    assert check.returncode == 0
    for name in ("models", "datasets", "tokens", "runs", "cache"):
        assert (machine.venv.parent / name).is_dir()


def test_a_failed_install_keeps_the_environment_of_before_and_the_next_one_repairs(machine):
    end(machine.setup())
    before = machine.venv.resolve()
    (machine.root / "requirements.txt").write_text("new\n")
    (machine.root / "install").write_text("echo 'ERROR: No matching distribution'; exit 1")
    failing = machine.setup()
    text = end(failing)
    assert failing.returncode == 1
    assert "No matching distribution" in text
    assert text.splitlines()[-1].startswith("setup.sh: error: installing failed")
    assert machine.venv.resolve() == before
    (machine.root / "install").write_text("")
    assert "ready" in end(machine.setup())
    assert machine.venv.resolve() != before


def test_a_network_that_is_gone_is_told_as_such(machine):
    (machine.root / "install").write_text("echo 'Temporary failure in name resolution'; exit 1")
    assert "the package index cannot be reached" in end(machine.setup())


def test_a_killed_install_is_repaired_by_the_next_at_once(machine):
    (machine.root / "install").write_text("sleep 30")
    killed = machine.setup()
    deadline = time.monotonic() + 20
    while not machine.installs() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    (machine.root / "install").write_text("")
    started = time.monotonic()
    assert "ready" in end(machine.setup())
    assert time.monotonic() - started < 15, "it waited for a lock whose owner is dead"


def test_two_at_once_install_once(machine):
    (machine.root / "install").write_text("sleep 1")
    first, second = machine.setup(), machine.setup()
    assert "ready" in end(first)
    assert "ready" in end(second)
    assert (first.returncode, second.returncode) == (0, 0)
    assert machine.installs() == 1


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"SHARED_DIR": "relative"}, 2, "SHARED_DIR=relative is no absolute path"),
        ({"PROJECT_NAME": "a/b"}, 2, "PROJECT_NAME=a/b is no plain folder name"),
        ({"ENV_TOOL": "pip"}, 2, "write venv, uv or conda"),
        ({"SHARED_DIR": "/proc/x"}, 1, "SHARED_DIR=/proc/x cannot be written"),
        ({"MIN_FREE_GB": "99999999"}, 1, "GB free, the environment needs 99999999 GB"),
        ({"ENV_TOOL": "conda"}, 1, "neither conda nor mamba is on the PATH"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(machine, changes, code, message):
    process = machine.setup(**changes)
    text = end(process)
    assert process.returncode == code
    assert message in text.splitlines()[-1]


def test_an_old_python_names_its_version_and_the_way_out(machine):
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        machine.python("3.8.10", name)
    text = end(machine.setup())
    assert "no Python >= 3.11 here (python3 is 3.8.10)" in text
    assert "install uv" in text


@pytest.mark.parametrize("tool", ["uv", "conda"])
def test_an_old_python_is_no_matter_where_uv_or_conda_bring_a_newer_one(machine, tool):
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        machine.python("3.8.10", name)
    machine.python("3.12.9", "newer")
    last = "${@: -1}" if tool == "uv" else "$4"
    (machine.bin / tool).write_text(
        f'#!/bin/bash\nmkdir -p "{last}/bin"; cp "{machine.bin}/newer" "{last}/bin/python"\n'
    )
    (machine.bin / tool).chmod(0o755)
    assert "ready: Python 3.12.9, pretended" in end(machine.setup())


def test_env_sh_lets_the_environment_win_and_survives_a_hostile_folder(machine):
    hostile = machine.root / "a $(touch canary) 'b' \"c\""
    end(machine.setup(SHARED_DIR=str(hostile)))
    show = 'source "$1/env.sh"; printf "%s\\n" "$TRAINSTACK_HOME"'
    for shared in (None, "/elsewhere"):
        environment = {"PATH": "/usr/bin:/bin"} | ({"SHARED_DIR": shared} if shared else {})
        result = subprocess.run(
            ["bash", "-c", show, "x", machine.root], env=environment, cwd=machine.root,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.stdout == f"{shared or hostile}/trainstack\n"
    assert not (machine.root / "canary").exists()
