"""The scripts against fake Slurm commands: golden command lines, hostile paths, no secret told."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.config.load import load
from trainstack.job.freeze import copy_code
from trainstack.job.resources import read_resources
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.run.lease import Lease, Owner
from trainstack.run.states import EXIT_CODES
from trainstack.storage.files import write_file
from trainstack.storage.manifest import write_manifest

BASH = shutil.which("bash")
TOOLS = (
    "awk", "bash", "cat", "chmod", "cp", "date", "df", "dirname", "env", "git", "grep", "id", "ln",
    "ls", "mkdir", "mktemp", "mv", "nproc", "readlink", "rm", "sed", "sh", "sha256sum", "sleep",
    "stat", "tail", "touch", "tr", "uname",
)  # fmt: skip
HOSTILE = 'it\'s "a" $(touch canary) `touch canary` & é;#'
SECRET = "hf_thisMustNeverBeSeenAnywhere0"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_TOKEN", "OMP_API_KEY")
SCRIPTS = ("setup.sh", "download_data_model.sh", "submit.sh", "monitor.sh", "tests/run.sh")


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
        shutil.copytree(home, self.home, ignore=shutil.ignore_patterns("runs"))
        tiny.make_checkout(self.checkout, self.shared, run__name="first")
        self.python = self.home / "venv" / "bin" / "python"
        self.commands = Commands(folder)
        self.commands.add("sbatch", "echo 4711")
        for name in ("squeue", "scontrol", "srun"):
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

    def submit(self, *arguments, **options) -> subprocess.CompletedProcess:
        return self.run("submit.sh", *arguments, **options)

    def make_checkpoint(self, step: int, **changes) -> None:
        """What a run of this configuration leaves, as far as submit.sh looks at it."""
        loaded = load(self.checkout / "config.yaml", [])
        (store,) = (self.home / "tokens").iterdir()
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


@pytest.fixture
def site(tmp_path, home):
    """Whatever a test does: nothing in a name was run, and no secret stands in any file."""
    site = Site(tmp_path, home)
    yield site
    assert not list(tmp_path.rglob("canary"))
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".environment":
            assert SECRET.encode() not in path.read_bytes(), path


def complaint(result: subprocess.CompletedProcess, code: int, script: str = "submit.sh") -> str:
    """The one line of an error; fails where there is more, less, a traceback or another code."""
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}: error: ")
    return lines[0]


# --- submit.sh


def test_submit_prints_the_job_id_alone_and_says_the_rest_on_stderr(site):
    result = site.submit()
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4711\n"
    lines = result.stderr.splitlines()
    assert all(line.startswith("submit.sh: ") for line in lines)
    assert "config.yaml ok | model and tokens present and verified | " in lines[0]
    assert "1 node x 1 GPUs, 24:00:00, partition (default) | code and config kept in" in lines[1]
    assert "run first is queued; look: bash monitor.sh first" in lines[2]
    run = RunFolder(site.run_dir)
    assert run.status()["state"] == "QUEUED"
    assert [(event["event"], event["job"]) for event in run.events()] == [("submitted", "4711")]


def golden(site: Site, *sbatch_options: str) -> list[str]:
    """The arguments of sbatch but for --export, whose names come in any order."""
    return [
        "--parsable", "--job-name=first", f"--output={site.run_dir}/logs/%j.out",
        f"--chdir={site.run_dir}", *sbatch_options, f"{site.run_dir}/code/train.slurm",
        str(site.run_dir),
    ]  # fmt: skip


def without_export(call: list[str]) -> list[str]:
    return [word for word in call if not word.startswith("--export=")]


def exported(call: list[str]) -> set[str]:
    """The names of the variables that a job gets."""
    (names,) = [word.partition("=")[2] for word in call if word.startswith("--export=")]
    return set(names.split(","))


def test_sbatch_gets_exactly_these_arguments_also_where_paths_are_hostile(site):
    options = ["--nodes=4", "--gpus-per-node=1", "--comment=two words; $(touch canary)"]
    assert site.submit("--", *options).returncode == 0
    (call,) = site.commands.calls("sbatch")
    assert without_export(call) == golden(site, *options)


def test_a_job_sees_the_names_on_the_list_and_never_a_secret(site):
    fault = "kill:rank=1,step=25;nan:step=30"
    result = site.submit(
        NCCL_DEBUG="INFO", OMP_PLACES="cores", EDITOR="vi", PYTHONPATH="/x", TRAINSTACK_FAULT=fault
    )
    assert result.returncode == 0, result.stderr
    (call,) = site.commands.calls("sbatch")
    usual = {"HOME", "LANG", "MODULES", "NCCL_DEBUG", "OMP_PLACES", "PATH"}
    assert exported(call) == {*usual, "TRAINSTACK_FAULT"}
    assert site.commands.environment("sbatch")["TRAINSTACK_FAULT"] == fault


def test_a_dry_run_prints_the_command_of_the_job_and_changes_nothing(site):
    site.run("setup.sh", "--check")
    before = site.files()
    result = site.submit("--dry-run", "--", "--time=5")
    assert result.returncode == 0, result.stderr
    assert site.files() == before
    assert site.commands.calls("sbatch") == []
    words = words_of(result.stdout)
    assert words[0] == "sbatch"
    assert without_export(words[1:]) == golden(site, "--time=5")


def words_of(line: str) -> list[str]:
    """What bash makes of a line that a person would paste."""
    parse = ["bash", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(parse, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_a_dry_run_on_this_machine_prints_its_command_too(site):
    result = site.submit("--dry-run", "--local")
    assert result.returncode == 0, result.stderr
    assert "code/train.slurm" in result.stdout
    assert not site.run_dir.exists()


def golden_chain(site: Site, *sbatch_options: str) -> list[str]:
    """The arguments of each sbatch of a chain, but for --export."""
    digest = hashlib.sha256(f"{site.run_dir}\n".encode()).hexdigest()[:8]
    words = golden(site, *sbatch_options, "--no-requeue", "--dependency=singleton")
    return ["--parsable", f"--job-name=first-{digest}", *words[2:]]


NUMBERED = """n="$(cat ids 2>/dev/null || echo 4710)"; echo "$((n + 1))" >ids; cat ids"""


def test_a_chain_is_jobs_of_one_name_of_which_each_waits_for_the_one_before(site):
    site.commands.add("sbatch", NUMBERED)
    result = site.submit("--chain", "3", "--", "--time=1:00:00")
    assert (result.returncode, result.stdout) == (0, "4711\n"), result.stderr
    calls = site.commands.calls("sbatch")
    assert [without_export(call) for call in calls] == [golden_chain(site, "--time=1:00:00")] * 3
    assert all("TRAINSTACK_CHAIN" in exported(call) for call in calls)
    assert site.commands.environment("sbatch")["TRAINSTACK_CHAIN"] == "1"
    name = calls[0][1].partition("=")[2]
    last = result.stderr.splitlines()[-1]
    assert f"then follow, one after the other: 4712 4713; to end all: scancel --name={name}" in last
    events = [(event["event"], event["job"]) for event in RunFolder(site.run_dir).events()]
    assert events == [("submitted", "4711"), ("submitted", "4712"), ("submitted", "4713")]
    assert RunFolder(site.run_dir).status()["state"] == "QUEUED"


def test_the_chains_of_two_projects_with_one_run_name_do_not_wait_for_each_other(site):
    other = {"PROJECT_NAME": "other"}
    shutil.copytree(site.home, site.shared / "other", ignore=shutil.ignore_patterns("runs"))
    for names in ({}, {}, other):
        result = site.submit("--chain=2", **names)
        assert result.returncode == 0, result.stderr
    names = [call[1] for call in site.commands.calls("sbatch")]
    assert names[0] == names[1] == names[2] == names[3] != names[4] == names[5]
    assert all(re.fullmatch(r"--job-name=first-[0-9a-f]{8}", name) for name in names)


def test_without_chain_no_job_believes_that_others_wait_behind_it(site):
    assert site.submit(TRAINSTACK_CHAIN="1").returncode == 0
    (call,) = site.commands.calls("sbatch")
    assert "TRAINSTACK_CHAIN" not in exported(call)


def test_a_dry_run_of_a_chain_prints_every_command_and_submits_nothing(site):
    result = site.submit("--dry-run", "--chain", "2", "--", "--time=5")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second
    assert words_of(first)[:2] == ["TRAINSTACK_CHAIN=1", "sbatch"]
    assert without_export(words_of(first)[2:]) == golden_chain(site, "--time=5")
    assert site.commands.calls("sbatch") == []
    assert not site.run_dir.exists()


def test_a_second_submit_is_refused_while_any_job_of_a_chain_waits(site):
    site.commands.add("sbatch", NUMBERED)
    assert site.submit("--chain", "3").returncode == 0
    for alive, named in (
        (
            "4711 RUNNING\\n4712 PENDING\\n4713 PENDING",
            "4711 (RUNNING), 4712 (PENDING), 4713 (PEND",
        ),
        ("4713 PENDING", "4713 (PENDING)"),
        ("4712 RUNNING", "4712 (RUNNING)"),
    ):
        site.commands.add("squeue", f"printf '12 RUNNING\\n{alive}\\n'")
        for arguments in ([], ["--chain", "2"]):
            line = complaint(site.submit(*arguments), 78)
            assert f"run first has job {named}" in line
            assert line.endswith("scancel " + " ".join(re.findall(r"471\d", alive)))
    assert len(site.commands.calls("sbatch")) == 3
    site.commands.add("squeue", "echo 12 RUNNING")
    assert site.submit().stdout == "4714\n"


def test_a_chain_that_sbatch_breaks_off_says_which_jobs_there_are(site):
    refusal = "echo 'sbatch: error: job submit limit' >&2; exit 3"
    site.commands.add(
        "sbatch", f"[[ ! -e ids || $(<ids) != 4712 ]] || {{ {refusal}; }}; {NUMBERED}"
    )
    result = site.submit("--chain", "4")
    assert (result.returncode, result.stdout) == (3, "4711\n")
    last = result.stderr.splitlines()[-1]
    assert "error: sbatch refused job 3 of 4: sbatch: error: job submit limit" in last
    assert "; in the queue are already 4711 4712; to end them: scancel --name=first-" in last
    run = RunFolder(site.run_dir)
    assert [event["job"] for event in run.events()] == ["4711", "4712"]
    assert run.status()["state"] == "QUEUED"


def test_a_chain_that_sbatch_refuses_at_once_leaves_nothing_behind(site):
    site.commands.add("sbatch", "exit 3")
    result = site.submit("--chain", "4")
    assert (result.returncode, result.stdout) == (3, "")
    assert "sbatch refused job 1 of 4" in result.stderr
    assert "in the queue" not in result.stderr
    assert RunFolder(site.run_dir).status() == {}


def test_the_cluster_that_sbatch_names_is_no_part_of_the_job_id(site):
    site.commands.add("sbatch", "echo '4711;east'")
    assert site.submit().stdout == "4711\n"
    assert [event["job"] for event in RunFolder(site.run_dir).events()] == ["4711"]


REFUSALS = {
    "Batch job submission failed: Invalid partition name specified": "sinfo -s lists the",
    "Invalid account or account/partition combination specified": "#SBATCH --account=NAME",
    "Requested time limit is invalid (missing or exceeds some limit)": "#SBATCH --time",
    "Requested node configuration is not available": "fewer nodes, GPUs or cores",
    "Invalid generic resource (gres) specification": "no such GPUs here",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_of_sbatch_gets_a_hint(site, reason):
    script = ["-c", 'source "$1"; hint "$2"', "bash", site.checkout / "submit.sh", reason]
    result = subprocess.run(
        [BASH, *script], capture_output=True, text=True, env=site.environment, cwd=site.cwd
    )  # without USER, as in many containers
    assert result.stderr == ""
    assert REFUSALS[reason] in result.stdout


def test_what_sbatch_refuses_is_one_line_with_its_reason_and_a_hint(site):
    reason = "sbatch: error: invalid partition specified: x\\nsbatch: error: and more"
    site.commands.add("sbatch", f"printf '{reason}\\n' >&2; exit 3")
    result = site.submit()
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.count("error: sbatch refused") == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("submit.sh: error: sbatch refused the job: sbatch: error: invalid part")
    assert "and more" in last
    assert "(sinfo -s lists the partitions; put yours into train.slurm)" in last


def test_a_refused_job_leaves_the_status_of_before(site):
    site.commands.add("sbatch", "exit 3")
    assert site.submit().returncode == 3
    assert RunFolder(site.run_dir).status() == {}
    RunFolder(site.run_dir).set_status("PAUSED", step=7, job="12")
    before = (site.run_dir / "status.json").read_text()
    assert site.submit().returncode == 3
    assert json.loads((site.run_dir / "status.json").read_text()) == json.loads(before)
    assert RunFolder(site.run_dir).events() == []


def test_without_sbatch_the_way_out_is_named(site):
    site.commands.remove("sbatch")
    assert "no sbatch here; log in to the cluster, or use --local" in complaint(site.submit(), 1)


def test_a_slurm_that_does_not_answer_is_quoted_on_one_line(site):
    site.commands.add("squeue", "printf 'slurm_load_jobs error: no contact\\nmore\\n' >&2; exit 1")
    line = complaint(site.submit(), 1)
    assert "Slurm does not answer: slurm_load_jobs error: no contact; try again" in line
    assert site.commands.calls("sbatch") == []


def test_a_queue_of_twenty_thousand_jobs_is_no_obstacle(site):
    """One argument of a command may have 128 KiB on Linux; this queue has 300."""
    site.commands.add("squeue", "for ((i = 100000; i < 120000; i++)); do echo $i PENDING; done")
    result = site.submit()
    assert result.stdout == "4711\n", result.stderr


def test_an_environment_that_is_not_ready_is_named_with_the_command_that_makes_it(site):
    (site.home / "venv" / ".pins").unlink()
    assert "not ready; run: bash setup.sh" in complaint(site.submit(), 1)


WRONG_USE = [
    (["--nodes=4"], "--nodes=4 is not an option of submit.sh; options for sbatch come after --"),
    (["--config"], "--config needs a file"),
    (["--local", "--", "--nodes=2", "-t 5"], "leave out: --nodes=2 -t 5"),
    (["--chain"], "--chain needs a number of jobs, such as --chain 4"),
    (["--chain="], "--chain  is not a number of jobs from 2 to 999; write --chain 4"),
    (["--chain", "1"], "--chain 1 is not a number of jobs from 2 to 999; write --chain 4"),
    (["--chain=two"], "--chain two is not a number of jobs"),
    (["--chain", "1000"], "--chain 1000 is not a number of jobs"),
    (["--chain", "--dry-run"], "--chain --dry-run is not a number of jobs"),
    (["--chain", "3", "--local"], "--local has no time limit and needs no chain"),
    (["--chain", "3", "--", "--nodes=2", "--requeue"], "leave out: --requeue"),
    (["--chain", "3", "--", "-J", "mine"], "leave out: -J"),
    (["--chain", "3", "--", "--dependency=afterok:5"], "leave out: --dependency=afterok:5"),
    (["nonsense"], "nonsense (command line): not a setting; write section.key=value"),
    (["run.name=$(touch canary)"], "not a plain name"),
    (["run.name=../../up"], "not a plain name"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: no such file; name one with --config FILE"),
    (["train.global_batch_size=9", "train.micro_batch_size=3", "--", "-N2"], "no multiple of"),
    (["--", "--nodes=3", "--gpus-per-node=h100:8"], "x 24 processes; write train.global_batch"),
    (["--", "--nodes=0"], "0 processes cannot train"),
]


@pytest.mark.parametrize(("arguments", "fix"), WRONG_USE, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_use_is_one_line_before_the_queue(site, arguments, fix):
    assert fix in complaint(site.submit(*arguments), 2)
    assert site.commands.calls("sbatch") == []
    assert not site.run_dir.exists()


SPELLINGS = [
    # options after -- -> nodes and GPUs per node, over train.slurm's one of each
    ("", 1, 1),
    ("--nodes=3", 3, 1),
    ("--nodes 3", 3, 1),
    ("-N3", 3, 1),
    ("-N 3 --nodes=4", 4, 1),
    ("--nodes=2-4", None, 1),
    ("--gpus-per-node=3", 1, 3),
    ("--gpus-per-node a100:3", 1, 3),
    ("--gres=gpu:3", 1, 3),
    ("--gres=gpu:a100:3", 1, 3),
    ("--gpus=8", 1, None),
]


@pytest.mark.parametrize(("options", "nodes", "gpus"), SPELLINGS)
def test_what_the_job_asks_for_is_read_in_every_spelling_of_sbatch(options, nodes, gpus):
    found = read_resources(tiny.ROOT / "train.slurm", options.split())
    assert (found.nodes, found.gpus_per_node) == (nodes, gpus)
    assert (found.time, found.processes_per_node) == ("24:00:00", 0)


def test_several_mistakes_are_told_together_under_one_head(site):
    result = site.submit("train.micro_batchsize=8", "optim.learning_rate=2e-5x")
    assert result.returncode == 2
    head, *problems = result.stderr.splitlines()
    assert head == "submit.sh: error: 2 problems in the configuration, nothing was submitted"
    assert len(problems) == 2


def test_a_number_of_processes_that_is_none_is_refused(site):
    line = complaint(site.submit(NPROC_PER_NODE="two"), 2)
    assert "NPROC_PER_NODE=two is not a number of processes" in line


def test_the_processes_that_train_slurm_was_edited_for_count_in_the_arithmetic(site):
    script = site.checkout / "train.slurm"
    edited = script.read_text().replace('"${NPROC_PER_NODE:-}"', '"${NPROC_PER_NODE:-3}"')
    script.write_text(edited)
    assert "micro_batch_size=2 x 3 processes" in complaint(site.submit(), 2)
    assert site.submit(NPROC_PER_NODE="2").returncode == 0


def test_a_config_file_is_found_from_the_folder_of_the_user(site):
    shutil.copy(site.checkout / "config.yaml", site.cwd / "my own.yaml")
    result = site.submit("--config", "my own.yaml", "run.name=other")
    assert result.stdout == "4711\n", result.stderr
    assert "my own.yaml ok" in result.stderr
    assert (site.home / "runs" / "other" / "config.yaml").exists()


def test_a_second_submit_is_refused_while_the_job_of_the_first_waits(site):
    assert site.submit().returncode == 0
    site.commands.add("squeue", "printf '12 RUNNING\\n4711 PENDING\\n'")
    line = complaint(site.submit(), 78)
    assert "run first has job 4711 (PENDING) already; wait for it, or end it: scancel 4711" in line
    assert len(site.commands.calls("sbatch")) == 1


def test_a_run_in_the_hands_of_a_live_job_is_refused_and_of_a_dead_one_continued(site):
    RunFolder(site.run_dir).create()
    holder = {"job": "55", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (site.run_dir / "lease" / "1.json").write_text(json.dumps(holder))
    site.commands.add("squeue", "echo 55 RUNNING")
    assert "in the hands of job 55; wait for it" in complaint(site.submit(), 78)
    site.commands.add("squeue", "echo 56 RUNNING")
    assert site.submit().stdout == "4711\n"


def test_a_run_that_lives_on_this_machine_is_left_alone(site):
    assert site.submit().returncode == 0
    before = (site.run_dir / "config.yaml").read_text()
    Lease(site.run_dir).take(Owner("local-this-test", 1))
    for arguments in ([], ["--local"]):
        line = complaint(site.submit("train.max_steps=99", *arguments), 78)
        assert "is in the hands of job local-this-test" in line
    assert (site.run_dir / "config.yaml").read_text() == before


def test_a_local_run_is_refused_while_a_job_of_slurm_works_on_it(site):
    assert site.submit().returncode == 0
    site.commands.add("squeue", "echo 4711 RUNNING")
    assert "run first has job 4711 (RUNNING) already" in complaint(site.submit("--local"), 78)


def test_settings_of_another_experiment_are_refused_with_the_difference(site):
    site.make_checkpoint(5, run__seed=99)
    line = complaint(site.submit(), 78)
    assert "run first cannot continue with run.seed=1234 (the run has 99); put it back, or" in line


def test_a_setting_that_may_change_continues_the_run(site):
    site.make_checkpoint(5)
    assert site.submit("optim.learning_rate=0.5").stdout == "4711\n"
    kept = load(site.run_dir / "config.yaml", [])
    assert kept.optim.learning_rate == 0.5


def test_a_complete_run_says_so_and_submits_nothing(site):
    site.make_checkpoint(20)
    RunFolder(site.run_dir).set_status("DONE", step=20)
    result = site.submit()
    assert (result.returncode, result.stdout) == (0, "")
    assert "run first is complete: 20 steps" in result.stderr
    assert "raise train.max_steps" in result.stderr
    assert site.commands.calls("sbatch") == []
    assert site.submit("train.max_steps=30").stdout == "4711\n"


def remove_model(home: Path) -> None:
    shutil.rmtree(home / "models" / "tiny")


def remove_data(home: Path) -> None:
    shutil.rmtree(home / "datasets" / "tiny")


def remove_tokens(home: Path) -> None:
    shutil.rmtree(home / "tokens")


def damage_tokens(home: Path) -> None:
    (path,) = (home / "tokens").glob("*/train.bin")
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def shorten_model(home: Path) -> None:
    (home / "models" / "tiny" / "tokenizer.json").write_text("{")


INPUTS = [
    (remove_model, "model tiny is not here yet"),
    (remove_data, "data set tiny is not here yet"),
    (remove_tokens, "the tokens of tiny are not ready"),
    (damage_tokens, "the tokens of tiny are not ready (train.bin: hash differs)"),
    (shorten_model, "model tiny is damaged"),
]


@pytest.mark.parametrize(
    ("damage", "what"), INPUTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_inputs_that_are_missing_or_damaged_are_named_with_the_command_to_run(site, damage, what):
    damage(site.home)
    line = complaint(site.submit(), 1)
    assert what in line
    assert line.endswith("; run: bash download_data_model.sh")
    assert not site.run_dir.exists()


def test_inputs_that_do_not_fit_the_settings_are_named(site):
    line = complaint(site.submit("model.init=pretrained"), 1)
    assert "model tiny was fetched without weights" in line
    assert line.endswith("model.init=pretrained, or set model.init=scratch")
    assert "the tokens of tiny are not ready" in complaint(site.submit("data.text_field=body"), 1)


def test_the_command_to_run_names_the_config_file_and_settings_that_it_needs(site):
    shutil.copy(site.checkout / "config.yaml", site.cwd / "my own.yaml")
    line = complaint(site.submit("--config", "my own.yaml", "model.name=org/x", "run.name=b"), 1)
    assert "model org/x is not here yet" in line
    assert line.endswith("; run: bash download_data_model.sh 'my own.yaml' model.name=org/x")


def test_a_disk_without_room_for_two_checkpoints_is_told_with_both_sizes(site):
    model = site.home / "models" / "tiny"
    content = {
        n: (model / n).read_text()
        for n in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    shutil.rmtree(model)
    tiny.publish(model, content, kind="model", parameters=10**15)
    line = complaint(site.submit(), 1)
    assert re.search(r"GB free, two checkpoints of tiny need 24,000,000\.0 GB; free some", line)


def test_data_smaller_than_one_batch_is_told_with_both_numbers(site):
    line = complaint(site.submit("train.global_batch_size=4096"), 2)
    assert re.search(
        r"tiny: \d+ sequences of 32 tokens, less than train.global_batch_size=4096", line
    )


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to a folder"])
def test_a_run_folder_that_is_none_is_named_and_left_alone(site, kind):
    site.run_dir.parent.mkdir()
    elsewhere = site.folder / "precious"
    if kind == "a file":
        site.run_dir.write_text("mine")
    else:
        site.run_dir.symlink_to(elsewhere)
    if kind == "a link to a folder":
        elsewhere.mkdir()
    assert "is not a folder; move it away, or choose another" in complaint(site.submit(), 1)
    if kind == "a file":
        assert site.run_dir.read_text() == "mine"
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


def test_the_snapshot_is_complete_and_an_edit_of_the_checkout_does_not_reach_it(site):
    assert site.submit().returncode == 0
    code = site.run_dir / "code"
    kept = {path.relative_to(code) for path in code.rglob("*") if path.is_file()}
    package = site.checkout / "trainstack"
    modules = {path.relative_to(site.checkout) for path in package.rglob("*.py")}
    others = ("train.py", "train.slurm", "job.sh", "requirements.txt")
    assert kept == modules | {Path(name) for name in others}
    for path in kept:
        assert (code / path).read_bytes() == (site.checkout / path).read_bytes()
    (site.checkout / "train.py").write_text("edited")
    (site.checkout / "trainstack" / "new.py").write_text("edited")
    assert "edited" not in (code / "train.py").read_text()
    assert site.submit().returncode == 0  # again: the new code
    assert (code / "train.py").read_text() == "edited"
    assert (code / "trainstack" / "new.py").exists()


def test_the_snapshot_holds_the_whole_package_whatever_folders_it_has(site):
    """A module that is not copied would be missed by the job alone, after its wait in the queue."""
    package = site.checkout / "trainstack"
    (package / "room" / "inner" / "__pycache__").mkdir(parents=True)
    (package / "room" / "__init__.py").write_text("from trainstack.room.inner import thing\n")
    (package / "room" / "inner" / "__init__.py").touch()
    (package / "room" / "inner" / "thing.py").touch()
    (package / "room" / "inner" / "words.txt").touch()
    (package / "room" / "inner" / "__pycache__" / "thing.cpython-312.pyc").write_text("of before")
    (package / "room" / ".#thing.py").symlink_to("me@here.1234")  # as emacs locks an open file
    (package / "room").chmod(0o500)
    assert site.submit().returncode == 0
    copy = site.run_dir / "code" / "trainstack"
    names = {str(p.relative_to(copy)) for p in (copy / "room").rglob("*") if p.is_file()}
    inner = {f"room/inner/{name}" for name in ("__init__.py", "thing.py", "words.txt")}
    assert names == {"room/__init__.py", *inner}
    assert (copy / "room").stat().st_mode & 0o700 == 0o700  # the next submit can replace it
    code = (
        "import importlib, pkgutil, trainstack as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'trainstack.'):\n"
        "    print(importlib.import_module(module.name).__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=site.cwd, timeout=120,
        env={"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1", "HOME": str(site.folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported = {Path(line) for line in done.stdout.splitlines()}
    assert imported == set(copy.rglob("*.py")) - {copy / "__init__.py"}


def test_the_environment_of_a_run_is_kept_with_commit_difference_and_packages(site):
    git = ["git", "-C", site.checkout, "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "config.yaml"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    with (site.checkout / "config.yaml").open("a") as file:
        file.write("# my change\n")
    assert site.submit().returncode == 0
    kept = json.loads((site.run_dir / "environment.json").read_text())
    assert kept["git_commit"] == commit.strip()
    assert "+# my change" in kept["git_difference"]
    assert kept["packages"]["torch"]
    assert kept["python"] == ".".join(map(str, sys.version_info[:3]))


def test_it_works_without_home_in_the_c_locale_and_with_an_open_umask(site):
    result = site.submit(HOME=None, LANG=None, LC_ALL="C", TZ="Pacific/Chatham")
    assert result.stdout == "4711\n", result.stderr


# --- train.slurm


def end_group(process: subprocess.Popen) -> None:
    """End what a test started and what that left behind, also where the test failed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


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
        self.commands.add("srun", self.status("DONE"))
        self.environment |= {
            "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "first-5eed1e55",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16",
            "SLURM_JOB_END_TIME": "1900000000", "TMPDIR": str(folder),
        }  # fmt: skip

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
        calls = self.commands.calls("srun")
        return [call[call.index("--attempt") + 1] for call in calls]

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
        (call,) = self.commands.calls("srun")
        return call

    def value(self, option: str) -> str:
        """The value of an option in the command of srun, written with a space or with =."""
        call = self.command()
        if option in call:
            return call[call.index(option) + 1]
        (word,) = [word for word in call if word.startswith(f"{option}=")]
        return word.partition("=")[2]


