"""The monitor on run folders as a run leaves them: what it says is what holds now."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_site import BASH, HOSTILE, Commands, complaint, end_group

import tiny
from trainstack.run.folder import RunFolder

HERE = os.uname().nodename
MEASURED = {
    "step": 12400, "loss": 2.8714, "learning_rate": 1e-4, "grad_norm": 1.1, "epoch": 0.25,
    "tokens_per_second": 1620000.4, "tokens_seen": 7, "step_seconds": 0.5, "samples_hash": "ab",
}  # fmt: skip
EVALUATED = {"step": 12000, "eval_loss": 2.9, "eval_perplexity": 18.17, "eval_tokens": 65536}


class Runs:
    """A project folder with runs, and ``python -m trainstack.monitor.screen`` on it."""

    def __init__(self, home: Path):
        self.home = home

    def make(self, name: str, state: str | None = None, checkpoint: int | None = None, **facts):
        """A run whose job last wrote ``state``."""
        run = RunFolder(self.home / "runs" / name)
        run.create()
        if state:
            run.set_status(state, **facts)
        if checkpoint is not None:
            path = run.checkpoints / f"checkpoint-{checkpoint}"
            path.mkdir()
            os.utime(path, (time.time() - 250, time.time() - 250))
        return run

    def monitor(self, *arguments: str, queue: str | None = None) -> subprocess.CompletedProcess:
        """``queue``: jobs as ``id|state|left|reason``; None: there is no Slurm here."""
        command = [sys.executable, "-m", "trainstack.monitor.screen", "--home", self.home]
        command += [*(["--queue"] if queue is not None else []), *arguments]
        return subprocess.run(
            list(map(str, command)), input=lines_of_squeue(queue or ""), capture_output=True,
            text=True, cwd=tiny.ROOT,
        )  # fmt: skip

    def table(self, queue: str | None = None) -> dict[str, dict[str, str]]:
        """The cells of the table by run and by column; a column that says nothing is not there."""
        result = self.monitor(queue=queue)
        assert (result.returncode, result.stderr) == (0, "")
        return cells(result.stdout)

    def screen(self, run: str, queue: str | None = None) -> dict[str, str]:
        """The lines of one run's screen by their names."""
        result = self.monitor(run, queue=queue)
        assert (result.returncode, result.stderr) == (0, "")
        title, *lines = result.stdout.splitlines()
        assert title == f"run {run}"
        rows = [re.fullmatch(r"  (\w[\w ]{10}) (.*)", line) for line in lines]
        found = {row[1].strip(): row[2] for row in rows if row}
        past = [line.strip() for line in lines if re.match(r"    \d{4}-", line)]
        return found | {"history": past, "whole": result.stdout}


def cells(text: str) -> dict[str, dict[str, str]]:
    """The cells of a table by run and by column; columns are two or more spaces apart."""
    head, *lines = text.splitlines()
    names = re.split(r"\s{2,}", head)
    starts = [head.index(name) for name in names] + [None]
    spans = list(itertools.pairwise(starts))
    rows = [[line[begin:end].strip() for begin, end in spans] for line in lines]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def lines_of_squeue(queue: str) -> str:
    """As slurm.sh asks for them."""
    return "".join(f"job|{line}|gpu-07\n" for line in queue.splitlines())


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def log(run: RunFolder, *records: dict) -> None:
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_no_runs_yet_is_told_with_the_first_command(runs):
    result = runs.monitor()
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == "monitor.sh: no runs yet; start one: bash submit.sh\n"


def test_an_unknown_run_is_one_line_that_names_those_there_are(runs):
    for name in ("alpha", "beta"):
        runs.make(name, "DONE")
    line = complaint(runs.monitor("gamma"), 1, "monitor.sh")
    assert line == "monitor.sh: error: no run gamma; there are: alpha, beta"


def test_a_run_that_trains_on_slurm_fills_every_column(runs):
    run = runs.make("smol", "RUNNING", 12250, job="184213", attempt=1, step=12390, max_steps=50000)
    log(run, {**MEASURED, "mfu": 0.412}, EVALUATED)
    for attempt in (1, 2):
        run.add_event("attempt", job="184213", attempt=attempt)
    run.add_event("training", step=12250)
    assert runs.table("184213|RUNNING|03:12:08|None\n")["smol"] == {
        "RUN": "smol", "JOB": "184213", "STATE": "RUNNING", "STEP": "12,400/50,000", "DONE": "25%",
        "LOSS": "2.871", "EVAL": "2.900", "TOK/S": "1.62M", "MFU": "41%", "JOB LEFT": "03:12:08",
        "RUN ETA": "05:13:20", "ATTEMPTS": "2", "CHECKPOINT": "step 12,250, 4 min old",
        "HEALTH": "good",
    }  # fmt: skip


