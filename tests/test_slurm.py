"""Jobs on a real Slurm of three hosts: submit.sh to DONE, failures, stops, and the monitor."""

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
from slurm_cluster import SlurmCluster
from trainstack import places
from trainstack.runfolder import RunFolder

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def site(home, tmp_path_factory):
    """A checkout and a shared folder with an environment that is ready: this one."""
    shared = tmp_path_factory.mktemp("shared folder")
    shutil.copytree(home, shared / "trainstack", ignore=shutil.ignore_patterns("runs"))
    checkout = shared / "checkout"
    tiny.make_checkout(checkout, shared, run__name="first")
    return checkout


class Site:
    """The commands of a user of the cluster."""

    def __init__(self, checkout: Path, cluster: SlurmCluster):
        self.checkout, self.cluster = checkout, cluster
        self.shared = checkout.parent
        self.environment = {
            **os.environ, **cluster.env(), "SHARED_DIR": str(self.shared), "NPROC_PER_NODE": "",
            "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_thisMustNeverBeSeenAnywhere",
        }  # fmt: skip

    def submit(self, *arguments: str) -> str:
        result = self.run("submit.sh", *arguments)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"\d+\n", result.stdout), result.stdout
        return result.stdout.strip()

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.checkout / script), *arguments], env=self.environment,
            capture_output=True, text=True, timeout=120, cwd="/",
        )  # fmt: skip

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

    def steps(self, run: str) -> int:
        path = self.folder(run).path / "metrics.jsonl"
        return path.read_bytes().count(b'"loss"') if path.exists() else 0


@pytest.fixture
def user(site, cluster):
    return Site(site, cluster)


