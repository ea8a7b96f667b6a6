"""What --why says of run folders as a run leaves them, and of Slurm's words."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_monitor import MEASURED, Runs, lines_of_squeue, log

import tiny
from trainstack.errors import SECRET, SECRET_IN_CODE, without_secrets
from trainstack.monitor.view import view_of
from trainstack.monitor.why import lines_of
from trainstack.resilience.kinds import ELSEWHERE, INFRASTRUCTURE, KINDS, NO, WORKLOAD, kind_of
from trainstack.run import refusal
from trainstack.run.folder import RunFolder
from trainstack.run.queue import MEANINGS, read_queue
from trainstack.units import time_of

JOB = "184213"
RANKS = ["rank 0 on gpu-07: pid 1", "rank 1 on gpu-08: pid 2"]


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


def why(runs: Runs, name: str, queue: str | None = None) -> str:
    """The words of --why, with single spaces; they fit a screen."""
    jobs = None if queue is None else read_queue(lines_of_squeue(queue))
    lines = lines_of(view_of(RunFolder(runs.home / "runs" / name), jobs), jobs)
    print(*lines, sep="\n")
    assert len(lines) <= 15 and max(map(len, lines)) <= 110
    return " ".join(" ".join(lines).split())


def happened(run: RunFolder, *events: dict) -> None:
    """Write a history, a minute between two events."""
    begin = time.time() - 60 * len(events)
    told = [{"at": time_of(begin + 60 * n), "host": "gpu-07", **e} for n, e in enumerate(events)]
    (run.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))


def attempt(number: int = 1, job: str = JOB, ranks: list[str] = RANKS, **facts) -> list[dict]:
    """The events by which one begins."""
    key = {"job": job, "attempt": number}
    return [
        {"event": "attempt", "restarts": 0, "newest": 0, **key, **facts},
        {"event": "start", "ranks": ranks, **key},
    ]


def test_a_run_that_trains_and_one_that_is_done_take_one_line(runs):
    runs.make("live", "RUNNING", job=JOB, attempt=1, step=25, max_steps=60)
    happened(RunFolder(runs.home / "runs/live"), *attempt(), {"event": "training", "step": 0})
    assert why(runs, "live", f"{JOB}|RUNNING|1:00|None") == (
        "live: RUNNING at step 25/60; nothing is wrong"
    )
    runs.make("done", "DONE", job=JOB, attempt=1, step=60, max_steps=60, exit_code=0)
    done = {"event": "done", "step": 60, "job": JOB, "attempt": 1}
    happened(RunFolder(runs.home / "runs/done"), *attempt(), done)
    assert why(runs, "done") == "done: DONE at step 60/60; nothing is wrong"


@pytest.mark.parametrize("reason", MEANINGS)
def test_every_reason_of_slurm_is_explained_with_the_start_that_it_expects(runs, reason):
    run = runs.make("waits", "QUEUED")
    happened(run, {"event": "submitted", "job": JOB})
    said = why(runs, "waits", f"{JOB}|PENDING|1:00|{reason}")
    assert f"job {JOB} waits, {reason}: " in said
    told = MEANINGS[reason].replace("JOB", JOB)
    does = told if "held" in reason.lower() else "nothing: Slurm starts it by itself"
    does = f"scancel {JOB}, then submit" if "never starts" in told else does
    assert f" do {does}" in said


def test_the_start_that_slurm_expects_is_told(runs):
    run = runs.make("waits", "QUEUED")
    happened(run, {"event": "submitted", "job": JOB})
    line = f"job|{JOB}|PENDING|1:00|Priority||1:00|2036-12-01T09:00:00\n"
    assert "Slurm expects to start it in " in raw(runs, "waits", line)
    assert "expects" not in raw(runs, "waits", line.replace("2036-12-01T09:00:00", "N/A"))


def raw(runs: Runs, name: str, queue: str) -> str:
    """The same with lines as slurm.sh hands them over."""
    command = [sys.executable, "-m", "trainstack.monitor.screen", "--home", str(runs.home)]
    done = subprocess.run(
        [*command, "--queue", "--why", name],
        input=queue,
        capture_output=True,
        text=True,
        cwd=tiny.ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return " ".join(done.stdout.split())


ENDS = [  # a final word of Slurm, whose it is, what a person does
    ("TIMEOUT", "Slurm or whoever asked", "#SBATCH --time"),
    ("OUT_OF_MEMORY", "the workload", "#SBATCH --mem"),
    ("NODE_FAIL", "the infrastructure", "--exclude="),
    ("CANCELLED", "Slurm or whoever asked", "somebody cancelled it"),
]


@pytest.mark.parametrize(("word", "whose", "remedy"), ENDS)
def test_a_job_that_slurm_ended_without_a_word_of_the_run(runs, word, whose, remedy):
    run = runs.make("lost", "RUNNING", 20, job=JOB, attempt=1, step=25, max_steps=60)
    happened(run, {"event": "submitted", "job": JOB}, *attempt(), {"event": "training", "step": 0})
    run.beat(JOB)
    os.utime(run.logs / f"{JOB}.alive", (time.time() - 900, time.time() - 900))
    said = why(runs, "lost", f"{JOB}|{word}|0:00|None")
    assert said.startswith("lost: LOST at step 25/60 what LOST at step 25: Slurm says " + word)
    for words in (
        whose,
        remedy,
        "last heartbeat",
        "5 steps to redo",
        "on gpu-07, gpu-08",
        "bash submit.sh --resume lost",
        "nobody was left",
    ):
        assert words in said


def test_of_a_chain_the_end_of_the_job_before_is_told_by_slurm(runs):
    run = runs.make("chain", "RUNNING", 20, job="9", attempt=1, step=21, max_steps=60)
    happened(
        run,
        *attempt(1, "8"),
        {"event": "training", "step": 0},
        *attempt(1, "9", newest=20, reached=25),
        {"event": "training", "step": 20},
    )
    said = why(runs, "chain", "8|TIMEOUT|0:00|None\n9|RUNNING|1:00|None")
    for words in ("KILLED at step 25", "Slurm says TIMEOUT", "5 steps redone", "--time",
                  "job 9 continued it", "it lay with Slurm or whoever asked"):  # fmt: skip
        assert words in said


def test_a_rank_that_failed_is_named_with_its_line_and_what_its_log_says(runs):
    run = runs.make(
        "bad",
        "FAILED",
        20,
        job=JOB,
        attempt=2,
        step=25,
        max_steps=60,
        exit_code=1,
        next_action="fix the cause, then: bash submit.sh --resume bad",
    )
    cause = "rank 1 on gpu-08: RuntimeError: shapes; twice, before any step"
    happened(
        run,
        *attempt(1),
        {"event": "failed", "job": JOB, "attempt": 1, "cause": cause},
        *attempt(2),
        {"event": "failed", "job": JOB, "step": 25, "cause": cause},
    )
    trace = [
        '  File "/x/venv/lib/python3.11/site-packages/torch/nn.py", line 3, in forward',
        '  File "/home/trainstack/runs/bad/code/trainstack/model/loss.py", line 99, in loss',
    ]
    report(run, 2, 1, "RuntimeError: shapes", traceback=[*trace, trace[0], "RuntimeError: shapes"])
    report(run, 2, 0, "RuntimeError: gone", is_victim=True)
    log = "2026-11-30 08:00:00,000 rank 1 Traceback\nValueError: hf_abcdefghijkl and 3\n"
    run.rank_log(JOB, 2, 1).write_text("x" * (1 << 17) + "\n" + log)
    said = why(runs, "bad")
    for words in (
        "what FAILED at step 25: rank 1 on gpu-08",
        "where trainstack/model/loss.py:99",
        "rank 1: its own report; rank 0: lost its peer",
        "log",
        "ValueError: ... and 3",
        "ends in the same way; it lies with the workload",
        "attempt 2 on gpu-07, gpu-08",
        "look at code and data; then: bash submit.sh --resume bad",
        "before",
    ):
        assert words in said


def report(run: RunFolder, number: int, rank: int, cause: str, state="FAILED", **facts) -> None:
    """A failure report as rank ``rank`` leaves it."""
    told = {
        "at": time_of(time.time()),
        "rank": rank,
        "host": f"gpu-0{7 + rank}",
        "state": state,
        "exit_code": 1,
        "cause": cause,
        "is_victim": False,
        **facts,
    }
    (run.logs / f"{JOB}.{number}.rank{rank}.failure.json").write_text(json.dumps(told))


def test_a_hang_names_the_rank_and_where_it_stood(runs):
    run = runs.make("stuck", "RUNNING", 20, job=JOB, attempt=2, step=22, max_steps=60)
    cause = "rank 1 on gpu-08: no progress for 60 s at step 25, samples"
    happened(
        run,
        *attempt(1),
        {"event": "hang", "job": JOB, "attempt": 1, "step": 25, "cause": cause},
        *attempt(2, newest=20),
        {"event": "resume", "step": 20, "checkpoint": "checkpoint-20"},
        {"event": "training", "step": 20},
    )
    report(run, 1, 1, cause[18:], "HANG", position=[25, 4], collective=57)
    run.stacks_file(JOB, 1, 1).write_text(
        'Thread 0x01 (most recent call first):\n  File "/a/trainstack/x.py", line 1, in watch\n\n'
        'Thread 0x02 (most recent call first):\n  File "/usr/lib/threading.py", line 2 in wait\n'
        '  File "/a/code/trainstack/data/feed.py", line 7 in rows\n'
        '  File "/a/code/train.py", line 8 in step\n'
    )
    said = why(runs, "stuck", f"{JOB}|RUNNING|1:00|None")
    for words in (
        "stuck: RUNNING at step 22/60; nothing is wrong; it got past 1 incident, the last:",
        "where step 25, samples; 57 collectives begun (flight recorder); "
        "trainstack/data/feed.py:7 in rows",
        "its watchdog saw no progress",
        "file system is slow",
        "restarted in place, from checkpoint-20",
        "5 steps redone; 4 min",
    ):
        assert words in said


def test_what_comes_at_one_step_three_times_will_come_again(runs):
    facts = {"job": JOB, "step": 160, "cause": "rank 1 on gpu-08: killed by SIGKILL"}
    for name, steps, told in (
        ("stuck", (160, 160, 160), NO),
        ("moves", (90, 120, 160), "may help"),
    ):
        runs.make(name, "NO_PROGRESS", job=JOB, attempt=3, exit_code=76, step=160)
        events = [
            each
            for number, step in enumerate(steps, 1)
            for each in (*attempt(number), {"event": "failed", **facts, "step": step})
        ]
        happened(RunFolder(runs.home / "runs" / name), *events)
        said = why(runs, name)
        assert f"retry {told}" in said
        assert ("as three times near step 160" in said) == (name == "stuck")


def test_with_many_nodes_and_a_long_cause_what_to_do_is_still_there(runs):
    cause = "rank 1 on node0001: stopped answering while " + "the others waited for it " * 12
    run = runs.make("wide", "HANG", job=JOB, attempt=1, exit_code=81, step=160, cause=cause)
    run.set_status("HANG", next_action="fix the cause, then: bash submit.sh --resume wide")
    ranks = [f"rank {n} on node{n:04}: pid 1" for n in range(64)]
    happened(run, *attempt(ranks=ranks), {"event": "hang", "job": JOB, "step": 160, "cause": cause})
    said = why(runs, "wide")
    assert "on node0000, node0001, node0002 and 61 more" in said
    assert said.endswith("bash submit.sh --resume wide")


def test_a_rank_that_is_slow_now_was_not_got_past_and_each_rank_counts_for_itself(runs):
    run = runs.make("live", "RUNNING", job=JOB, attempt=1, step=25, max_steps=60)
    slow = {"event": "slow_rank", "cause": "rank 1 on n2: slow", "rank": 1, "step": 20}
    slow |= {"own_seconds": 2.0, "others_seconds": 1.0, "host": "n2"}
    trains = {"event": "training", "step": 0}
    happened(run, *attempt(), trains, {**slow, "rank": 5}, slow)
    said = why(runs, "live", f"{JOB}|RUNNING|1:00|None")
    assert "got past" not in said and "2 times" not in said
    over = [{**slow, "event": "slow_rank_over", "rank": rank} for rank in (5, 1)]
    happened(run, *attempt(), trains, {**slow, "rank": 5}, slow, *over)
    assert "the run got past it" in why(runs, "live", f"{JOB}|RUNNING|1:00|None")


def test_what_was_refused_without_a_name_hides_no_run_and_any_bytes_may_be_in_it(runs):
    run = runs.make("a", "FAILED", job=JOB, attempt=1, exit_code=1, step=5, cause="ValueError: 3")
    happened(run, *attempt(), {"event": "failed", "job": JOB, "step": 5, "cause": "ValueError: 3"})
    folder = runs.home / "cache" / "refused"
    folder.mkdir(parents=True)
    (folder / ".unnamed").write_text("submit.sh: error: foo is not a setting")
    assert "foo" not in why(runs, "a") and "ValueError" in why(runs, "a")
    (folder / "a").write_bytes(b"submit.sh: error: caf\xc3 is not a setting")
    said = why(runs, "a")
    assert "is not a setting" in said and "ValueError: 3" in said


@pytest.mark.parametrize(("loss", "is_spoiled"), [(112.0, True), (2.6, False)])
def test_a_run_that_diverged_before_its_checkpoint_is_not_to_be_resumed(runs, loss, is_spoiled):
    resume = "fix the cause, then: bash submit.sh --resume hot"
    cause = "step 227: not finite: loss nan; lower optim.learning_rate (now 3)"
    run = runs.make("hot", "DIVERGED", 200, job=JOB, step=225, cause=cause, next_action=resume)
    happened(run, *attempt(), {"event": "diverged", "job": JOB, "step": 225, "cause": cause})
    usual = [2.5 * 1.4 ** ((7 * n % 5) - 2) for n in range(10)]  # a batch differs from another
    losses = usual + [loss] * 10 + [9.0]
    log(run, *({**MEASURED, "step": 10 * i, "loss": x} for i, x in enumerate(losses, 1)))
    said = why(runs, "hot")
    spoiled = (
        "has diverged too (loss 112, once 2.5): fix the cause, then: bash submit.sh run.name=hot-2"
    )
    assert (spoiled in said, resume in said) == (is_spoiled, not is_spoiled)


def test_a_fallback_to_an_older_checkpoint_and_a_lost_node_are_told(runs):
    run = runs.make("moved", "RUNNING", 10, job=JOB, attempt=2, step=12, max_steps=60)
    third = [RANKS[0], "rank 1 on gpu-09: pid 2"]
    happened(
        run,
        *attempt(1),
        {"event": "training", "step": 0},
        *attempt(2, restarts=1, newest=20, reached=25, ranks=third),
        {"event": "resume", "step": 10, "checkpoint": "checkpoint-10"},
        {"event": "training", "step": 10},
    )
    said = why(runs, "moved", f"{JOB}|RUNNING|1:00|None")
    for words in (
        "NODE_LOST at step 25: a node failed, and Slurm took the job back; not among its "
        "nodes since: gpu-08",
        "the job went back into the queue, from checkpoint-10",
        "for checkpoint-20 is damaged and was set aside",
        "15 steps redone",
    ):
        assert words in said


def test_a_pause_says_who_asked_and_that_nothing_is_lost(runs):
    run = runs.make(
        "paused",
        "PAUSED",
        25,
        job=JOB,
        attempt=1,
        step=25,
        max_steps=60,
        exit_code=75,
        next_action="to resume: bash submit.sh --resume paused",
    )
    told = {"job": JOB, "attempt": 1, "step": 25, "cause": "SIGTERM"}
    happened(run, *attempt(), {"event": "training", "step": 0}, {"event": "paused", **told})
    said = why(runs, "paused", f"{JOB}|CANCELLED|0:00|None")
    for words in (
        "PAUSED at step 25: asked to end by SIGTERM",
        "Slurm says CANCELLED",
        "checkpoint-25: nothing",
        "nothing failed; it lies with Slurm or whoever asked",
        "to resume: bash submit.sh --resume paused",
    ):
        assert words in said
    again = why(runs, "paused", f"{JOB}|PENDING|0:00|BeginTime")
    assert "PAUSED, QUEUED" in again and "the job is in the queue again" in again


def test_saves_that_failed_are_one_interruption_of_an_attempt(runs):
    run = runs.make("disk", "RUNNING", job=JOB, attempt=1, step=25, max_steps=60)
    lost = {
        "cause": f"{run.path}/checkpoints/x: No space left on device, 3 GB needed by rank 1 on b"
    }
    happened(run, *attempt(), *({"event": "save_failed", "step": s, **lost} for s in (10, 20)))
    said = why(runs, "disk", f"{JOB}|RUNNING|1:00|None")
    for words in (
        "1 incident",
        "SAVE_FAILED at step 20: runs/disk/checkpoints/x: No space left",
        "(2 times in this attempt)",
        "no step, and no time",
        "make space",
    ):
        assert words in said


def test_what_sbatch_refused_and_what_submit_refused_are_told(runs):
    run = runs.make(
        "a",
        "NOT_SUBMITTED",
        cause="sbatch: error: no such partition",
        next_action="fix the cause, then submit again",
    )
    happened(run, {"event": "not_submitted", "cause": "sbatch: error: no such partition"})
    said = why(runs, "a")
    assert "what NOT_SUBMITTED: sbatch: error: no such partition" in said
    assert "ends in the same way; it lies with" in said
    kept = runs.home / "cache/refused/a"
    kept.parent.mkdir(parents=True)
    kept.write_text("submit.sh: error: run a cannot continue with train.seq_len=9\n")
    assert "refused 0 s ago, before the queue: submit.sh: error: run a cannot" in why(runs, "a")
    assert "run a cannot continue" in runs.monitor("a").stdout
    os.utime(kept, (1, 1))  # something happened in the run since
    assert "refused 0 s" not in why(runs, "a")


def test_a_broken_folder_and_a_thousand_attempts_are_told_in_time(runs):
    run = runs.make("long", "KILLED", job=JOB, attempt=1000, step=3)
    (run.logs / f"{JOB}.1000.rank0.failure.json").write_text("{")
    happened(run, *(event for n in range(1, 1001) for event in attempt(n)))
    begun = time.monotonic()
    assert "long" in why(runs, "long", "")
    assert time.monotonic() - begun < 5
    runs.make("empty", "FAILED", exit_code=1)
    assert why(runs, "empty").startswith("empty: FAILED")


WORDS = [
    ("rank 3 on a: out of GPU memory: CUDA out of memory; lower x", WORKLOAD, NO),
    ("rank 3 on a: RuntimeError: CUDA error: uncorrectable ECC error", INFRASTRUCTURE, ELSEWHERE),
    ("the clock of a is +60 s off that of the file system; fix its NTP", INFRASTRUCTURE, ELSEWHERE),
    ("ModuleNotFoundError: No module named x", WORKLOAD, NO),
]


@pytest.mark.parametrize(("cause", "whose", "helps"), WORDS)
def test_a_cause_says_whose_it_is_and_whether_another_attempt_helps(cause, whose, helps):
    assert kind_of(cause)[1:3] == (whose, helps)


def test_every_kind_is_short_and_a_pattern():
    for kind in KINDS:
        re.compile(kind.words)
        assert len(kind.advice) < 120


def test_tokens_are_left_out_and_hashes_of_data_are_not():
    text = "HF_TOKEN=abc AWS_SECRET_ACCESS_KEY=x hf_abcdefghij tokens=995e1928423b4e0f"
    assert (
        without_secrets(text)
        == "HF_TOKEN=... AWS_SECRET_ACCESS_KEY=... ... tokens=995e1928423b4e0f"
    )


SECRETS = [
    ("token=abc&x", "token=..."),
    ("--api-key=abc more", "--api-key=... more"),
    ("Authorization: Bearer abc.def", "Authorization: Bearer ..."),
    ("sent 'bearer abc-def/gh'", "sent 'bearer ...'"),
    ("from https://user:p@w@host/x", "from https://...@host/x"),
    ("WANDB_API_KEY: 0123456789", "WANDB_API_KEY: ..."),
    ("{'HF_TOKEN': 'a b', 'x': 1}", "{'HF_TOKEN': ..., 'x': 1}"),
    (r"{\"password\": \"abc\"} x", r"{\"password\": ... x"),
    ("AWS_ACCESS_KEY_ID=AKIA x", "AWS_ACCESS_KEY_ID=... x"),
    ("MY_TOKENS=a,b", "MY_TOKENS=..."),
]
NO_SECRETS = [
    "tokens=995e1928423b4e0f, not tokens=0f",
    "samples_hash: 0123456789abc",
    "max_new_tokens=12 tokens_per_second: 12345",
    "/home/token/secrets/passwords/a.txt: no such file",
    "https://host/a@b and s3://bucket/key",
    "KeyError: 'token'",
]


@pytest.mark.parametrize(("text", "left"), [*SECRETS, *((text, text) for text in NO_SECRETS)])
def test_secrets_are_left_out_however_they_are_written(text, left):
    assert without_secrets(text) == left


LITERALS = [
    ('+HF_TOKEN = "hf_abcdefghijklmnopqrst"', "+HF_TOKEN = ..."),
    ("+export WANDB_API_KEY=0123456789abcdef01", "+export WANDB_API_KEY=..."),
    ("+db_password: 'correct-horse-battery'", "+db_password: ..."),
    ("+call(api_key=a1b2c3d4e5f6a7b8c9, x=1)", "+call(api_key=..., x=1)"),
    ('+"Authorization": "Bearer abcdefgh.ij"', '+"Authorization": "Bearer ..."'),
    ("+index=https://me:pw@host/simple", "+index=https://...@host/simple"),
]
CODE = [
    "+eos_token = tokenizer.eos_token_id",
    '+pad_token="<|reserved_special_token_0|>", unk_token="<unk>"',
    "+token = next_token_of_the_sequence",
    "+token=next_token_2_of_the_sequence(x)",
    "+bos_token: str = 'a b'; import hf_transfer; hf_token_file",
    "+max_tokens=8192; tokenizer_name = 'Some-Model-2.5-0.5B'",
]


@pytest.mark.parametrize(("text", "left"), [*LITERALS, *((text, text) for text in CODE)])
def test_of_code_only_literals_are_left_out(text, left):
    assert without_secrets(text, SECRET_IN_CODE) == left


@pytest.mark.parametrize("part", ["token", "secret_", "://", "://a:", "token='", "bearer a", "hf_"])
@pytest.mark.parametrize("pattern", [SECRET, SECRET_IN_CODE])
def test_secrets_are_found_in_a_time_that_is_linear(part, pattern):
    begun = time.monotonic()
    without_secrets(part * 100_000, pattern)
    assert time.monotonic() - begun < 3


def test_what_is_kept_of_a_refusal_is_bounded(tmp_path: Path):
    refusal.tell("x" * 10000, tmp_path, tmp_path / "none.yaml", ["run.name=a"])
    assert (tmp_path / "cache/refused/a").stat().st_size < 3000
