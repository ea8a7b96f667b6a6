"""How sites differ, and how people ask: what a job may find, on a real Slurm."""

import os
import re
import shutil
import time
from collections.abc import Iterator

import pytest

import tiny
from slurm_cluster import SlurmCluster, missing_requirements
from slurm_user import PAIR, Site

pytestmark = pytest.mark.slurm

NEVER = [
    ("--cpus-per-task=9", "--cpus-per-task=8"),
    ("--mem=70G", "--mem=64000M"),
    ("--gpus-per-node=3", "--gpus-per-node=2"),
    ("--gpus=7", "--gpus=2"),
    ("--nodes=4", "--nodes=3"),
    ("--partition=short --nodes=3 --time=5", "--nodes=2"),
    ("--partition=short --time=2:00:00", "--time=1:00:00"),
]


@pytest.mark.parametrize(("options", "fix"), NEVER)
def test_what_no_node_can_give_is_refused_with_the_option_to_change(user, options, fix):
    ask = ("run.name=never", "--dry-run", "train.global_batch_size=48", "--", *options.split())
    result = user.run("submit.sh", *ask)
    assert result.returncode == 2, result.stderr
    assert f"for this job alone: -- {fix}" in result.stderr.splitlines()[-1]
    accepted = user.run("submit.sh", *ask, fix)
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.parametrize(
    ("options", "cores", "processes"),
    [
        ("--gpus-per-task=1 --ntasks-per-node=2 --cpus-per-task=3", 6, 2),
        pytest.param("--gpus=2 --cpus-per-gpu=4", 4, 1, marks=pytest.mark.matrix),
    ],
)
def test_one_launcher_a_node_has_all_that_the_job_has_there(user, options, cores, processes):
    run = f"form{cores}"
    training = (f"run.name={run}", "train.max_steps=100000")
    job = user.submit(*training, "--", "--nodes=2", *options.split())
    try:
        user.wait_until(lambda: user.steps(run) >= 1, "training")
        assert f"2 hosts x {processes} processes" in user.log(run, job)
        assert user.cluster.job(job)["NumCPUs"] == str(2 * cores)
        steps = user.cluster.run("scontrol", "show", "step", job).stdout
        assert f"CPUs={2 * cores} Tasks=2" in steps
    finally:
        user.cluster.run("scancel", job)
        user.cluster.wait(job, timeout=60)


def test_a_node_that_does_not_see_the_shared_folder_is_named_and_left_out(user):
    """Slurm starts the job again, on the two nodes that see it."""
    empty = user.shared / "empty"
    empty.mkdir(exist_ok=True)
    enter = user.cluster.enter("node2")
    user.cluster.run(*enter, "mount", "-n", "--bind", empty, user.shared / "trainstack")
    try:
        job = user.submit("run.name=blind", "train.max_steps=3", *PAIR)
        cause = "node2: no sight of"
        user.wait_until(
            lambda: (user.folder("blind").status().get("cause") or "").startswith(cause), cause
        )
        assert "node2: no sight of" in user.run("monitor.sh", "blind").stdout
        assert user.cluster.wait(job, timeout=120) == "COMPLETED", user.log("blind", job)
    finally:
        user.cluster.run(*enter, "umount", "-n", user.shared / "trainstack")
    status = user.folder("blind").status()
    assert (status["state"], status["nodes"]) == ("DONE", ["node1", "node3"])
    user.why("blind", "a node without the shared folder", cause, "the job went back into the queue",
             "the run got past it; it lay with the infrastructure")  # fmt: skip


@pytest.mark.matrix
def test_a_firewall_between_two_nodes_is_named_with_both_and_the_port(user):
    if not shutil.which("iptables"):
        pytest.skip("no iptables here")
    rule = ["INPUT", "-p", "tcp", "--dport", "20000:29999", "-j", "DROP"]
    rule += ["-s", f"{user.cluster.address}2"]
    enter = [*user.cluster.enter("node1"), "iptables"]
    user.cluster.run(*enter, "-A", *rule)
    try:
        job = user.submit("run.name=wall", "train.max_steps=3", *PAIR, "--nodelist=node[1-2]")
        assert user.cluster.wait(job, timeout=120) == "FAILED"
    finally:
        user.cluster.run(*enter, "-D", *rule)
    cause = user.folder("wall").status()["cause"]
    user.why("wall", "a firewall", "node2 cannot reach node1", "on other nodes only")
    assert re.match(r"node2 cannot reach node1 \([\d.]+\) at port \d{5}: no answer; it", cause)