def test_a_run_that_is_done_shows_where_it_ended_and_no_speed(runs):
    run = runs.make("demo", "DONE", 120, job=f"local-{HERE}-7", step=120, max_steps=120)
    log(run, {**MEASURED, "step": 120})
    assert runs.table("")["demo"] == {
        "RUN": "demo", "STATE": "DONE", "STEP": "120/120", "DONE": "100%", "LOSS": "2.871",
        "CHECKPOINT": "step 120, 4 min old", "HEALTH": "done",
    }  # fmt: skip


def test_a_done_run_whose_checkpoints_were_deleted_says_so_and_not_where_its_model_is(runs):
    run = runs.make("demo", "DONE", 120, job="7", step=120, next_action="its model: /x")
    assert runs.screen("demo")["next"] == "its model: /x"
    shutil.rmtree(run.checkpoints)
    assert runs.screen("demo")["next"] == "its checkpoints are gone"


def test_a_run_in_the_queue_is_queued_with_the_reason(runs):
    run = runs.make("a", "QUEUED", job=None)
    run.add_event("submitted", job="7")
    queue = "7|PENDING|1-00:00:00|Priority\n"
    assert runs.table(queue)["a"] == {
        "RUN": "a", "JOB": "7", "STATE": "QUEUED", "HEALTH": "queued",
        "WHY": "jobs of higher priority wait before it",
    }  # fmt: skip
    why = "(Priority: jobs of higher priority wait before it)"
    assert runs.screen("a", queue)["job"] == f"7, attempt 1, Slurm says PENDING {why}"


STATES = [
    # written, what Slurm says of the job -> shown
    ("QUEUED", "RUNNING|1:00|None", "STARTING"),
    ("QUEUED", "CONFIGURING|1:00|None", "STARTING"),
    ("STARTING", "RUNNING|1:00|None", "STARTING"),
    ("QUEUED", "PENDING|1:00|JobHeldUser", "HELD"),
    ("PAUSED", "PENDING|1:00|job requeued in held state", "PAUSED, HELD"),
    ("QUEUED", "PENDING|1:00|DependencyNeverSatisfied", "BLOCKED"),
    ("RESTARTING", "PENDING|1:00|BeginTime", "QUEUED"),
    ("RUNNING", "SUSPENDED|1:00|None", "SUSPENDED"),
    ("RUNNING", "COMPLETING|1:00|None", "RUNNING"),
    ("DONE", "COMPLETING|1:00|None", "DONE"),
    ("QUEUED", "FAILED|1:00|NonZeroExitCode", "LOST"),
    ("RUNNING", "NODE_FAIL|1:00|None", "LOST"),
    ("DONE", "COMPLETED|1:00|None", "DONE"),
    ("PAUSED", "CANCELLED|1:00|None", "PAUSED"),
]


@pytest.mark.parametrize(("written", "job", "shown"), STATES)
def test_the_state_that_holds_is_shown_whatever_was_written_last(runs, written, job, shown):
    run = runs.make("a", written, job="7")
    run.add_event("submitted", job="7")
    assert runs.table(f"7|{job}\n")["a"]["STATE"] == shown


def test_of_a_chain_the_job_that_runs_is_shown_then_the_next_one(runs):
    run = runs.make("a", "QUEUED", job=None)
    for job in "789":
        run.add_event("submitted", job=job)
    waiting = "8|PENDING|1:00|Dependency\n9|PENDING|1:00|Dependency\n"
    assert runs.table(f"7|RUNNING|1:00|None\n{waiting}")["a"]["JOB"] == "7"
    run.set_status("PAUSED", job="7")
    assert runs.table(waiting)["a"]["JOB"] == "8"
    assert runs.table("8|COMPLETED|0:00|None\n9|PENDING|1:00|Dependency\n")["a"]["JOB"] == "9"


def test_a_job_that_ended_without_a_word_is_named_with_its_node(runs):
    run = runs.make("a", "QUEUED", job=None)
    run.add_event("submitted", job="7")
    cause = runs.screen("a", "7|FAILED|0:00|NonZeroExitCode\n")["cause"]
    assert "Slurm says FAILED (NonZeroExitCode) on gpu-07, and the job wrote nothing" in cause
    run.add_event("attempt", job="7", attempt=1)
    assert "did not report why" in runs.screen("a", "7|NODE_FAIL|0:00|None\n")["cause"]


