"""Jobs on a real Slurm of three hosts: submit.sh to DONE, failures, stops, and the monitor."""

import json
import re
from pathlib import Path

import pytest

import tiny
from slurm_user import ONE, TWO_NODES
from trainstack.checkpoint.names import checkpoints

pytestmark = pytest.mark.slurm


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
    assert not list(Path("/tmp").glob(f"trainstack-*-{job}"))
    losses = tiny.metrics(user.shared / "trainstack", "first")
    assert losses[20] < losses[1] - 1


def test_a_complete_run_is_not_submitted_again(user):
    result = user.run("submit.sh", *TWO_NODES)
    assert result.returncode == 0
    assert result.stdout == ""
    assert "run first is complete: 20 steps" in result.stderr


def test_a_rank_that_fails_every_time_makes_the_job_failed_and_is_named(user):
    fault = "kill:rank=0,step=12,attempt=all"
    job = user.submit("run.name=broken", "log.report_to=[html]", *ONE, fault=fault)
    state = user.cluster.wait(job, timeout=180)
    log = user.log("broken", job)
    assert state == "FAILED", log
    status = user.folder("broken").status()
    assert (status["state"], status["exit_code"]) == ("NO_PROGRESS", 76)
    assert "the last one: rank 0 on node1: killed by SIGKILL" in status["cause"]
    assert user.cluster.job(job)["ExitCode"] == "76:0"
    assert "broken: FAILED at step" in log
    assert "broken: NO_PROGRESS at step" in log
    assert table(user.run("monitor.sh").stdout)["broken"]["STATE"] == "NO_PROGRESS"
    screen = user.run("monitor.sh", "broken").stdout
    assert "NO_PROGRESS" in screen
    assert "cause" in screen
    page = user.folder("broken").path / "report.html"
    assert f"report: {page}\n" in log
    assert '"state": "NO_PROGRESS"' in page.read_text()
    user.why("broken", "F27 on Slurm", "NO_PROGRESS at step", "rank 0 on node1: killed by SIGKILL",
             "torchrun saw it end", "ended the job", "bash submit.sh --resume broken")  # fmt: skip


def test_the_run_of_a_job_that_failed_continues_in_the_next_job(user):
    """The dead job could not give its lease back; Slurm says that it has ended."""
    newest = checkpoints(user.folder("broken").checkpoints)[0][1].name
    job = user.submit("run.name=broken", *ONE)
    state = user.cluster.wait(job, timeout=180)
    assert state == "COMPLETED", user.log("broken", job)
    assert f"resume  attempt 1 from {newest}" in user.log("broken", job)
    assert user.folder("broken").status()["state"] == "DONE"


def test_a_run_that_diverges_fails_with_its_own_code_and_cause(user):
    job = user.submit("run.name=bad", "optim.learning_rate=1e30", "optim.max_grad_norm=null", *ONE)
    assert user.cluster.wait(job, timeout=120) == "FAILED"
    status = user.folder("bad").status()
    assert (status["state"], status["exit_code"]) == ("DIVERGED", 79)
    assert user.cluster.job(job)["ExitCode"] == "79:0"
    user.why("bad", "diverged", "DIVERGED", "not finite", "ends in the same way; it lies with")


def test_the_monitor_tells_the_truth_of_runs_in_every_state(user):
    running = user.submit("run.name=live", "train.max_steps=100000", *ONE)
    user.wait_until(lambda: user.steps("live") >= 3, "training")
    waiting = user.submit("run.name=waits", "--", "--begin=now+1hour")
    rows = table(user.run("monitor.sh").stdout)
    assert rows["first"]["STATE"] == "DONE"
    assert rows["broken"]["STATE"] == "DONE"
    assert rows["bad"]["STATE"] == "DIVERGED"
    assert rows["live"]["STATE"] == "RUNNING"
    assert rows["live"]["JOB"] == running
    assert int(rows["live"]["STEP"].split("/")[0].replace(",", "")) >= 3
    assert (rows["waits"]["STATE"], rows["waits"]["HEALTH"]) == ("QUEUED", "queued")
    user.why("live", "a run that trains", "live: RUNNING at step", "nothing is wrong")
    user.why("waits", "waits", f"waits: QUEUED; job {waiting} waits, BeginTime: it asked for")
    screen = user.run("monitor.sh", "bad").stdout
    assert "DIVERGED" in screen
    assert "cause" in screen
    refused = user.run("submit.sh", "run.name=live", *ONE)
    assert refused.returncode == 78
    assert f"has job {running}" in refused.stderr
    user.cluster.run("scancel", waiting, running)
    user.cluster.wait(running, timeout=60)
    user.cluster.wait(waiting, timeout=60)
    rows = table(user.run("monitor.sh").stdout)
    assert rows["live"]["STATE"] in ("PAUSED", "LOST")
    assert rows["waits"]["STATE"] == "LOST"
    user.why("waits", "cancelled in the queue", "Slurm says CANCELLED", "somebody cancelled it",
             "bash submit.sh --resume waits")  # fmt: skip


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
    told = user.run("monitor.sh", "nowhere", "--why")
    assert told.returncode == 1 and told.stdout.startswith("nowhere: there is no such run")
    assert "sinfo -s lists the partitions" in " ".join(told.stdout.split())


def test_editing_the_checkout_while_the_job_waits_changes_nothing(user):
    site = user.checkout
    job = user.submit("run.name=kept", "train.max_steps=2", "--", "--hold", *ONE[1:])
    original = (site / "train.py").read_text()
    (site / "train.py").write_text("raise SystemExit('edited after submission')\n")
    user.why("kept", "held", "kept: HELD", f"scontrol release {job}")
    try:
        user.cluster.run("scontrol", "release", job)
        state = user.cluster.wait(job, timeout=120)
    finally:
        (site / "train.py").write_text(original)
    assert state == "COMPLETED", user.log("kept", job)
    environment = json.loads((user.folder("kept").path / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