@pytest.fixture
def job(tmp_path, home):
    job = Job(tmp_path, home)
    yield job
    end_group(job.process)
    assert not list(tmp_path.rglob("canary"))


def test_srun_and_torchrun_get_exactly_these_arguments(job):
    code, errors = job.wait()
    assert code == 0, errors
    port = job.value("--rdzv-endpoint").partition(":")[2]
    assert job.command() == [
        "--kill-on-bad-exit=1", "--ntasks-per-node=1", "--export=ALL", "--cpus-per-task=16",
        str(job.python), "-m", "trainstack.job.launch", "--run", str(job.run_dir), "--job", "77",
        "--attempt", "1", "--stop-file", str(job.stop_file), "--", "--max-restarts=0",
        "--rdzv-backend=c10d", "--rdzv-id=77.1", f"--rdzv-endpoint=gpu-07:{port}", "--nnodes=2",
        "--nproc-per-node=4", f"{job.run_dir}/code/train.py", "--config",
        f"{job.run_dir}/config.yaml", "--home", str(job.home), "--job", "77", "--attempt", "1",
        "--restarts", "0", "--stop-file", str(job.stop_file), "--expect-world-size", "8",
        "--ends-at", "1900000000",
    ]  # fmt: skip
    assert ["show", "hostnames", "gpu-[07-08]"] in job.commands.calls("scontrol")


