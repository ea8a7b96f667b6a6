"""How the screens of the monitor read: in a terminal of any width, in a pipe, with any run."""

import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_monitor import EVALUATED, HERE, MEASURED, Runs, lines_of_squeue, log

import tiny
from trainstack.monitor import drawing
from trainstack.monitor.drawing import Point
from trainstack.monitor.health import health_of
from trainstack.monitor.view import view_of
from trainstack.run.folder import RunFolder
from trainstack.run.queue import read_queue
from trainstack.units import time_of

MFU = {**MEASURED, "mfu": 0.41, "data_seconds": 0.01, "peak_memory_gb": 1.5}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def training(runs: Runs, name: str = "a", **status) -> RunFolder:
    """A run of this very process, which has come to its first step."""
    facts = {"job": f"local-{HERE}-7", "attempt": 1, "host": HERE, "pid": os.getpid(), **status}
    run = runs.make(name, "RUNNING", **facts)
    run.add_event("attempt", job=facts["job"], attempt=1)
    run.add_event("training", step=0)
    return run


def in_terminal(home: Path, columns: int, *arguments: str, lines: int = 60, **environment) -> str:
    """What a terminal of so many columns is sent."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainstack.monitor.screen", "--home", home, *arguments],
        stdin=subprocess.DEVNULL, stdout=follower, cwd=tiny.ROOT,
        env={**os.environ, "COLUMNS": str(columns), "LINES": str(lines), "TERM": "xterm-256color",
             **environment},
    )  # fmt: skip
    os.close(follower)
    seen = b""
    try:
        while part := os.read(leader, 1 << 16):
            seen += part
    except OSError:  # Linux says so when the other side is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_table_leaves_out_what_a_terminal_cannot_hold_and_wraps_nothing(runs, columns):
    for number in range(60):
        run = training(runs, f"run-with-a-long-name-{number}", max_steps=50000)
        log(run, MFU, EVALUATED)
    text = ESCAPES.sub("", in_terminal(runs.home, columns))
    head, *lines = text.splitlines()
    assert len(lines) == 60
    assert max(map(len, (head, *lines))) <= columns
    titles = re.split(r"\s{2,}", head)
    assert {"RUN", "STATE", "STEP", "HEALTH"} <= set(titles)
    assert ("LOSS" in titles) == (columns >= 80)
    assert ("EVAL" in titles, "CHECKPOINT" in titles) == (columns >= 120, False)


def test_a_terminal_has_colours_and_a_pipe_and_no_color_have_none(runs):
    training(runs)
    assert "\x1b[32mgood" in in_terminal(runs.home, 80)
    assert "\x1b[3" not in in_terminal(runs.home, 80, NO_COLOR="1")
    assert "\x1b" not in runs.monitor().stdout


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_curves_fit_the_terminal_and_show_restarts_and_evaluations(runs, columns):
    run = training(runs, max_steps=400)
    steps = [{**MEASURED, "step": s, "loss": 2 + 6 / s} for s in range(1, 301)]
    log(run, *steps, {**EVALUATED, "step": 300, "eval_loss": 2.5})
    run.add_event("training", step=150)
    text = ESCAPES.sub("", in_terminal(runs.home, columns, "a"))
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if "o held out" in line)
    plot = lines[begin + 1 : begin + 10]
    assert max(map(len, plot)) <= columns
    assert sum(line.rstrip().endswith("o") for line in plot) == 1
    at, end = plot[-1].index("^"), plot[-1].rindex("300") + 3
    begin = plot[-1].index("1 ")
    assert (at - begin) / (end - begin) == pytest.approx(0.5, abs=0.03)


def test_where_only_ascii_can_be_shown_curves_and_bars_are_of_it(runs):
    run = training(runs, max_steps=10)
    log(run, *({**MEASURED, "step": s} for s in range(1, 9)))
    text = in_terminal(runs.home, 80, "a", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert "################...." in text and "*" in text
    assert text.isascii()


def test_a_curve_keeps_its_scale_whatever_it_holds():
    nothing = drawing.curve([Point(1, math.nan), Point(2, 3.0)], (60, 6))
    assert nothing == []
    again = drawing.curve([Point(s, 1 / (1 + s)) for s in range(100)], (60, 6), cuts=(0, 0, 50))
    assert re.fullmatch(r" *0 \^2 +\^ +99", again[-1].plain)
    backwards = drawing.curve([Point(9, 1.0), Point(2, 3.0), Point(7, 2.0)], (60, 6))
    assert backwards[-1].plain.split() == ["2", "9"]
    flat = drawing.curve([Point(s, 2.0) for s in range(5)], (60, 6))
    assert "2.00" in flat[0].plain
    wild = drawing.curve([Point(s, 10.0**s) for s in range(12)], (60, 6))
    assert all(len(line.plain) <= 61 for line in wild)
    assert [drawing.number(v) for v in (1620000, 12345, 4530.2, 2.871, 1e-5, 0)] == [
        "1.62M", "12.3k", "4,530", "2.87", "1.0e-05", "0",
    ]  # fmt: skip


def test_for_scripts_it_is_json_with_the_same_facts(runs):
    log(training(runs, max_steps=50000), MFU, EVALUATED)
    whole = json.loads(runs.monitor("--json").stdout)
    one = json.loads(runs.monitor("--json", "a").stdout)
    assert [whole[0]["run"], whole[0]["health"]] == ["a", "good"]
    assert one | {"last_sign_at": 0} == whole[0] | {"last_sign_at": 0}
    assert (one["step"], one["max_steps"], one["measured"]["loss"]) == (12400, 50000, 2.8714)


def test_a_run_that_slurm_ends_before_it_is_complete_says_how_many_jobs_it_takes(runs):
    run = runs.make("a", "RUNNING", job="7", attempt=1, max_steps=12400 + 7200 * 10)
    run.add_event("training", step=0)
    log(run, MEASURED)  # half a second a step: ten hours are left
    queue = "job|7|RUNNING|1:00:00|None|gpu-07|2:00:00|N/A\n"
    view = view_of(run, read_queue(queue))
    assert view.jobs_left == 5
    assert view_of(run, read_queue(lines_of_squeue("7|RUNNING|1:00|None"))).jobs_left is None


def test_a_job_in_the_queue_tells_when_slurm_expects_to_start_it(runs):
    run = runs.make("a", "QUEUED", job="7")
    starts = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7210))
    view = view_of(run, read_queue(f"job|7|PENDING|1:00|Resources||1:00|{starts}\n"))
    assert (
        health_of(view).reason
        == "it is next, and waits for nodes; Slurm expects to start it in 2 h"
    )
    later = view_of(run, read_queue("job|7|PENDING|1:00|Resources||1:00|N/A\n"))
    assert health_of(later).reason == "it is next, and waits for nodes"


def lines(count: int = 80, **changes) -> list[dict]:
    """Log lines of a run whose loss falls slowly; ``changes``: key -> value of a step."""
    found = []
    for step in range(1, count + 1):
        noise = 0.02 * ((step * 7919) % 13 - 6) / 6
        record = {**MFU, "step": step, "loss": 3 - 0.001 * step + noise}
        found.append(record | {key: value(step) for key, value in changes.items()})
    return found


def held_out(*losses: float) -> list[dict]:
    return [{**EVALUATED, "step": 20 * i, "eval_loss": x} for i, x in enumerate(losses)]


SLOW = ("slow_rank", {"rank": 3, "host": "gpu-07", "own_seconds": 0.9, "others_seconds": 0.5})
HEALTHS = [
    # records, events -> word, a part of the reason
    (lines(), [], "good", ""),
    (lines(loss=lambda s: 3.0 if s < 60 else 3.2), [], "rising", "loss 3.200 in the last 20 lines"),
    (lines(loss=lambda s: 9.0 if s == 70 else 3.0), [], "good", ""),
    (lines() + held_out(3.0, 2.0, 2.1, 2.2, 2.3), [], "rising", "held-out loss rose 3 times"),
    (lines() + held_out(3.0, 2.0, 2.1, 2.0, 2.3), [], "good", ""),
    (lines(data_seconds=lambda _: 0.2), [], "data", "40% of a step waits for data"),
    (lines(), [("save_failed", {"step": 9, "cause": "disk full"})], "unsaved", "disk full"),
    (lines(), [("save_failed", {"step": 9}), ("checkpoint", {"step": 19})], "good", ""),
    (lines(), [("skip", {"step": 79, "cause": "nan"})], "skipping", "1 update"),
    (lines(), [SLOW], "slow", "rank 3 on gpu-07 takes 1.8 times as long as the others"),
    (lines(), [SLOW, ("slow_rank_over", {"rank": 3, "host": "gpu-07"})], "good", ""),
    (lines(), [("skip", {"step": 5, "cause": "nan"})], "good", ""),
]  # fmt: skip


@pytest.mark.parametrize(("records", "events", "word", "reason"), HEALTHS)
def test_health_is_a_word_and_its_reason(runs, records, events, word, reason):
    run = training(runs)
    log(run, *records)
    for event, facts in events:
        run.add_event(event, **facts)
    found = health_of(view_of(run, None))
    assert found.word == word and reason in found.reason


def test_a_slow_rank_is_shown_with_what_it_found_on_its_host(runs):
    run, found = training(runs), "it may use 2 of 8 cores, load 9.1"
    log(run, *lines())
    run.add_event(SLOW[0], **SLOW[1], step=70, cause="rank 3 on gpu-07: twice the others'")
    hosts, seconds = [f"gpu-0{n}" for n in (1, 3, 5, 7)], [0.5, 0.5, 0.5, 0.9]
    run.show_ranks(step=80, hosts=hosts, seconds=seconds)
    assert "gpu-07" in runs.monitor("a").stdout, "without evidence too"
    assert "gpu-07" in runs.monitor("a", "--why").stdout
    run.add_evidence(f"local-{HERE}-7", 1, 3, found)
    assert found in runs.monitor("a").stdout
    assert found in runs.monitor("a", "--why").stdout


def test_the_ranks_are_shown_beside_each_other_and_the_slowest_by_its_host(runs):
    run = training(runs)
    seconds = [0.2, 0.21, 0.19, 0.3]
    run.show_ranks(step=9, hosts=["a", "a", "b", "b"], seconds=seconds)
    told = "0.200, 0.210, 0.190, 0.300 s of a step by itself; slowest: rank 3 on b, 1.50 times"
    assert runs.screen("a")["ranks"] == f"{told} the others"
    run.show_ranks(step=9, hosts=["a"] * 64, seconds=seconds * 16)
    assert runs.screen("a")["ranks"].startswith("64 ranks, 0.190 to 0.300 s of a step by itself;")


def test_a_run_that_writes_nothing_is_silent(runs):
    run = training(runs)
    log(run, *lines())
    long_ago = time.time() - 600
    for name in ("status.json", "events.jsonl", "metrics.jsonl"):
        os.utime(run.path / name, (long_ago, long_ago))
    assert health_of(view_of(run, None)) == ("silent", "nothing new for 10 min")
    log(run, *({**r, "step": 600 * r["step"]} for r in lines()))  # a line every five minutes
    os.utime(run.path / "metrics.jsonl", (long_ago, long_ago))
    assert health_of(view_of(run, None)).word == "good"


@pytest.mark.parametrize(
    ("last", "told"),
    [("attempt", "beginning"), ("start", "loading"), ("loaded", "warming up, or compiling")],
)
def test_a_job_that_does_not_train_yet_says_what_it_does(runs, last, told):
    run = training(runs)
    for event in ("attempt", "start", "loaded"):
        run.add_event(event, job="7", attempt=2)
        if event == last:
            break
    found = health_of(view_of(run, None))
    assert found.word == "starting" and found.reason.startswith(f"{told} for")


def test_a_file_that_is_being_written_and_a_broken_one_hide_nothing(runs):
    run = training(runs)
    log(run, *lines())
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "lo')
    (run.path / "ranks.json").write_text('{"seconds": [0.')
    (run.path / "sample.txt").write_bytes(b"\xff\xfe")
    (runs.home / "runs" / "empty").mkdir()
    (runs.home / "runs" / "empty" / "status.json").write_text("")
    assert "good" in runs.monitor("a").stdout
    assert len(runs.monitor().stdout.splitlines()) == 3


def test_a_private_or_broken_run_hides_no_other(runs, monkeypatch):
    training(runs, "mine")
    for name, text in (("list", "[]"), ("null", "null")):
        runs.make(name)
        (runs.home / "runs" / name / "status.json").write_text(text)
    private = runs.make("private", "RUNNING", job="7")
    events = private.path / "events.jsonl"
    events.mkdir()  # as unreadable to root as a file of mode 600 is to others
    odd = training(runs, "odd")
    with (odd.path / "events.jsonl").open("a") as file:
        file.write('{"at": 3}\n[]\n')
    table = runs.table("")
    states = {name: (row["STATE"], row["HEALTH"]) for name, row in table.items()}
    assert states == {
        "mine": ("RUNNING", "good"), "odd": ("RUNNING", "good"),
        "list": ("UNKNOWN", "unknown"), "null": ("UNKNOWN", "unknown"),
        "private": ("UNKNOWN", "unknown"),
    }  # fmt: skip
    assert "Is a directory" in table["private"]["WHY"]
    for name in states:
        assert runs.monitor(name).returncode == 0


def test_a_terminal_obeys_nothing_that_a_run_wrote(runs):
    run = training(runs)
    run.set_status("FAILED", cause="bad \x1b]52;c;ZWNobw==\x07 \x1b[2J cause")
    run.add_event("failed", cause="\x9b31mred", job="7", attempt=1)
    (run.path / "sample.txt").write_text("def \x1b[2Jf")
    for arguments in ((), ("a",), ("a", "--why")):
        told = runs.monitor(*arguments).stdout
        assert "]52;c" in told or "31mred" in told
        assert not set(told) & {"\x1b", "\x07", "\x9b"}


def test_a_number_that_is_not_finite_is_null_for_scripts(runs):
    log(training(runs), {**MFU, "loss": math.nan, "grad_norm": math.inf})
    told = runs.monitor("a", "--json").stdout
    assert json.loads(told, parse_constant=lambda name: 1 / 0)["measured"]["loss"] is None


def test_a_job_that_waited_or_was_paused_for_long_begins_when_it_starts(runs):
    run = runs.make("a", "QUEUED", job="7")
    hours_ago = time_of(time.time() - 18000)
    for event in ("submitted", "attempt", "start", "loaded", "training", "paused"):
        run.add_event(event, job="7", attempt=1)
    text = (run.path / "events.jsonl").read_text()
    (run.path / "events.jsonl").write_text(re.sub(r'"at": "[^"]*"', f'"at": "{hours_ago}"', text))
    os.utime(run.path / "status.json", (time.time() - 18000,) * 2)
    starts = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 5))
    queue = f"job|7|RUNNING|1:00|None|gpu-07|2:00|{starts}\n"
    found = health_of(view_of(run, read_queue(queue)))
    assert found.word == "starting" and re.fullmatch(r"beginning for \d s", found.reason)


def test_a_long_evaluation_is_not_silence(runs):
    run = training(runs)
    log(run, *lines())
    run.add_event("evaluation", step=40, seconds=400.0)
    long_ago = time.time() - 300
    for name in ("status.json", "events.jsonl", "metrics.jsonl"):
        os.utime(run.path / name, (long_ago, long_ago))
    assert health_of(view_of(run, None)).word == "good"


def test_the_last_evaluation_is_found_far_behind_the_last_lines(runs):
    run = training(runs)
    log(run, EVALUATED, *lines(2000))
    assert (run.path / "metrics.jsonl").stat().st_size > 1 << 18
    assert view_of(run, None).evaluated == EVALUATED


def test_of_a_million_steps_a_screen_reads_a_few(runs):
    run = training(runs, max_steps=1_200_000)
    records = [{**MFU, "step": step} for step in range(1, 1001)]
    block = "".join(json.dumps(r) + "\n" for r in records)
    with (run.path / "metrics.jsonl").open("w") as file:
        for _ in range(40):  # some ten megabytes
            file.write(block)
        file.write(json.dumps({**EVALUATED, "step": 999}) + "\n")
    seen = list(run.overview())
    assert 300 < len(seen) <= 400
    assert [r["step"] for r in run.evaluations()] == [999]