def test_a_refused_first_job_is_no_lost_one(runs):
    runs.make("a", "NOT_SUBMITTED", cause="sbatch: error: no such partition")
    screen = runs.screen("a", "")
    assert (screen["state"], screen["cause"]) == (
        "NOT_SUBMITTED", "sbatch: error: no such partition",
    )  # fmt: skip


def test_the_hidden_job_of_a_colleague_is_not_lost_as_long_as_its_heart_beats(runs):
    """Sites hide the jobs of others: PrivateData=jobs."""
    run = runs.make("a", "QUEUED", job=None)
    run.add_event("submitted", job="7", user="somebody")
    assert runs.table("")["a"]["STATE"] == "QUEUED"
    run.set_status("RUNNING", job="7")
    run.beat("7")
    assert runs.table("")["a"]["STATE"] == "RUNNING"
    before = time.time() - 600
    os.utime(run.logs / "7.alive", (before, before))
    assert runs.table("")["a"]["STATE"] == "LOST"


def test_a_paused_run_that_waits_for_its_next_attempt_says_both(runs):
    runs.make("a", "PAUSED", job="7", attempt=1, step=40)
    assert runs.table("7|PENDING|1:00|BeginTime\n")["a"]["STATE"] == "PAUSED, QUEUED"
    assert runs.table("")["a"]["STATE"] == "PAUSED"


@pytest.mark.parametrize("state", ["QUEUED", "RUNNING"])
def test_a_job_that_slurm_no_longer_has_is_lost_with_a_next_step(runs, state):
    run = runs.make("a", state, job="7", attempt=1)
    run.add_event("submitted", job="7")
    assert runs.table("8|RUNNING|1:00|None\n")["a"]["STATE"] == "LOST"
    assert "no longer has its job" in runs.screen("a", "")["cause"]
    assert runs.screen("a", "")["next"] == "to resume: bash submit.sh --resume a"


def test_without_slurm_no_job_is_called_lost(runs):
    runs.make("a", "RUNNING", job="7", attempt=1)
    cells = runs.table(None)["a"]
    assert cells["STATE"] == "RUNNING" and "JOB LEFT" not in cells


def test_a_local_run_whose_process_lives_is_running(runs):
    runs.make("a", "RUNNING", job=f"local-{HERE}-7", host=HERE, pid=os.getpid())
    assert runs.table("")["a"]["STATE"] == "RUNNING"


def test_a_local_run_whose_process_is_gone_was_killed(runs):
    gone = subprocess.Popen(["true"])
    gone.wait()
    runs.make("a", "RUNNING", job=f"local-{HERE}-7", host=HERE, pid=gone.pid)
    assert runs.table(None)["a"]["STATE"] == "KILLED"
    cause = runs.screen("a")["cause"]
    assert cause == "its processes are gone and did not report why"
    assert runs.screen("a")["next"] == "to resume: bash submit.sh --resume a --local"


def test_a_local_run_of_another_host_is_left_as_it_said(runs):
    gone = subprocess.Popen(["true"])
    gone.wait()
    runs.make("a", "RUNNING", job="local-elsewhere-7", host="elsewhere", pid=gone.pid)
    assert runs.table(None)["a"]["STATE"] == "RUNNING"


def test_a_failed_run_tells_cause_next_step_and_history(runs):
    run = runs.make(
        "a", "FAILED", 100, job="7", attempt=2, step=120, max_steps=500, exit_code=1,
        cause="rank 3 on gpu-07: out of memory", next_action="fix the cause, then resume",
        nodes=["gpu-07", "gpu-08"],
    )  # fmt: skip
    run.add_event("start", job="7", attempt=2)
    run.add_event("checkpoint", step=100, save_seconds=2)
    run.add_event("failed", step=120, cause="rank 3 on gpu-07: out of memory")
    (run.logs / "7.out").write_text("")
    log(run, {**MEASURED, "step": 119}, EVALUATED)
    screen = runs.screen("a", "")
    assert screen["state"] == "FAILED"
    assert screen["step"] == "120/500  █████░░░░░░░░░░░░░░░ 24%"
    assert screen["cause"] == "rank 3 on gpu-07: out of memory"
    assert screen["next"] == "fix the cause, then resume"
    assert screen["job"] == "7, attempt 2"
    assert screen["nodes"] == "gpu-07, gpu-08"
    assert screen["loss"] == "2.8714 at step 119"
    assert screen["held out"] == "loss 2.9000, perplexity 18.17 at step 12,000"
    assert screen["checkpoint"] == "step 100, 4 min old"
    assert screen["folder"] == str(run.path)
    assert screen["log"] == str(run.logs / "7.out")
    words = [line.split("Z  ")[1] for line in screen["history"]]
    assert words == [
        "start",
        "checkpoint step 100",
        "failed step 120: rank 3 on gpu-07: out of memory",
    ]