TWO_NODES = ("--", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4", "--time=10")


def test_two_nodes_with_two_processes_each_train_to_done(user):
    job = user.submit(*TWO_NODES)
    state = user.cluster.wait(job, timeout=180)
    log = user.log("first", job)
    assert state == "COMPLETED", log
    for rank, host in enumerate(["node1", "node1", "node2", "node2"]):
        assert f"rank {rank} on {host}:" in log
    assert "2 hosts x 2 processes, gloo" in log
    assert "first: DONE at step 20" in log
    status = user.folder("first").status()
    assert (status["state"], status["step"], status["job"]) == ("DONE", 20, job)
    assert status["nodes"] == ["node1", "node2"]
    names = {p.name for p in user.folder("first").logs.glob(f"{job}.1.rank*.log")}
    assert names == {f"{job}.1.rank{rank}.log" for rank in range(4)}
    losses = tiny.metrics(user.shared / "trainstack", "first")
    assert losses[20] < losses[1] - 1


def test_a_complete_run_is_not_submitted_again(user):
    result = user.run("submit.sh", *TWO_NODES)
    assert result.returncode == 0
    assert result.stdout == ""
    assert "run first is complete: 20 steps" in result.stderr


def test_a_failing_rank_makes_the_job_failed_and_is_named(user):
    job = user.submit("run.name=broken", "train.max_steps=100000", *TWO_NODES)
    folder = user.folder("broken")
    user.wait_until(lambda: folder.status().get("checkpoint"), "the first checkpoint")
    victim = rank_process(user.cluster, "node2", 3, "broken")
    os.kill(victim, signal.SIGKILL)
    state = user.cluster.wait(job, timeout=120)
    assert state == "FAILED", user.log("broken", job)
    status = user.folder("broken").status()
    assert status["state"] == "FAILED"
    assert status["exit_code"] == 1
    assert "broken: FAILED at step" in user.log("broken", job)
    assert table(user.run("monitor.sh").stdout)["broken"]["STATE"] == "FAILED"
    screen = user.run("monitor.sh", "broken").stdout
    assert "FAILED" in screen
    assert "cause" in screen


def test_the_run_of_a_job_that_failed_goes_on_in_the_next_job(user):
    """The dead job could not give its lease back; Slurm says that it has ended."""
    newest = places.checkpoints(user.folder("broken").checkpoints)[0][1].name
    steps = int(newest.rpartition("-")[2]) + 5
    job = user.submit("run.name=broken", f"train.max_steps={steps}", *TWO_NODES)
    state = user.cluster.wait(job, timeout=180)
    assert state == "COMPLETED", user.log("broken", job)
    assert f"resume  attempt 1 from {newest}" in user.log("broken", job)
    assert user.folder("broken").status()["state"] == "DONE"


def rank_process(cluster: SlurmCluster, host: str, rank: int, run: str) -> int:
    """The pid of one rank of a run, found by its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and f"runs/{run}/code/train.py" in command:
            return int(path.name)
    raise AssertionError(f"no rank {rank} of {run} on {host}")


def test_a_warned_job_saves_requeues_itself_and_ends_as_if_nothing_had_happened(user):
    """scancel -b -s USR1 is what Slurm sends before the end of the time limit."""
    run, steps = "warned", "train.max_steps=300"
    job = user.submit(f"run.name={run}", steps, "checkpoint.save_steps=1000", *TWO_NODES)
    user.wait_until(lambda: user.steps(run) >= 5, "training")
    user.cluster.run("scancel", "--batch", "--signal=USR1", job)
    user.wait_until(lambda: user.folder(run).status()["state"] == "PAUSED", "the pause")
    paused = user.folder(run).status()
    assert paused["checkpoint"] == f"checkpoint-{paused['step']}"
    assert paused["cause"] == "Slurm warned of the end of the job"
    state = user.cluster.wait(job, states={"COMPLETED", "FAILED", "CANCELLED"}, timeout=240)
    log = user.log(run, job)
    assert state == "COMPLETED", log
    assert "resume  attempt 2 from checkpoint-" in log
    resumed = [e["step"] for e in user.folder(run).events() if e["event"] == "resume"]
    assert resumed == [paused["step"]], "no step was done twice"
    assert sorted(tiny.metrics(user.shared / "trainstack", run)) == list(range(1, 301))


def test_a_run_that_diverges_fails_with_its_own_code_and_cause(user):
    job = user.submit(
        "run.name=bad", "optim.learning_rate=1e30", "optim.max_grad_norm=null", *TWO_NODES
    )
    assert user.cluster.wait(job, timeout=120) == "FAILED"
    status = user.folder("bad").status()
    assert (status["state"], status["exit_code"]) == ("DIVERGED", 79)
    assert user.cluster.job(job)["ExitCode"] == "79:0"


def test_the_monitor_tells_the_truth_of_runs_in_every_state(user):
    running = user.submit("run.name=live", "train.max_steps=100000", *TWO_NODES)
    user.wait_until(lambda: user.steps("live") >= 3, "training")
    waiting = user.submit("run.name=waits", "--", "--begin=now+1hour")
    rows = table(user.run("monitor.sh").stdout)
    assert rows["first"]["STATE"] == "DONE"
    assert rows["broken"]["STATE"] == "DONE"
    assert rows["bad"]["STATE"] == "DIVERGED"
    assert (rows["live"]["STATE"], rows["live"]["SLURM"]) == ("RUNNING", "RUNNING")
    assert rows["live"]["JOB"] == running
    assert int(rows["live"]["STEP"].split("/")[0].replace(",", "")) >= 3
    assert (rows["waits"]["STATE"], rows["waits"]["SLURM"]) == ("QUEUED", "PENDING")
    screen = user.run("monitor.sh", "bad").stdout
    assert "DIVERGED" in screen
    assert "cause" in screen
    refused = user.run("submit.sh", "run.name=live", *TWO_NODES)
    assert refused.returncode == 78
    assert f"has job {running}" in refused.stderr
    user.cluster.run("scancel", waiting, running)
    user.cluster.wait(running, timeout=60)
    user.cluster.wait(waiting, timeout=60)
    rows = table(user.run("monitor.sh").stdout)
    assert rows["live"]["STATE"] in ("PAUSED", "LOST")
    assert rows["waits"]["STATE"] == "LOST"


def table(text: str) -> dict[str, dict[str, str]]:
    """The monitor's table by run; columns are two or more spaces apart."""
    lines = text.splitlines()
    starts = [m.start() for m in re.finditer(r"(?:^|(?<=  ))\S", lines[0])]
    ends = [*starts[1:], None]
    names = [lines[0][a:b].strip() for a, b in zip(starts, ends, strict=True)]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines[1:]]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def test_no_token_is_found_anywhere(user):
    secret = b"hf_thisMustNeverBeSeenAnywhere"
    for root in (user.shared, Path(user.cluster.folder)):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert secret not in path.read_bytes(), path


def test_slurm_refuses_and_the_person_reads_one_line_with_a_hint(user):
    result = user.run("submit.sh", "run.name=nowhere", "--", "--partition=nosuch")
    assert result.returncode != 0
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "sinfo -s lists the partitions" in errors[0]
    assert user.folder("nowhere").status() == {}


def test_editing_the_checkout_while_the_job_waits_changes_nothing(user, site):
    job = user.submit("run.name=kept", "train.max_steps=2", "--", "--hold", *TWO_NODES[1:])
    original = (site / "train.py").read_text()
    (site / "train.py").write_text("raise SystemExit('edited after submission')\n")
    try:
        user.cluster.run("scontrol", "release", job)
        state = user.cluster.wait(job, timeout=120)
    finally:
        (site / "train.py").write_text(original)
    assert state == "COMPLETED", user.log("kept", job)
    environment = json.loads((user.folder("kept").path / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
