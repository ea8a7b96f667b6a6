"""What the monitor says of a job on a real Slurm, within five seconds of each change."""

import json
import os
import signal
import time

import pytest
from test_slurm import table

from slurm_user import PAIR, Site, rank_process

pytestmark = pytest.mark.slurm
SECONDS = 5
LONG = ("train.max_steps=100000", "checkpoint.save_steps=200", "eval.eval_steps=100000")


def says(user: Site, run: str, state: str, health: str = "", reason: str = "", seconds=SECONDS):
    """Table, screen and JSON agree on it within so many seconds; returns the facts."""
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        found = json.loads(user.run("monitor.sh", run, "--json").stdout)
        is_so = found["state"] == state and health in found["health"]
        if is_so and reason in (found["reason"] or ""):
            break
        assert asked - began < seconds, f"{state} {health} {reason}: {found}"
    row = table(user.run("monitor.sh").stdout)[run]
    whole = user.run("monitor.sh", run)
    screen = whole.stdout + whole.stderr
    assert (row["STATE"], row["HEALTH"]) == (found["state"], found["health"])
    assert f"  state       {state}\n" in screen
    return found


def training(user: Site, run: str, attempts: int) -> None:
    """The attempt has come to its first step; how long that takes is not the monitor's."""

    def trains() -> bool:
        names = "".join(f"{event['event']} " for event in user.folder(run).events())
        return (
            names.count("attempt ") == attempts and "training " in names.rpartition("attempt ")[2]
        )

    user.wait_until(trains, f"attempt {attempts}")
    facts = says(user, run, "RUNNING", "good")
    assert facts["attempts"] == attempts


def test_each_state_of_a_job_is_told_within_seconds(user):
    change = user.cluster.run
    job = user.submit("run.name=seen", *LONG, *PAIR, "--hold")
    facts = says(user, "seen", "HELD", "held", f"held by you: scontrol release {job}")
    assert (facts["slurm_state"], facts["job"]) == ("PENDING", job)
    change("scontrol", "update", f"JobId={job}", "StartTime=now+1hour")
    change("scontrol", "release", job)
    facts = says(user, "seen", "QUEUED", "queued", "it asked for that")
    assert facts["next_action"] is None
    change("scontrol", "update", f"JobId={job}", "StartTime=now")
    says(user, "seen", "STARTING", "starting", seconds=30)
    training(user, "seen", 1)
    change("scontrol", "suspend", job)
    says(user, "seen", "SUSPENDED", "suspended")
    change("scontrol", "resume", job)
    says(user, "seen", "RUNNING", "good")
    done = user.steps("seen")  # Slurm says so first; a signal in between is lost
    user.wait_until(lambda: user.steps("seen") > done, "a step")
    change("scancel", "--batch", "--signal=USR1", job)
    user.wait_until(lambda: user.cluster.job(job)["Restarts"] == "1", "a requeue")
    says(user, "seen", "PAUSED, QUEUED", "queued", "was requeued")
    training(user, "seen", 2)
    os.kill(rank_process("seen", 1), signal.SIGKILL)
    training(user, "seen", 3)
    change("scancel", job)
    user.cluster.wait(job, timeout=60)
    facts = says(user, "seen", "PAUSED", "paused")
    assert "bash submit.sh --resume seen" in facts["next_action"]
    more = facts["step"] + 200
    job = user.submit("--resume", "seen", f"train.max_steps={more}", *PAIR)
    user.wait_until(lambda: user.folder("seen").status()["state"] == "DONE", "the end")
    facts = says(user, "seen", "DONE", "done")
    assert facts["step"] == facts["max_steps"] == more
    assert user.cluster.wait(job, timeout=60) == "COMPLETED"


@pytest.mark.matrix
def test_a_job_whose_node_dies_is_told_within_seconds(user):
    job = user.submit("run.name=lost", *LONG, *PAIR)
    training(user, "lost", 1)
    head = user.folder("lost").status()["nodes"][0]
    user.cluster.crash(head)
    try:
        user.wait_until(lambda: user.cluster.job(job)["Restarts"] == "1", "a requeue", 240)
        if user.cluster.job_state(job) == "COMPLETING":
            says(user, "lost", "RUNNING", "ending")
        user.wait_until(lambda: user.cluster.job_state(job) == "PENDING", "the queue", 60)
        says(user, "lost", "QUEUED", "queued")
        training(user, "lost", 2)
    finally:
        user.cluster.start_slurmd(head)
        user.cluster.run("scancel", job)
        user.cluster.wait(job, timeout=60)