def test_a_torn_line_of_measurements_is_passed_over(runs):
    run = runs.make("a", "RUNNING", job="7", step=1, max_steps=50000)
    log(run, {**MEASURED, "step": 5})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0')
    cells = runs.table("7|RUNNING|1:00|None\n")["a"]
    assert (cells["STEP"], cells["LOSS"]) == ("5/50,000", "2.871")


def test_of_a_long_file_of_measurements_the_last_counts(runs):
    run = runs.make("a", "RUNNING", job="7", max_steps=50000)
    log(run, *({**MEASURED, "step": step} for step in range(1, 2001)))
    assert (run.path / "metrics.jsonl").stat().st_size > 3 * (1 << 16)
    assert runs.table("7|RUNNING|1:00|None\n")["a"]["STEP"] == "2,000/50,000"


def test_an_end_that_is_not_known_yet_is_a_dash(runs):
    run = runs.make("a", "RUNNING", job="7", step=3)
    log(run, {**MEASURED, "step": 3})
    cells = runs.table("7|RUNNING|1:00|None\n")["a"]
    assert cells["STEP"] == "3" and "RUN ETA" not in cells and "DONE" not in cells


def test_a_status_that_cannot_be_read_does_not_hide_the_other_runs(runs):
    runs.make("good", "DONE")
    broken = runs.make("bad", "DONE")
    (broken.path / "status.json").write_text('{"state": "RUN')
    (broken.path / "events.jsonl").write_text('{"event": "start"')
    table = runs.table(None)
    assert {name: cells["STATE"] for name, cells in table.items()} == {
        "bad": "UNKNOWN", "good": "DONE",
    }  # fmt: skip


# --- monitor.sh


@pytest.fixture
def command(tmp_path):
    """monitor.sh of a hostile folder: the arguments of bash, and its environment."""
    checkout, shared = tmp_path / f"checkout {HOSTILE}", tmp_path / f"shared {HOSTILE}"
    commands = Commands(tmp_path)
    tiny.make_checkout(checkout, shared)
    home = shared / "trainstack"
    text = (
        f"SHARED_DIR={shlex.quote(str(shared))}; TRAINSTACK_HOME={shlex.quote(str(home))}\n"
        'TRAINSTACK_PYTHON="$TRAINSTACK_HOME/venv/bin/python"\n'
    )
    (checkout / "env.sh").write_text(text)
    (tmp_path / "json.py").write_text("open('canary', 'w')\n")

    def run(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [BASH, checkout / "monitor.sh", *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={"PATH": str(commands.folder), "HOME": str(tmp_path), "LANG": "C.UTF-8",
                 "ANSWER_SECONDS": "1"},
        )  # fmt: skip

    run.runs, run.commands, run.checkout = Runs(home), commands, checkout
    yield run
    assert not list(tmp_path.rglob("canary"))


def test_monitor_asks_squeue_for_all_that_it_shows(command):
    loop = "for ((i = 100000; i < 110000; i++)); do"
    body = f'echo Welcome; {loop} echo "job|$i|RUNNING|1:00|None|gpu-07"; done'
    command.commands.add("squeue", body)
    command.runs.make("a", "RUNNING", job="109999").add_event("submitted", job="109999")
    command.runs.make("b", "RUNNING", job="5")
    output, errors = command().communicate(timeout=30)
    assert errors == ""
    assert command.commands.calls("squeue") == [
        ["--noheader", "--states=all", "--format=job|%A|%T|%L|%r|%N|%l|%S"]
    ]
    states = {name: (row["JOB"], row["STATE"]) for name, row in cells(output).items()}
    assert states == {"a": ("109999", "RUNNING"), "b": ("5", "LOST")}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, ""),
        ("echo no contact; exit 1", "no contact"),
        ("sleep 60", "squeue gave no answer in 1 s"),
    ],
)
def test_monitor_works_without_slurm_and_with_one_that_does_not_answer(command, answer, told):
    if answer:
        command.commands.add("squeue", answer)
    command.runs.make("a", "RUNNING", job="5").add_event("submitted", job="5")
    output, errors = command().communicate(timeout=30)
    line = f"monitor.sh: Slurm does not answer: {told}; states are as the runs wrote them\n"
    assert errors == (line if told else "")
    assert cells(output)["a"]["STATE"] == "RUNNING"