def test_the_second_life_of_a_job_meets_under_its_own_name(job):
    job.stop_file.write_text("of the attempt before")
    code, errors = job.wait(SLURM_RESTART_COUNT="2")
    assert code == 0, errors
    assert job.value("--rdzv-id") == "77.3"
    assert job.value("--attempt") == "3"
    assert job.value("--restarts") == "2"
    assert job.value("--stop-file").endswith("/logs/77.2.stop")


def test_what_the_user_wrote_wins_over_what_slurm_says(job):
    job.wait(NPROC_PER_NODE="3", MASTER_PORT="12345", OMP_NUM_THREADS="7")
    assert job.value("--nproc-per-node") == "3"
    assert job.value("--expect-world-size") == "6"
    assert job.value("--rdzv-endpoint") == "gpu-07:12345"
    assert job.commands.environment("srun")["OMP_NUM_THREADS"] == "7"


def test_a_node_without_gpus_gets_two_processes(job):
    job.wait(SLURM_GPUS_ON_NODE=None)
    assert job.value("--nproc-per-node") == "2"
    assert job.commands.environment("srun")["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(("number", "first"), [("9999", 20000), ("4294900000", 20001)])
def test_the_port_follows_from_the_job_below_the_ephemeral_range(job, number, first):
    job.wait(SLURM_JOB_ID=number)
    port = int(job.value("--rdzv-endpoint").partition(":")[2])
    assert first <= port < first + 50


def test_a_port_that_somebody_uses_is_passed_over(job):
    with socket.create_server(("", 20078)):
        job.wait()
    assert 20078 < int(job.value("--rdzv-endpoint").partition(":")[2]) < 20128


def test_two_thousand_hosts_do_not_break_the_pipe(job):
    job.commands.add("scontrol", "for i in {1000..2999}; do echo a-rather-long-host-name-$i; done")
    code, errors = job.wait()
    assert code == 0, errors
    assert job.value("--rdzv-endpoint").startswith("a-rather-long-host-name-1000:")


def test_no_hosts_no_launch(job):
    """Nodes that each fell back to themselves would train alone, as many times as there are."""
    job.commands.add("scontrol", "echo 'slurm_load_node error' >&2; exit 1")
    code, errors = job.wait()
    assert code == 1
    assert "slurm_load_node error" in errors
    assert job.commands.calls("srun") == []
    assert job.run.status()["state"] == "FAILED"  # and not QUEUED for ever


def test_a_module_that_does_not_load_makes_the_job_failed_before_its_first_attempt(job):
    job.run.set_status("QUEUED", job=None, attempt=None)
    job.commands.add("module", "echo 'no such module' >&2; exit 1")
    code, errors = job.wait(MODULES="cuda/0")
    assert code == 1
    assert "no such module" in errors
    assert job.commands.calls("srun") == []
    assert job.run.status()["state"] == "FAILED"


@pytest.mark.parametrize("fault", ["kill:rank=1,step=25;nan:step=30", "sleep:$(touch canary)"])
def test_a_fault_on_demand_reaches_the_ranks_as_it_was_written(job, fault):
    job.wait(TRAINSTACK_FAULT=fault)
    assert job.value("--fault") == fault


def test_without_a_fault_on_demand_the_ranks_hear_of_none(job):
    job.wait()
    assert "--fault" not in job.command()


def test_the_tasks_have_modules_and_code_but_no_network_and_no_token(job):
    job.commands.add("module")
    job.commands.add("srun", f"umask >{job.folder}/umask\n{job.status('DONE')}")
    job.wait(MODULES="cuda/12.8 python/3.12")
    assert job.commands.calls("module") == [["load", "cuda/12.8", "python/3.12"]]
    seen = job.commands.environment("srun")
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"} & seen.keys()
    assert (seen["HF_HUB_OFFLINE"], seen["HF_DATASETS_OFFLINE"]) == ("1", "1")
    assert seen["PYTHONPATH"] == f"{job.run_dir}/code"
    assert seen["SLURM_EXPORT_ENV"] == "ALL"
    assert seen["OMP_NUM_THREADS"] == "4"
    assert seen["TRITON_CACHE_DIR"].startswith(str(job.folder))
    assert (job.folder / "umask").read_text().strip()[-2] in "02"  # the group may read


def test_where_slurm_does_not_tell_the_end_of_the_job_squeue_is_asked(job):
    job.commands.add("squeue", 'case "$*" in *%e*) echo 2030-01-02T03:04:05 ;; esac')
    job.wait(SLURM_JOB_END_TIME=None, TZ="UTC")
    assert job.value("--ends-at") == "1893553445"
    assert ["--noheader", "--jobs=77", "--format=%e"] in job.commands.calls("squeue")


@pytest.mark.parametrize("answer", ["exit 1", "echo N/A"])
def test_an_end_that_nobody_knows_is_left_out(job, answer):
    """An empty date is last midnight to date(1): the job would stop at its first step."""
    job.commands.add("squeue", answer)
    job.wait(SLURM_JOB_END_TIME=None)
    assert "--ends-at" not in job.command()


@pytest.mark.parametrize(("queue", "is_gone"), [("55", False), ("56", True)])
def test_a_job_that_slurm_no_longer_has_is_told_to_the_ranks(job, queue, is_gone):
    holder = {"job": "55", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (job.run_dir / "lease" / "1.json").write_text(json.dumps(holder))
    job.commands.add("squeue", f"echo {queue}")
    job.wait()
    assert ("--gone" in job.command()) is is_gone
    if is_gone:
        assert job.value("--gone") == "55"


ENDS = [
    # what the ranks wrote, what srun returned -> exit code, state, attempts
    (None, 42, 76, "NO_PROGRESS", 3),
    (None, 0, 76, "NO_PROGRESS", 3),
    ("RUNNING", 0, 76, "NO_PROGRESS", 3),
    ("DONE", 1, 0, "DONE", 1),
    ("DIVERGED", 1, 79, "DIVERGED", 1),
]


@pytest.mark.parametrize(("written", "srun", "code", "state", "attempts"), ENDS)
def test_the_status_decides_how_a_job_ended_not_the_code_of_srun(
    job, written, srun, code, state, attempts
):
    job.commands.add("srun", f"{job.status(written) if written else ':'}; exit {srun}")
    ended, errors = job.wait()
    assert ended == code, errors
    status = job.run.status()
    assert status["state"] == state
    assert job.attempts() == ["1", "2", "3"][:attempts]
    if written in (None, "RUNNING"):
        assert f"exited with code {srun} without reporting a cause" in status["cause"]
        assert len(re.findall(rf"first: FAILED at step \d: .* code {srun}", errors)) == 3
        assert "bash submit.sh" in errors
    assert requeues(job) == []


def test_the_done_of_an_earlier_life_is_not_taken_for_this_one(job):
    job.commands.add("srun", job.status("DONE", job="12"))
    code, errors = job.wait()
    assert code == 76, errors
    assert "FAILED" in errors
    assert job.run.status()["state"] == "NO_PROGRESS"


def test_a_job_whose_run_is_done_ends_at_once_and_in_order(job):
    job.run.set_status("DONE", job="12", attempt=1, step=5)
    before = (job.run_dir / "status.json").read_bytes()
    code, errors = job.wait()
    assert (code, errors) == (0, "first: complete: DONE at step 5; nothing to do\n")
    assert job.commands.calls("srun") == []
    assert job.run.events() == []
    assert (job.run_dir / "status.json").read_bytes() == before


def test_the_first_culprit_among_the_ranks_is_named(job):
    for rank, victim, cause in ((0, True, "lost rank 1"), (1, False, "no space left")):
        job.run.add_failure("77", 1, rank, "FAILED", 1, cause, is_victim=victim)
    job.commands.add("srun", job.in_turn("exit 1", job.status("DONE")))
    code, errors = job.wait()
    assert code == 0, errors
    assert re.search(r"first: FAILED at step 0: rank 1 on \S+: no space left", errors)
    assert "lost rank 1" not in errors


def test_an_attempt_that_fails_is_followed_by_the_next_in_the_same_job(job):
    job.make_checkpoint(5)
    fails = f"{job.status('RUNNING')}; exit 1"
    job.commands.add("srun", job.in_turn(fails, job.status("DONE")))
    code, errors = job.wait()
    assert code == 0, errors
    assert job.attempts() == ["1", "2"]
    first, second = job.commands.calls("srun")
    changes = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    ports = [word.rpartition(":")[2] for word in (*first, *second) if "--rdzv-endpoint" in word]
    assert changes == [
        ("1", "2"), ("--rdzv-id=77.1", "--rdzv-id=77.2"),
        (f"--rdzv-endpoint=gpu-07:{ports[0]}", f"--rdzv-endpoint=gpu-07:{ports[1]}"), ("1", "2"),
    ]  # fmt: skip
    assert ports[0] != ports[1]
    assert "first: restarting in place from checkpoint-5: 4 steps to redo (attempt 1 end" in errors
    events = [(event["event"], event["attempt"]) for event in job.run.events()]
    assert events == [("attempt", 1), ("failed", 1), ("attempt", 2)]
    assert requeues(job) == []


def test_attempts_that_each_bring_a_newer_checkpoint_go_on_for_ever(job):
    folder = shlex.quote(str(job.run_dir / "checkpoints"))
    bodies = [f"mkdir -p {folder}/checkpoint-{step}; exit 1" for step in (5, 10, 15, 20)]
    job.commands.add("srun", job.in_turn(*bodies, job.status("DONE")))
    code, errors = job.wait()
    assert code == 0, errors
    assert job.attempts() == ["1", "2", "3", "4", "5"]


FAILURES = [
    # what the rank that failed wrote -> exit code of the job, or None if another attempt follows
    ("FAILED", 1, {}, None),
    ("HANG", 81, {"position": [3, 1]}, None),
    ("DIVERGED", 79, {"is_rollback": True}, None),
    ("FAILED", 2, {}, 2),
    ("DIVERGED", 79, {}, 79),
    ("REFUSED", 78, {}, 78),
]


@pytest.mark.parametrize(("state", "code", "facts", "ends"), FAILURES)
def test_another_attempt_follows_where_it_may_help_and_only_there(job, state, code, facts, ends):
    job.run.add_failure("77", 1, 0, state, code, "a reason", is_victim=False, **facts)
    job.commands.add("srun", job.in_turn("exit 1", job.status("DONE")))
    ended, errors = job.wait()
    assert ended == (ends or 0), errors
    assert job.attempts() == (["1"] if ends else ["1", "2"])
    assert re.search(rf"first: {state} at step 0: rank 0 on \S+: a reason", errors)
    if ends:
        status = job.run.status()
        assert (status["state"], status["exit_code"]) == (state, ends)
        assert "restarting" not in errors


def test_a_shell_whose_job_was_requeued_elsewhere_leaves_the_run_to_it(job):
    """Slurm gave up a node that still runs, and started the job again on others."""
    job.run.set_status("RUNNING", job="77", attempt=2, step=4)
    before = (job.run_dir / "status.json").read_bytes()
    holder = {"job": "77", "attempt": 2, "restarts": 1, "host": "gpu-09", "pid": 1}
    (job.run_dir / "lease" / "2.json").write_text(json.dumps(holder))
    job.commands.add("srun", "exit 1")
    code, errors = job.wait()
    assert code == 78, errors
    assert "first: REFUSED: attempt 1 of job 77 was replaced" in errors
    assert job.attempts() == ["1"]
    assert (job.run_dir / "status.json").read_bytes() == before


def hold(job: Job, end: str) -> str:
    """Ranks that go on until the test releases them, and tell every signal that reaches them."""
    folder = shlex.quote(str(job.folder))
    return (
        f'for name in TERM USR1 INT HUP; do trap "echo $name >>{folder}/signals" $name; done\n'
        f"echo $$ >{folder}/pid\n"
        f"until [[ -e {folder}/release ]]; do sleep 0.05; done\n"
        f"{end}; exit 1"
    )


def until(condition, what: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def warn(job: Job, *signals: int) -> tuple[int, str]:
    """Send signals to the batch shell while srun runs, see them through; its code and stderr."""
    process = job.start()
    try:
        until((job.folder / "pid").exists, "srun")
        for number in signals:
            os.kill(process.pid, number)
            until(job.stop_file.exists, "the stop file", timeout=5)
            time.sleep(0.1)
        os.kill(int((job.folder / "pid").read_text()), 0)  # srun is alive
        assert process.poll() is None
        assert not (job.folder / "signals").exists()
    finally:
        job.release.touch()
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def requeues(job: Job) -> list[list[str]]:
    return [call for call in job.commands.calls("scontrol") if call[0] == "requeue"]


def test_a_warned_job_asks_its_ranks_to_stop_and_requeues_itself(job):
    job.commands.add("srun", hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert job.stop_file.read_text() == "Slurm warned of the end of the job\n"
    assert requeues(job) == [["requeue", "77"]]
    assert "train.slurm: back to the queue\n" in errors
    assert job.attempts() == ["1"]


def test_a_job_that_was_ended_by_hand_saves_and_stays_ended(job):
    job.commands.add("srun", hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGTERM)
    assert code == 75, errors
    assert job.stop_file.read_text() == "the job was asked to end\n"
    assert requeues(job) == []


def test_a_warned_job_that_is_then_ended_is_left_to_slurm(job):
    job.commands.add("srun", hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)
    assert code == 75, errors
    assert errors.count("the ranks will save and stop") == 1
    assert requeues(job) == []


def test_a_warned_job_that_was_done_anyway_is_done(job):
    job.commands.add("srun", hold(job, job.status("DONE")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 0, errors
    assert requeues(job) == []


def test_an_attempt_that_fails_after_the_job_was_asked_to_end_is_not_followed_by_another(job):
    job.run.add_failure("77", 1, 0, "FAILED", 1, "no space left", is_victim=False)
    job.commands.add("srun", hold(job, ":"))
    code, errors = warn(job, signal.SIGTERM)
    assert code == 1, errors
    assert job.attempts() == ["1"]
    status = job.run.status()
    assert (status["state"], status["exit_code"]) == ("FAILED", 1)
    assert "restarting" not in errors
    assert requeues(job) == []


def test_a_job_that_is_asked_to_end_between_two_attempts_does_not_seem_to_go_on(job):
    job.run.add_failure("77", 1, 0, "FAILED", 1, "no space left", is_victim=False)
    job.commands.add("srun", "exit 1")
    ours = shlex.quote(sys.executable)
    job.python.write_text(  # the session's leader is the batch shell
        f'#!{BASH}\nif [[ "$*" != *"job.attempts finish"* || "$*" == *--ending* ]]; then\n'
        f'  exec {ours} "$@"\nfi\n{ours} "$@"\ncode=$?\nread -r stat </proc/$$/stat\n'
        'set -- ${stat##*) }\nkill -TERM "$4"\nexit "$code"\n'
    )
    code, errors = job.wait()
    assert code == 1, errors
    assert "restarting in place" in errors
    assert job.attempts() == ["1"]
    assert job.run.status()["state"] == "FAILED"


def test_an_attempt_that_fails_after_a_warning_goes_back_to_the_queue_and_not_on_in_place(job):
    """Another attempt here would only load, and stop again."""
    job.run.add_failure("77", 1, 0, "FAILED", 1, "no space left", is_victim=False)
    job.commands.add("srun", hold(job, ":"))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert "no space left" in errors
    assert job.attempts() == ["1"]
    assert job.run.status()["state"] == "PAUSED"
    assert requeues(job) == [["requeue", "77"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_were_gone_before_they_could_begin_leave_a_paused_run(job, number):
    job.commands.add("srun", hold(job, ":"))
    code, errors = warn(job, number)
    assert code == 75, errors
    status = job.run.status()
    assert (status["state"], status["exit_code"]) == ("PAUSED", 75)
    assert status["cause"].endswith(", before training began")
    assert "resumes from the beginning: nothing to redo" in errors
    assert requeues(job) == ([] if number == signal.SIGTERM else [["requeue", "77"]])


def test_ranks_that_were_gone_before_they_could_save_are_not_said_to_have_lost_nothing(job):
    job.make_checkpoint(5)
    ranks = ["rank 0 on gpu-07: pid 1"]
    job.run.add_event("start", job="77", attempt=1, ranks=ranks)
    job.commands.add("srun", hold(job, job.status("RUNNING")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert job.run.status()["cause"].endswith(", before the ranks had saved")
    assert "resumes from checkpoint-5: 4 steps to redo" in errors


def test_a_stop_file_of_an_earlier_process_of_this_name_stops_nobody(job):
    job.stop_file.write_text("of long ago")
    stop_file = shlex.quote(str(job.stop_file))
    job.commands.add("srun", f"[[ ! -e {stop_file} ]] || exit 1\n{job.status('DONE')}")
    code, errors = job.wait()
    assert code == 0, errors
    assert job.attempts() == ["1"]


def test_a_site_that_does_not_requeue_is_told_what_to_do(job):
    job.commands.add("srun", job.status("PAUSED"))
    job.commands.add("scontrol", '[[ "$1" != requeue ]] || exit 1; echo gpu-07')
    code, errors = job.wait()
    assert code == 75
    assert errors.endswith(
        "train.slurm: this site does not requeue; to resume: the same bash submit.sh; "
        "to queue the jobs that follow in advance: bash submit.sh --chain N\n"
    )
    assert job.run.status()["state"] == "PAUSED"


def test_three_lives_without_a_checkpoint_are_not_followed_by_a_fourth(job):
    """Slurm killed them with their shells, and requeued the job each time."""
    for attempt in (1, 2, 3):
        job.run.add_event("attempt", job="77", attempt=attempt, newest=0)
    code, errors = job.wait(SLURM_RESTART_COUNT="3")
    assert code == 76, errors
    assert job.run.status()["state"] == "NO_PROGRESS"
    assert "3 attempts without a newer checkpoint" in errors
    assert job.commands.calls("srun") == []
    assert requeues(job) == []


CHAINED = ["--noheader", "--states=PENDING", "--name=first-5eed1e55", "--format=%A"]


def test_a_paused_job_of_a_chain_leaves_in_order_and_the_next_goes_on(job):
    job.commands.add("srun", job.status("PAUSED"))
    job.commands.add("squeue", "printf '78\\n79\\n'")
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == 0, errors
    assert job.commands.calls("squeue")[-1] == CHAINED
    assert errors.endswith(
        "train.slurm: the next job of the chain resumes; to end all of them: "
        "scancel --name=first-5eed1e55\n"
    )
    assert job.run.status()["state"] == "PAUSED"
    assert requeues(job) == []


@pytest.mark.parametrize("queue", ["", "exit 1"])
def test_the_last_job_of_a_chain_says_that_nobody_goes_on(job, queue):
    job.commands.add("srun", job.status("PAUSED"))
    job.commands.add("squeue", queue)
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == 75, errors
    assert "last job of the chain; to resume: the same bash submit.sh --chain N\n" in errors
    assert requeues(job) == []


@pytest.mark.parametrize("state", ["NO_PROGRESS", "DIVERGED", "REFUSED"])
def test_what_a_person_has_to_look_at_ends_the_rest_of_a_chain(job, state):
    job.run.set_status(state, job="76", attempt=1)
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == EXIT_CODES[state]
    assert errors == f"first: {state} in job 76: the rest of the chain does not continue\n"
    assert job.commands.calls("srun") == []
    assert job.run.status()["job"] == "76"


@pytest.mark.parametrize("state", ["PAUSED", "FAILED", "HANG", "RUNNING"])
def test_the_next_job_of_a_chain_goes_on_after_one_that_was_paused_or_lost(job, state):
    job.run.set_status(state, job="76", attempt=1)
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == 0, errors
    assert job.attempts() == ["1"]


@pytest.mark.parametrize("script", ["train.slurm", "job.sh"])
def test_a_job_script_that_was_started_by_hand_points_to_submit(site, script):
    for arguments in ([], ["/nowhere"]):
        line = complaint(site.run(script, *arguments), 2, "train.slurm")
        assert "bash submit.sh" in line


# --- --local


def fake_torchrun(site: Site) -> None:
    """A Python that starts no ranks but writes what they would write."""
    body = (
        'if [[ "$1 $2" == "-m trainstack.job.launch" ]]; then\n'
        f"  {site.commands.keep('torchrun')}\n"
        '  while (($#)); do if [[ "$1" == --job ]]; then job="$2"; fi; shift; done\n'
        '  printf \'{"state": "DONE", "job": "%s", "attempt": 1}\' "$job" >'
        f"{shlex.quote(str(site.run_dir))}/status.json\n"
        "  exit 0\n"
        "fi\n"
    )
    site.python.write_text(f'#!{BASH}\n{body}exec {shlex.quote(sys.executable)} "$@"\n')


def test_a_local_run_is_the_same_job_without_slurm(site):
    fake_torchrun(site)
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        site.commands.remove(name)
    result = site.submit("--local")
    assert result.returncode == 0, result.stderr
    assert f"run first -> {site.run_dir}" in result.stderr
    (call,) = site.commands.calls("torchrun")
    job = call[call.index("--job") + 1]
    assert re.fullmatch(rf"local-{re.escape(os.uname().nodename)}-\d+-\d+", job)
    stop_file = f"{site.run_dir}/logs/{job}.0.stop"
    assert call == [
        "-m", "trainstack.job.launch", "--run", str(site.run_dir), "--job", job, "--attempt", "1",
        "--stop-file", stop_file, "--", "--max-restarts=0", "--standalone", "--nnodes=1",
        "--nproc-per-node=2", f"{site.run_dir}/code/train.py", "--config",
        f"{site.run_dir}/config.yaml", "--home", str(site.home), "--job", job, "--attempt", "1",
        "--restarts", "0", "--stop-file", stop_file, "--expect-world-size", "2",
    ]  # fmt: skip
    seen = site.commands.environment("torchrun")
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in seen


def test_a_local_run_that_was_done_goes_further_when_it_is_asked_to(site):
    fake_torchrun(site)
    RunFolder(site.run_dir).create()
    RunFolder(site.run_dir).set_status("DONE", step=20)
    result = site.submit("--local", "train.max_steps=30")
    assert result.returncode == 0, result.stderr
    assert len(site.commands.calls("torchrun")) == 1


def test_a_local_run_takes_a_fault_on_demand_and_no_chain_along(site):
    fake_torchrun(site)
    fault = "kill:rank=1,step=25"
    result = site.submit("--local", TRAINSTACK_FAULT=fault, TRAINSTACK_CHAIN="1")
    assert result.returncode == 0, result.stderr
    (call,) = site.commands.calls("torchrun")
    assert call[-2:] == ["--fault", fault]
    assert "TRAINSTACK_CHAIN" not in site.commands.environment("torchrun")


GPUS = [
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", None, "3"),
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", "0,2,1,5", "4"),
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", "", "2"),
    ("echo 'No devices were found'; exit 6", None, "2"),
]


@pytest.mark.parametrize(("smi", "visible", "processes"), GPUS)
def test_a_local_run_takes_the_gpus_that_it_may_see(site, smi, visible, processes):
    fake_torchrun(site)
    site.commands.add("nvidia-smi", smi)
    batch = "train.global_batch_size=24"
    result = site.submit("--local", batch, CUDA_VISIBLE_DEVICES=visible)
    assert result.returncode == 0, result.stderr
    (call,) = site.commands.calls("torchrun")
    assert f"--nproc-per-node={processes}" in call


# --- all scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_of_the_script(script):
    result = subprocess.run(
        [BASH, tiny.ROOT / script, "--help"], capture_output=True, text=True, cwd="/", timeout=20
    )
    assert result.returncode == 0
    assert result.stderr == ""
    header = re.match(r"#!.*\n#\n((?:#.*\n)+)\n", (tiny.ROOT / script).read_text())[1]
    assert result.stdout.strip() == re.sub(r"^# ?", "", header, flags=re.MULTILINE).strip()
    assert f"Usage: bash {script}" in result.stdout


@pytest.mark.parametrize(
    "script", ["setup.sh", "download_data_model.sh", "submit.sh", "monitor.sh"]
)
def test_an_option_that_is_not_known_is_refused_with_the_way_to_the_help(site, script):
    line = complaint(site.run(script, "--nonsense"), 2, script)
    assert "--nonsense is not an option" in line
    assert "--help" in line


def scripts() -> list[Path]:
    """Every shell script of the project; env.sh is the user's."""
    found = [path for path in tiny.ROOT.rglob("*.sh") if path.name != "env.sh"]
    return [*sorted(found), tiny.ROOT / "train.slurm", tiny.ROOT / ".ci" / "run"]


def lint(*command, stdin: str = "") -> str:
    """Run a checker, from beside this Python or from the PATH; what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(command[0], path=path)
    assert found, f"{command[0]} is not installed; see tests/requirements.txt"
    result = subprocess.run(
        [found, *map(str, command[1:])], input=stdin, capture_output=True, text=True, cwd=tiny.ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_shellcheck_finds_nothing():
    lint("shellcheck", "--external-sources", *scripts())


def test_shfmt_would_change_nothing():
    lint("shfmt", "-i", "2", "-ci", "-d", *scripts())


def test_bash_parses_every_script():
    for path in scripts():
        lint("bash", "-n", path)


def test_ruff_finds_nothing_and_would_format_nothing():
    lint("ruff", "check", "--no-cache", ".")
    lint("ruff", "format", "--no-cache", "--check", ".")
