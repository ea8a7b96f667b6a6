"""The fault matrix on a real Slurm: warned, killed, requeued and cut off, then equal to the bit.

What needs a minute or more of Slurm's own waiting carries the mark ``matrix`` and runs with
``bash tests/run.sh -m matrix`` only.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import tiny
from lab import Lab, wait_until, write_row
from slurm_cluster import SlurmCluster, missing_requirements
from slurm_user import PAIR, Site, processes_of, rank_process
from trainstack.checkpoint import names
from trainstack.resilience.faults import SLOW_SECONDS
from trainstack.units import seconds_of

pytestmark = pytest.mark.slurm
RUN = ("train.max_steps=120", "checkpoint.save_steps=10", "eval.eval_steps=60")
LONG = ("train.max_steps=1200", "checkpoint.save_steps=50", "eval.eval_steps=600")
SLOW = "slow:rank=0,step=1"  # 0.1 s a step in the first attempt: time to do something to it


@pytest.fixture(scope="module")
def reference(home, tmp_path_factory):
    """The same settings on two processes of this machine, left alone."""
    return Lab(home, tmp_path_factory.mktemp("reference")).train("reference", *RUN)


@pytest.fixture(scope="module")
def long_reference(home, tmp_path_factory):
    return Lab(home, tmp_path_factory.mktemp("long")).train("long", *LONG)


@pytest.fixture(scope="module")
def cgroup_user(home, cluster, tmp_path_factory):
    """A user of a second cluster, whose slurmd tracks processes by cgroup."""
    missing = missing_requirements("cgroup")
    if missing:
        pytest.skip(f"no cluster with proctrack/cgroup here: {'; '.join(missing)}")
    shared = tmp_path_factory.mktemp("cgroup")
    lab = Lab(home, shared)
    hosts = ("cnode1", "cnode2")
    with SlurmCluster(tmp_path_factory.mktemp("slurm-cgroup"), hosts, proctrack="cgroup") as second:
        yield Site(lab.checkout, second)


def begun(user: Site, run: str, step: int = 25) -> None:
    wait_until(lambda: user.steps(run) >= step, f"step {step} of {run}", 90)


def ended(user: Site, run: str, job: str, seconds: float = 180) -> None:
    states = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    state = user.cluster.wait(job, states=states, timeout=seconds)
    assert state == "COMPLETED", user.log(run, job)


def warned_stop(user: Site, run: str, row: str, reference) -> None:
    job = user.submit(f"run.name={run}", *RUN, *PAIR, fault=SLOW)
    begun(user, run)
    user.cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended(user, run, job)
    trace = user.trace(run)
    assert trace.redone() == 0, "a warned stop costs no step"
    assert user.cluster.job(job)["Restarts"] == "1"
    user.why(run, row, "DONE", "PAUSED", "Slurm warned of the end of the job", "no step;",
             "saved; the job went back into the queue", "Slurm or whoever asked")  # fmt: skip
    trace.record(row, "scancel -b -s USR1", reference, trace.events("paused")[0]["cause"])


def test_a_warned_job_loses_no_step_under_linuxproc(user, reference):
    warned_stop(user, "f02", "F02", reference)


@pytest.mark.matrix
def test_a_warned_job_loses_no_step_under_cgroup(cgroup_user, reference):
    warned_stop(cgroup_user, "f06", "F06", reference)


def killed_agent(user: Site, run: str, row: str, reference) -> None:
    """SIGKILL of one torchrun: its ranks die with it, the job continues in place."""
    job = user.submit(f"run.name={run}", *RUN, *PAIR, fault=SLOW)
    begun(user, run)
    rank = rank_process(run, 1)
    orphans = set(processes_of(run, "RANK=1"))
    agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: not orphans & set(processes_of(run)), "the end of its ranks", 3)
    ended(user, run, job)
    trace = user.trace(run)
    assert len(trace.events("attempt")) == 2
    assert user.cluster.job(job)["Restarts"] == "0", "without a new wait in the queue"
    cause = trace.events("failed")[0]["cause"]
    assert re.match(
        r"rank 1 on c?node2: disappeared without a report, and the others lost it", cause
    )
    user.why(run, row, cause, "restarted in place", "redone", "the infrastructure",
             f"--exclude={cause.split()[3].rstrip(':')}")  # fmt: skip
    trace.record(row, "kill -9 of the torchrun of rank 1", reference, cause)


@pytest.mark.matrix  # tests/resilience/test_orphans.py kills one too
def test_a_killed_torchrun_leaves_no_orphan_under_linuxproc(user, reference):
    killed_agent(user, "f09", "F09 linuxproc", reference)


@pytest.mark.matrix
def test_a_killed_torchrun_leaves_no_orphan_under_cgroup(cgroup_user, reference):
    killed_agent(cgroup_user, "f09c", "F09 cgroup", reference)


def test_a_second_job_on_a_run_is_refused_within_seconds_and_the_first_continues(user, reference):
    """As if somebody had submitted train.slurm by hand, past the check of submit.sh."""
    job = user.submit("run.name=f16", *RUN, *PAIR, fault=SLOW)
    begun(user, "f16", 5)
    folder = user.folder("f16").path
    started = time.monotonic()
    second = user.cluster.run(
        "sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--time=5",
        f"--output={folder}/logs/%j.out", f"--chdir={folder}", f"{folder}/code/train.slurm", folder,
    ).stdout.strip()  # fmt: skip
    assert user.cluster.wait(second, timeout=60) == "FAILED"
    seconds = time.monotonic() - started
    log = (folder / "logs" / f"{second}.out").read_text()
    assert user.cluster.job(second)["ExitCode"] == "78:0", log
    assert f"job {job} (attempt 1) on node" in log
    ended(user, "f16", job)
    trace = user.trace("f16")
    assert trace.redone() == 0
    assert trace.equals(reference)
    trace.ledger()
    user.why("f16", "F16", "DONE", "REFUSED: rank 0 on node", f"job {job} (attempt 1) on node",
             f"job {second}, attempt 1", "lost no step", "refused it")  # fmt: skip
    write_row("F16", fault="a second job on the same run", redone=0, repeated=0, skipped=0,
              identical=True, seconds=seconds, code=78, message=log.splitlines()[-1])  # fmt: skip


def test_a_chain_continues_without_requeueing_and_its_rest_ends_at_once(user, reference):
    """For sites that forbid requeueing: one job is warned, one finishes, the third just ends."""
    first = user.submit("run.name=f33", "--chain", "3", *RUN, *PAIR, fault=SLOW)
    jobs = [e["job"] for e in user.folder("f33").events() if e["event"] == "submitted"]
    assert len(jobs) == 3
    assert jobs[0] == first
    begun(user, "f33")
    user.cluster.run("scancel", "--batch", "--signal=USR1", first)
    for job in jobs:
        ended(user, "f33", job)
    trace = user.trace("f33")
    assert trace.redone() == 0
    assert [e["job"] for e in trace.events("attempt")] == jobs[:2]
    assert "complete: DONE at step 120; nothing to do" in user.log("f33", jobs[2])
    assert {user.cluster.job(job)["Restarts"] for job in jobs} == {"0"}
    user.why("f33", "F33", "Slurm warned of the end", "saved", f"job {jobs[1]} continued it")
    trace.record("F33", "chain of 3, USR1", reference, trace.events("paused")[0]["cause"])


@pytest.mark.matrix
def test_a_job_ends_itself_before_its_time_limit_without_any_signal(user, long_reference):
    options = (*PAIR[:-1], "--time=1", "--signal=B:USR1@1")
    job = user.submit("run.name=f01", *LONG, *options, fault=SLOW)
    ended(user, "f01", job, 240)
    trace = user.trace("f01")
    assert trace.redone() == 0
    cause = trace.events("paused")[0]["cause"]
    assert "to the end of the job, a step and a save take" in cause
    user.why("f01", "F01", "PAUSED", "to the end of the job", "saved; the job went back")
    trace.record("F01", "time limit of a minute, no signal", long_reference, cause)


@pytest.mark.matrix
def test_preempted_jobs_lose_no_step_with_and_without_a_grace_time(user, reference):
    jobs = {}
    for run, partition in (("f03", "grace"), ("f04", "low")):
        one = ("--", f"--partition={partition}", "--nodes=1", "--gpus-per-node=2")
        jobs[run] = user.submit(
            f"run.name={run}", *RUN, *one, "--cpus-per-task=2", "--time=10", fault=SLOW
        )
    for run in jobs:
        begun(user, run)
    preemptor = user.cluster.run(
        "sbatch", "--parsable", "--nodes=3", "--exclusive", "--time=5", "--output=/dev/null",
        "--wrap", "sleep 2",
    ).stdout.strip()  # fmt: skip
    user.cluster.wait(preemptor, timeout=120)
    for run, job in jobs.items():
        ended(user, run, job, 240)
        trace = user.trace(run)
        assert trace.redone() == 0
        assert user.cluster.job(job)["Restarts"] == "1"
        row = {"f03": "F03", "f04": "F04"}[run]
        grace = {"f03": "20", "f04": "0"}[run]
        cause = trace.events("paused")[0]["cause"]
        why = {"f03": "Slurm needed the nodes for another job", "f04": "DUE TO PREEMPTION"}[run]
        user.why(run, row, "PAUSED", why, "no step;", "saved; the job went back into the queue")
        trace.record(row, f"preemption, GraceTime={grace}", reference, cause)


@pytest.mark.matrix
def test_requeued_and_cancelled_from_outside(user, reference):
    job = user.submit("run.name=f05", *RUN, *PAIR, fault=SLOW)
    begun(user, "f05")
    user.cluster.run("scontrol", "requeue", job)
    wait_until(lambda: user.folder("f05").status().get("attempt") == 2, "the second attempt", 120)
    ended(user, "f05", job, 240)
    trace = user.trace("f05")
    assert trace.redone() == 0
    user.why("f05", "F05 requeue", "PAUSED", "SIGTERM", "saved; the job went back into the queue")
    trace.record("F05 requeue", "scontrol requeue", reference, trace.events("paused")[0]["cause"])

    job = user.submit("run.name=f05b", *RUN, *PAIR, fault=SLOW)
    begun(user, "f05b")
    user.cluster.run("scancel", job)
    assert user.cluster.wait(job, timeout=60) == "CANCELLED"
    assert user.folder("f05b").status()["state"] == "PAUSED"
    user.why("f05b", "F05 scancel, not resumed", "PAUSED", "Slurm says CANCELLED",
             "nothing to redo", "ended the job in order", "--resume f05b")  # fmt: skip
    ended(user, "f05b", user.submit("run.name=f05b", *RUN, *PAIR))
    trace = user.trace("f05b")
    assert trace.redone() == 0
    user.why("f05b", "F05 scancel", "DONE", "PAUSED", "Slurm says CANCELLED", "continued it")
    trace.record("F05 scancel", "scancel, submitted again", reference,
                 trace.events("paused")[0]["cause"])  # fmt: skip


@pytest.mark.matrix
def test_of_two_attempts_of_one_job_only_the_later_publishes(user, long_reference):
    """slurmd dies, its job runs on; Slurm requeues it elsewhere: both run at the same time."""
    one = ("--", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", "--time=10")
    job = user.submit("run.name=f15", *LONG, *one, fault=SLOW)
    begun(user, "f15", 60)
    node = user.folder("f15").status()["nodes"][0]
    old_ranks = set(processes_of("f15"))
    kill_slurmd(user.cluster, node)
    try:
        wait_until(lambda: user.folder("f15").status().get("attempt") == 2, "a second attempt", 120)
        assert old_ranks & set(processes_of("f15")), "both attempts run"
        wait_until(lambda: user.folder("f15").status()["state"] == "DONE", "the end", 120)
        wait_until(lambda: not old_ranks & set(processes_of("f15")), "the end of the first attempt")
    finally:
        user.cluster.start_slurmd(node)
    ended(user, "f15", job, 120)
    trace = user.trace("f15")
    status = trace.run.status()
    assert (status["state"], status["attempt"]) == ("DONE", 2)
    newest = max(step for step, _ in names.checkpoints(trace.run.checkpoints))
    assert newest == 1200
    message = trace.run.failures(job, 1)[0]["cause"]
    assert "took over" in message
    assert trace.equals(long_reference)
    trace.ledger()
    user.why("f15", "F15", "the job went back into the queue", f"--exclude={node}",
             f"not among its nodes since: {node}", "the infrastructure")  # fmt: skip
    write_row("F15", fault="kill -9 of slurmd", redone=trace.redone(), repeated=0, skipped=0,
              identical=True, seconds=None, code=78, message=message)  # fmt: skip


def kill_slurmd(cluster: SlurmCluster, node: str) -> None:
    for path in cluster.folder.glob(f"slurmd.{node}.pid"):
        os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.matrix
def test_a_job_whose_head_node_dies_continues_elsewhere(user, reference):
    job = user.submit("run.name=f23", *RUN, *PAIR, fault=SLOW)
    begun(user, "f23")
    head = user.folder("f23").status()["nodes"][0]
    user.cluster.crash(head)
    try:
        ended(user, "f23", job, 240)
    finally:
        user.cluster.start_slurmd(head)
    trace = user.trace("f23")
    assert head not in trace.run.status()["nodes"]
    assert trace.redone() <= 10
    user.why("f23", "F23", "DONE", "NODE_LOST", f"not among its nodes since: {head}",
             "the job went back into the queue", f"--exclude={head}")  # fmt: skip
    trace.record("F23", "power cut of the head node", reference, "NODE_FAIL, requeued by Slurm")


@pytest.mark.matrix
def test_a_network_that_is_cut_for_a_while_tears_nothing(user, reference):
    for row, run, seconds in (("F24 5 s", "f24a", 5), ("F24 60 s", "f24b", 60)):
        job = user.submit(f"run.name={run}", *RUN, *PAIR, fault=SLOW)
        begun(user, run)
        node = user.folder(run).status()["nodes"][1]
        user.cluster.cut(node, seconds)
        ended(user, run, job, 300)
        trace = user.trace(run)
        last = trace.events("failed", "hang", "paused", "node_lost")
        message = "rode through"
        if last:
            message = last[0].get("cause", "the node was lost")
        elif len(trace.events("attempt")) > 1:
            message = "NODE_FAIL, requeued by Slurm"
        words = ["nothing is wrong"]
        if len(trace.events("attempt")) > 1:
            words = [node, "the infrastructure", "the job went back into the queue"]
        user.why(run, row, *words)
        trace.record(row, f"network of a node cut for {seconds} s", reference, message)


@pytest.mark.matrix
def test_slurmctld_may_be_restarted_while_a_job_runs(user, reference):
    job = user.submit("run.name=f32", *RUN, *PAIR, fault=SLOW)
    begun(user, "f32")
    user.cluster.restart_controller()
    ended(user, "f32", job)
    trace = user.trace("f32")
    assert trace.redone() == 0
    assert len(trace.events("attempt")) == 1
    user.why("f32", "F32", "DONE at step 120/120; nothing is wrong")
    trace.record("F32", "slurmctld killed and started", reference, "undisturbed")


@pytest.mark.matrix
def test_a_port_that_is_taken_is_passed_over(user, reference):
    """The port follows from the job id, so the test takes those of the next jobs."""
    last = int(user.submit("run.name=f25-before", "train.max_steps=1", *PAIR))
    first = 20000 + (last + 2) % 10000
    code = f"""if True:
        import socket, time
        taken = []
        for port in range({first}, {first} + 3):
            taken.append(socket.socket())
            taken[-1].bind(("", port))
            taken[-1].listen()
        print("taken", flush=True)
        time.sleep(300)"""
    holders = [
        subprocess.Popen([*user.cluster.enter(host), "python3", "-c", code], stdout=subprocess.PIPE)
        for host in user.cluster.hosts
    ]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"taken\n"
        job = user.submit("run.name=f25", *RUN, *PAIR)
        ended(user, "f25", job)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    port = int(user.log("f25", job).partition("meeting at ")[2].split(":")[1].split()[0])
    assert port >= first + 1
    trace = user.trace("f25")
    user.why("f25", "F25", "DONE at step 120/120; nothing is wrong")
    trace.record("F25", f"ports {first} to {first + 2} taken", reference, f"met at port {port}")


NAMES = [  # what node2 sees of node1, and what is said of it
    ("missing", lambda text: re.sub(r"(?m)^.* node1$", "", text), "node2 cannot find node1, where"),
    ("loopback", lambda text: re.sub(r"(?m)^.* node1$", "127.0.1.1 node1", text),
     "node2 takes node1, where the nodes meet, for itself (127.0.1.1)"),
]  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "change", "words"), NAMES, ids=[name[0] for name in NAMES])
def test_a_node_that_cannot_find_the_meeting_point_is_named_at_once(user, kind, change, words):
    started = time.monotonic()
    with user.cluster.names_on("node2", change):
        job = user.submit(f"run.name=f26-{kind}", *RUN, *PAIR)
        state = user.cluster.wait(job, timeout=120)
    seconds = time.monotonic() - started
    log = user.log(f"f26-{kind}", job)
    assert state == "FAILED", log
    status = user.folder(f"f26-{kind}").status()
    assert status["cause"].startswith(words), log
    assert status["exit_code"] == 2
    assert len(user.trace(f"f26-{kind}").events("attempt")) == 1, "it is not tried again"
    assert seconds < 60
    user.why(f"f26-{kind}", f"F26 {kind}", words, "the infrastructure", "on other nodes only",
             "--exclude=node2; then: bash", f"--resume f26-{kind}")  # fmt: skip
    write_row(f"F26 {kind}", fault=f"node1 {kind} in the hosts file of node2", redone=0, repeated=0,
              skipped=0, identical=None, seconds=None, code=2, message=status["cause"])  # fmt: skip


@pytest.mark.matrix
def test_a_straggler_is_named_and_is_no_reason_to_restart(user, long_reference):
    job = user.submit("run.name=f30", *LONG, *PAIR, fault="slow:rank=1,step=30")
    ended(user, "f30", job, 300)
    trace = user.trace("f30")
    assert len(trace.events("attempt")) == 1
    goodput = tiny.run_command("goodput", trace.run.path).stdout
    assert "training" in goodput
    ((named,), over) = trace.events("slow_rank"), trace.events("slow_rank_over")
    assert (named["rank"], named["host"], over) == (1, "node2", [])
    slow_since = next(record["at"] for record in trace.steps() if record["step"] == 31)
    assert seconds_of(named["at"]) - slow_since < 120
    evidence = trace.run.evidence(job, 1, 1)
    log = user.log("f30", job)
    assert f"slow    step {named['step']:,}: {named['cause']}" in log
    assert f"[rank 1] slow    node2: {evidence}" in log
    shown = trace.run.rank_seconds()
    assert shown["hosts"] == ["node1", "node2"]
    assert shown["seconds"][1] > SLOW_SECONDS > shown["seconds"][0]
    user.why("f30", "F30", "SLOW at step", "rank 1 on node2", "named it, and trained on",
             "--exclude=node2")  # fmt: skip
    trace.record("F30", "one rank 0.1 s slower from step 30", long_reference, named["cause"])
