"""train.slurm and job.sh against fake Slurm commands: launch, attempts, signals, ends."""

import json
import os
import re
import shlex
import signal
import socket
import sys
import time

import pytest
from fake_site import BASH, Job, complaint

from lab import wait_until
from trainstack.run.states import EXIT_CODES


def test_srun_and_torchrun_get_exactly_these_arguments(job):
    code, errors = job.wait()
    assert code == 0, errors
    port = job.value("--rdzv-endpoint").partition(":")[2]
    assert job.command() == [
        "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--export=ALL",
        "--gres=gpu:4", "--cpus-per-task=16",
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
    job.wait(NPROC_PER_NODE="3", OMP_NUM_THREADS="7")
    assert job.value("--nproc-per-node") == "3"
    assert job.value("--expect-world-size") == "6"
    assert job.commands.environment("srun")["OMP_NUM_THREADS"] == "7"


def test_a_node_without_gpus_gets_two_processes(job):
    job.wait(SLURM_GPUS_ON_NODE=None)
    assert job.value("--nproc-per-node") == "2"
    assert job.commands.environment("srun")["OMP_NUM_THREADS"] == "8"


CORES = [
    # SLURM_JOB_CPUS_PER_NODE -> of each task, threads of each of four processes
    ("16(x2)", "16", "4"),
    ("16,12", "12", "3"),
    ("64(x3),2(x2)", "2", "1"),
]


@pytest.mark.parametrize(("told", "cores", "threads"), CORES)
def test_a_task_has_all_cores_of_the_job_on_its_node_whatever_was_asked(job, told, cores, threads):
    options = ("CPUS_PER_TASK", "CPUS_PER_GPU", "NTASKS", "NTASKS_PER_NODE", "TRES_PER_TASK",
               "GPUS_PER_TASK", "GPUS_PER_NODE", "GPU_BIND", "CPU_BIND")  # fmt: skip
    code, errors = job.wait(
        SLURM_JOB_CPUS_PER_NODE=told, SRUN_CPUS_PER_TASK="1",
        **{f"SLURM_{name}": "1" for name in options},
    )  # fmt: skip
    assert code == 0, errors
    assert job.value("--cpus-per-task") == cores
    seen = job.commands.environment("srun")
    assert seen["OMP_NUM_THREADS"] == threads
    assert not {"SRUN_CPUS_PER_TASK", *(f"SLURM_{name}" for name in options)} & seen.keys()


def test_the_gpus_of_a_site_that_does_not_count_them_are_counted_on_the_node(job):
    job.commands.add("nvidia-smi", "echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'")
    job.wait(SLURM_GPUS_ON_NODE=None)
    assert job.value("--nproc-per-node") == "3"
    assert not [word for word in job.command() if word.startswith("--gres")]


def test_gpus_that_slurm_spread_unevenly_are_refused_with_the_option_that_helps(job):
    code, errors = job.wait(SLURM_GPUS="h100:7")
    assert code == 2, errors
    cause = job.run.status()["cause"]
    assert cause.startswith("Slurm spread 7 GPUs unevenly over 2 nodes; ask for as many on each")
    assert job.launches() == []


@pytest.mark.parametrize(("requested", "is_elsewhere"), [("(null)", True), ("gpu-[07-08]", False)])
@pytest.mark.parametrize("chain", [None, "1"])
def test_a_node_that_does_not_see_the_environment_is_named_and_left_out(
    job, requested, is_elsewhere, chain
):
    job.commands.add("squeue", "printf 'job|78\\njob|79\\n'")
    job.commands.add("srun", "echo 'Welcome'; echo 'blind|gpu-08'; exit 0")
    job.commands.add(
        "scontrol",
        f'case "$1 $2" in "show hostnames") echo gpu-07 ;; "show job") echo "   Partition=p x=1";'
        f" echo '   ReqNodeList={requested} ExcNodeList=(null)' ;; esac",
    )
    job.commands.add("sinfo", "echo 'nodes|7'")
    code, errors = job.wait(TRAINSTACK_CHAIN=chain)
    assert code == ((0 if chain else 75) if is_elsewhere else 2), errors
    status = job.run.status()
    assert status["cause"].startswith(f"gpu-08: no sight of {job.python} or {job.run_dir}")
    assert status["state"] == ("PAUSED" if is_elsewhere else "FAILED")
    assert job.launches() == []
    assert (requeues(job) == [["requeue", "77"]]) is (is_elsewhere and not chain)
    updated = [call[1] for call in job.commands.calls("scontrol") if call[0] == "update"]
    jobs = ["JobId=78,79"] if chain else ["JobId=77"]
    assert updated == (jobs if is_elsewhere else [])


@pytest.mark.parametrize("code", [1, 2])
def test_a_step_that_srun_cannot_start_is_quoted_and_tried_again(job, code):
    said = "srun: error: Task launch failed on node gpu-07: x"
    job.commands.add("srun", f"echo '{said}' >&2; exit {code}")
    ended, errors = job.wait()
    assert ended == 76, errors
    said = f"srun fails on gpu-[07-08] (code {code}): {said}"
    assert said in job.run.status()["cause"]


def test_a_node_without_the_environment_says_so_in_the_log(job):
    job.python.rename(job.python.with_name("gone"))
    code, errors = job.wait()
    assert code == 1
    assert f"does not see {job.python}; all nodes must share the file system" in errors


def test_a_preempted_job_whose_ranks_could_not_hear_of_it_yet_is_paused(job):
    """Slurm sends SIGTERM to the tasks alone, and they die while they import."""
    job.ranks("exit 143")
    job.commands.add(
        "scontrol",
        'case "$1 $2" in "show hostnames") echo gpu-07 ;;'
        ' "show job") echo "  PreemptTime=2026-11-29T18:00:00 StartTime=2026-11-29" ;; esac',
    )
    code, errors = job.wait()
    assert code == 75, errors
    status = job.run.status()
    assert (status["state"], status["cause"]) == (
        "PAUSED", "Slurm needed the nodes for another job",
    )  # fmt: skip
    assert "preempted" in [event["event"] for event in job.run.events()]
    assert requeues(job) == [["requeue", "77"]]


def test_a_job_leaves_nothing_on_the_disks_of_its_nodes(job):
    scratch = job.folder / f"trainstack-{os.getuid()}-77"
    job.ranks(f'mkdir -p "$TMPDIR/x"; {job.status("DONE")}')
    code, errors = job.wait()
    assert code == 0, errors
    assert job.commands.environment("srun")["TMPDIR"] == str(scratch)
    assert not scratch.exists()
    assert job.commands.calls("srun")[-1][-3:] == ["rm", "-rf", str(scratch)]


def test_nothing_of_a_persons_own_python_reaches_the_ranks(job):
    job.wait(PYTHONHOME=None, PYTHONUSERBASE="/u", PYTHONSTARTUP="/s")
    seen = job.commands.environment("srun")
    assert seen["PYTHONNOUSERSITE"] == "1"
    assert not {"PYTHONUSERBASE", "PYTHONSTARTUP"} & seen.keys()


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
    code, errors = job.wait(SLURM_JOB_NUM_NODES="2000")
    assert code == 0, errors
    assert job.value("--rdzv-endpoint").startswith("a-rather-long-host-name-1000:")


def test_a_banner_of_the_site_is_no_host(job):
    job.commands.add("scontrol", "echo 'Welcome to x'; printf 'gpu-07\\ngpu-08\\n'; echo Bye, all")
    code, errors = job.wait()
    assert code == 0, errors
    assert job.value("--rdzv-endpoint").startswith("gpu-07:")


def test_no_hosts_no_launch(job):
    """Nodes that each fell back to themselves would train alone, as many times as there are."""
    job.commands.add("scontrol", "echo 'slurm_load_node error' >&2; exit 1")
    code, errors = job.wait()
    assert code == 1
    assert "slurm_load_node error" in errors
    assert job.launches() == []
    assert job.run.status()["state"] == "FAILED"  # and not QUEUED for ever


def test_a_module_that_does_not_load_makes_the_job_failed_before_its_first_attempt(job):
    job.run.set_status("QUEUED", job=None, attempt=None)
    job.commands.add("module", "echo 'no such module' >&2; exit 1")
    code, errors = job.wait(MODULES="cuda/0")
    assert code == 1
    assert "no such module" in errors
    assert job.launches() == []
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
    job.ranks(f"umask >{job.folder}/umask\n{job.status('DONE')}")
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
    job.commands.add("squeue", 'case "$*" in *%e*) echo "end|2030-01-02T03:04:05" ;; esac')
    job.wait(SLURM_JOB_END_TIME=None, TZ="UTC")
    assert job.value("--ends-at") == "1893553445"
    assert ["--noheader", "--jobs=77", "--format=end|%e"] in job.commands.calls("squeue")


@pytest.mark.parametrize("answer", ["exit 1", "echo 'end|N/A'"])
def test_an_end_that_nobody_knows_is_left_out(job, answer):
    """An empty date is last midnight to date(1): the job would stop at its first step."""
    job.commands.add("squeue", answer)
    job.wait(SLURM_JOB_END_TIME=None)
    assert "--ends-at" not in job.command()


@pytest.mark.parametrize(("queue", "is_gone"), [("55", False), ("56", True)])
def test_a_job_that_slurm_no_longer_has_is_told_to_the_ranks(job, queue, is_gone):
    holder = {"job": "55", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (job.run_dir / "lease" / "1.json").write_text(json.dumps(holder))
    job.commands.add("squeue", f"echo 'job|{queue}|RUNNING|1:00|None|gpu-07'")
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
    job.ranks(f"{job.status(written) if written else ':'}; exit {srun}")
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
    job.ranks(job.status("DONE", job="12"))
    code, errors = job.wait()
    assert code == 76, errors
    assert "FAILED" in errors
    assert job.run.status()["state"] == "NO_PROGRESS"


def test_a_job_whose_run_is_done_ends_at_once_and_in_order(job):
    job.run.set_status("DONE", job="12", attempt=1, step=5)
    before = (job.run_dir / "status.json").read_bytes()
    code, errors = job.wait()
    assert (code, errors) == (0, "first: complete: DONE at step 5; nothing to do\n")
    assert job.launches() == []
    assert job.run.events() == []
    assert (job.run_dir / "status.json").read_bytes() == before


def test_the_first_culprit_among_the_ranks_is_named(job):
    for rank, victim, cause in ((0, True, "lost rank 1"), (1, False, "no space left")):
        job.run.add_failure("77", 1, rank, "FAILED", 1, cause, is_victim=victim)
    job.ranks(job.in_turn("exit 1", job.status("DONE")))
    code, errors = job.wait()
    assert code == 0, errors
    assert re.search(r"first: FAILED at step 0: rank 1 on \S+: no space left", errors)
    assert "lost rank 1" not in errors


def test_an_attempt_that_fails_is_followed_by_the_next_in_the_same_job(job):
    job.make_checkpoint(5)
    fails = f"{job.status('RUNNING')}; exit 1"
    job.ranks(job.in_turn(fails, job.status("DONE")))
    code, errors = job.wait()
    assert code == 0, errors
    assert job.attempts() == ["1", "2"]
    first, second = job.launches()
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
    job.ranks(job.in_turn(*bodies, job.status("DONE")))
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
    job.ranks(job.in_turn("exit 1", job.status("DONE")))
    ended, errors = job.wait()
    assert ended == (ends or 0), errors
    assert job.attempts() == (["1"] if ends else ["1", "2"])
    who = "" if state == "DIVERGED" else r"rank 0 on \S+: "  # of all ranks alike
    assert re.search(rf"first: {state} at step 0: {who}a reason", errors)
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
    job.ranks("exit 1")
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


def warn(job: Job, *signals: int) -> tuple[int, str]:
    """Send signals to the batch shell while srun runs, see them through; its code and stderr."""
    process = job.start()
    try:
        wait_until((job.folder / "pid").exists, "srun", seconds=20)
        for number in signals:
            os.kill(process.pid, number)
            wait_until(job.stop_file.exists, "the stop file", seconds=5)
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
    job.ranks(hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert job.stop_file.read_text() == "Slurm warned of the end of the job\n"
    assert requeues(job) == [["requeue", "77"]]
    assert "train.slurm: back to the queue\n" in errors
    assert job.attempts() == ["1"]


def test_a_job_that_was_ended_by_hand_saves_and_stays_ended(job):
    job.ranks(hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGTERM)
    assert code == 75, errors
    assert job.stop_file.read_text() == "the job was asked to end\n"
    assert requeues(job) == []


def test_a_warned_job_that_is_then_ended_is_left_to_slurm(job):
    job.ranks(hold(job, job.status("PAUSED")))
    code, errors = warn(job, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)
    assert code == 75, errors
    assert errors.count("the ranks will save and stop") == 1
    assert requeues(job) == []


def test_a_warned_job_that_was_done_anyway_is_done(job):
    job.ranks(hold(job, job.status("DONE")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 0, errors
    assert requeues(job) == []


def test_an_attempt_that_fails_after_the_job_was_asked_to_end_is_not_followed_by_another(job):
    job.run.add_failure("77", 1, 0, "FAILED", 1, "no space left", is_victim=False)
    job.ranks(hold(job, ":"))
    code, errors = warn(job, signal.SIGTERM)
    assert code == 1, errors
    assert job.attempts() == ["1"]
    status = job.run.status()
    assert (status["state"], status["exit_code"]) == ("FAILED", 1)
    assert "restarting" not in errors
    assert requeues(job) == []


def test_a_job_that_is_asked_to_end_between_two_attempts_does_not_seem_to_go_on(job):
    job.run.add_failure("77", 1, 0, "FAILED", 1, "no space left", is_victim=False)
    job.ranks("exit 1")
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
    job.ranks(hold(job, ":"))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert "no space left" in errors
    assert job.attempts() == ["1"]
    assert job.run.status()["state"] == "PAUSED"
    assert requeues(job) == [["requeue", "77"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_were_gone_before_they_could_begin_leave_a_paused_run(job, number):
    job.ranks(hold(job, ":"))
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
    job.ranks(hold(job, job.status("RUNNING")))
    code, errors = warn(job, signal.SIGUSR1)
    assert code == 75, errors
    assert job.run.status()["cause"].endswith(", before the ranks had saved")
    assert "resumes from checkpoint-5: 4 steps to redo" in errors


def test_a_stop_file_of_an_earlier_process_of_this_name_stops_nobody(job):
    job.stop_file.write_text("of long ago")
    stop_file = shlex.quote(str(job.stop_file))
    job.ranks(f"[[ ! -e {stop_file} ]] || exit 1\n{job.status('DONE')}")
    code, errors = job.wait()
    assert code == 0, errors
    assert job.attempts() == ["1"]


def test_a_site_that_does_not_requeue_is_told_what_to_do(job):
    job.ranks(job.status("PAUSED"))
    job.commands.add("scontrol", '[[ "$1" != requeue ]] || exit 1; echo gpu-07')
    code, errors = job.wait()
    assert code == 75
    assert errors.endswith(
        "train.slurm: this site does not requeue; to resume: bash submit.sh --resume first; "
        "to queue the jobs that follow in advance, too: --chain N\n"
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
    assert job.launches() == []
    assert requeues(job) == []


CHAINED = ["--noheader", "--states=PENDING", "--name=first-5eed1e55", "--format=job|%A"]


def test_a_paused_job_of_a_chain_leaves_in_order_and_the_next_goes_on(job):
    job.ranks(job.status("PAUSED"))
    job.commands.add("squeue", "printf 'job|78\\njob|79\\n'")
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
    job.ranks(job.status("PAUSED"))
    job.commands.add("squeue", queue)
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == 75, errors
    assert "last job of the chain; to resume: bash submit.sh --chain N --resume first\n" in errors
    assert requeues(job) == []


@pytest.mark.parametrize("state", ["NO_PROGRESS", "DIVERGED", "REFUSED"])
def test_what_a_person_has_to_look_at_ends_the_rest_of_a_chain(job, state):
    job.run.set_status(state, job="76", attempt=1)
    code, errors = job.wait(TRAINSTACK_CHAIN="1")
    assert code == EXIT_CODES[state]
    assert errors == f"first: {state} in job 76: the rest of the chain does not continue\n"
    assert job.launches() == []
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


# --- The report


def ask_for_a_report(job: Job) -> None:
    (job.run_dir / "config.yaml").write_text("log:\n  report_to: [html]\n")


@pytest.mark.parametrize(("state", "ended"), [("DONE", 0), ("DIVERGED", 79)])
def test_a_report_that_breaks_changes_nothing_of_the_end(job, state, ended):
    ask_for_a_report(job)
    page = job.run_dir / "code/trainstack/report/page.py"
    page.write_text("raise RuntimeError('a page that breaks')\n")
    job.ranks(job.status(state))
    code, errors = job.wait()
    assert code == ended, errors
    assert "train.slurm: no report was written (RuntimeError: a page that breaks, code 1)" in errors


def test_a_report_that_takes_long_is_given_up_and_changes_nothing_of_the_end(job):
    ask_for_a_report(job)
    page = job.run_dir / "code/trainstack/report/page.py"
    page.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(50)\n"
    )
    begun = time.monotonic()
    code, errors = job.wait()
    assert code == 0, errors
    assert "train.slurm: no report was written (code 137)" in errors
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize(("answer", "is_written"), [(0, False), (1, True)])
def test_a_requeue_does_not_wait_for_the_report(job, answer, is_written):
    ask_for_a_report(job)
    job.commands.add("scontrol", f'echo gpu-07; [[ "$1" != requeue ]] || exit {answer}')
    job.ranks(job.status("PAUSED"))
    code, errors = job.wait()
    assert code == 75, errors
    assert requeues(job) == [["requeue", "77"]]
    assert (job.run_dir / "report.html").exists() == is_written
    assert ("report" in errors) == is_written, errors


def test_a_job_writes_the_report_that_its_settings_ask_for(job):
    ask_for_a_report(job)
    code, errors = job.wait()
    assert code == 0, errors
    assert f"train.slurm: report: {job.run_dir}/report.html\n" in errors
    assert (job.run_dir / "report.html").exists()