def test_a_job_that_squeue_forgot_is_asked_of_accounting_where_there_is_one(command):
    run = command.runs.make("a", "RUNNING", job="5", attempt=1, step=9)
    run.add_event("submitted", job="5")
    run.add_event("attempt", job="5", attempt=1)
    command.commands.add("squeue", "echo Welcome")
    unknown = "LOST at step 9: Slurm no longer has its job"
    for answer, words in (
        (None, unknown),
        ("echo accounting is disabled >&2; exit 1", unknown),
        ("sleep 60", unknown),
        (
            "echo Welcome; echo '5|OUT_OF_MEMORY|0:125|None|gpu-07'",
            "OUT_OF_MEMORY (exit code 0:125)",
        ),
        (
            "echo '5|CANCELLED by 1000|0:15||gpu-07'",
            "Slurm says CANCELLED (exit code 0:15) on gpu-07",
        ),
        ("echo '5|FAILED|1:0|NonZeroExitCode|gpu-07'", "FAILED (NonZeroExitCode, exit code 1:0)"),
    ):
        if answer:
            command.commands.add("sacct", answer)
        output, errors = command("a", "--why").communicate(timeout=30)
        assert errors == "" and words in " ".join(output.split()), output
    command.commands.add("squeue", "echo 'job|5|RUNNING|1:00|None|gpu-07|1:00|N/A'")
    before = len(command.commands.calls("sacct"))
    output, _ = command("a", "--why").communicate(timeout=30)
    assert output.startswith("a: RUNNING at step 9; starting: ") and "LOST" not in output
    assert len(command.commands.calls("sacct")) == before


def test_monitor_follows_until_the_run_ends(command):
    run = command.runs.make("a", "RUNNING", job=f"local-{HERE}-7", host=HERE, pid=os.getpid())
    process = command("--follow", "a")
    try:
        seen = b""
        while b"looked at" not in seen:
            part = os.read(process.stdout.fileno(), 4096)
            assert part, "it ended"
            seen += part
        assert seen.startswith(b"run a\n  state       RUNNING\n")
        assert process.poll() is None
        run.set_status("DONE")
        rest, errors = process.communicate(timeout=30)
        assert "  state       DONE\n" in rest and "looked at" not in rest.split("DONE")[1]
        assert (process.returncode, errors) == (0, "")
    finally:
        end_group(process)


def test_monitor_before_setup_names_the_command(command):
    (command.checkout / "env.sh").unlink()
    process = command()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors == "monitor.sh: error: the environment is not ready; run: bash setup.sh\n"


@pytest.mark.parametrize("question", ["--ledger", "--goodput"])
def test_monitor_passes_a_question_about_a_run_on_and_its_exit_code_back(command, question):
    python = command.runs.home / "venv" / "bin" / "python"
    command.commands.add("python", "echo found; exit 1", python)
    for arguments in (("a run", question), (question, "a run")):
        process = command(*arguments)
        assert process.communicate(timeout=30) == ("found\n", "")
        assert process.returncode == 1
    asked = ["-m", "trainstack", question[2:], "--home", str(command.runs.home), "--", "a run"]
    assert command.commands.calls("python") == [asked, asked]


def test_monitor_tells_where_the_time_of_a_run_went(command):
    command.runs.make("a", "DONE").add_event("submitted", job="5")
    output, errors = command("a", "--goodput").communicate(timeout=30)
    assert errors == ""
    assert output.startswith("run a: DONE, attempts: 0\n")


def test_monitor_passes_on_that_a_ledger_cannot_be_told(command):
    process = command("--ledger", "nowhere")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("ledger: error: no run nowhere in ")


WRONG_USE = [
    (["a", "b"], "one run at a time, got a and b"),
    (["--ledger"], "--ledger is about one run; write: bash monitor.sh RUN --ledger"),
    (["--why"], "--why is about one run; write: bash monitor.sh RUN --why"),
    (["--goodput"], "--goodput is about one run; write: bash monitor.sh RUN --goodput"),
    (["a", "--ledger", "--goodput"], "one question at a time, got --ledger and --goodput"),
    (["--follow", "a", "--ledger"], "one question at a time, got --follow and --ledger"),
]


@pytest.mark.parametrize(("arguments", "problem"), WRONG_USE, ids=lambda value: " ".join(value))
def test_monitor_answers_one_question_at_a_time(command, arguments, problem):
    process = command(*arguments)
    assert process.communicate(timeout=30) == ("", f"monitor.sh: error: {problem}\n")
    assert process.returncode == 2