@pytest.mark.matrix
def test_preemptions_while_a_job_starts_cost_it_no_attempt(user):
    preemptable = [*PAIR, "--partition=grace", "--exclusive"]
    job = user.submit("run.name=pushed", "train.max_steps=3", *preemptable)
    for _ in range(3):
        user.cluster.wait(job, {"RUNNING"}, timeout=120)
        user.wait_until(lambda: "meeting at" in user.log("pushed", job), "the start")
        other = user.cluster.run(
            "sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null",
            "--wrap=sleep 2",
        ).stdout.strip()  # fmt: skip
        user.cluster.wait(other, timeout=120)
        assert user.cluster.job_state(job) in ("PENDING", "RUNNING", "COMPLETING")
    assert user.cluster.wait(job, timeout=240) == "COMPLETED", user.log("pushed", job)
    assert user.folder("pushed").status()["state"] == "DONE"
    user.why("pushed", "preempted while it starts", "Slurm needed the nodes for another job")


@pytest.fixture(scope="module")
def other(home, tmp_path_factory) -> Iterator[Site]:
    """A user of a site that is set up otherwise."""
    if missing := missing_requirements("cgroup"):
        pytest.skip("; ".join(missing))
    cluster = SlurmCluster(
        tmp_path_factory.mktemp("other"), hosts=("o1", "o2"), gpus_per_host=0, cpus_per_host=2,
        proctrack="cgroup", task_plugin="task/affinity,task/cgroup", more="PrivateData=jobs",
    )  # fmt: skip
    shared = tmp_path_factory.mktemp("shared")
    with cluster:
        shutil.copytree(
            home, shared / "trainstack", symlinks=True, ignore=shutil.ignore_patterns("runs")
        )
        tiny.make_checkout(shared / "checkout", shared, run__name="first")
        site = Site(shared / "checkout", cluster)
        wrapped = shared / "bin"
        wrapped.mkdir()
        for name in ("sbatch", "squeue", "sinfo", "scontrol"):
            script = '#!/bin/sh\necho "Maintenance on 2031-01-01: 12 RUNNING"\n'
            (wrapped / name).write_text(f'{script}exec {shutil.which(name)} "$@"\n')
            (wrapped / name).chmod(0o755)
        site.environment["PATH"] = f"{wrapped}:{os.environ['PATH']}"
        site.environment["SQUEUE_STATES"] = "PENDING"
        yield site


@pytest.mark.matrix
def test_a_site_without_gres_whose_commands_print_banners_trains_to_done(other):
    refused = other.run("submit.sh")
    assert "no node of partition main has more than 0; write #SBATCH --gpus-per-node=0" in (
        refused.stderr
    )
    options = ("--", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10")
    job = other.submit(*options)
    assert other.cluster.wait(job, timeout=180) == "COMPLETED", other.log("first", job)
    assert "2 hosts x 2 processes, gloo" in other.log("first", job)
    assert other.folder("first").status()["state"] == "DONE"


@pytest.mark.matrix
def test_a_job_that_slurm_suspends_is_shown_so_and_has_not_hung(user):
    job = user.submit("run.name=held", "train.max_steps=400", "guard.hang_seconds=4", *PAIR)
    user.wait_until(lambda: user.steps("held") >= 3, "training")
    user.cluster.run("scontrol", "suspend", job)
    time.sleep(15)
    assert re.search(r"state +SUSPENDED\n", user.run("monitor.sh", "held").stdout)
    user.why(
        "held", "suspended", "SUSPENDED", "Slurm stopped its processes", f"scontrol resume {job}"
    )
    user.cluster.run("scontrol", "resume", job)
    assert user.cluster.wait(job, timeout=180) == "COMPLETED", user.log("held", job)
    events = {event["event"] for event in user.folder("held").events()}
    assert not events & {"hang", "failed"}
