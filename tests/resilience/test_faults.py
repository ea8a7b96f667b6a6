"""Real ranks broken on purpose on this machine: the rows of the fault matrix without Slurm."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import tiny
from lab import Lab, wait_until, write_row
from slurm_user import processes_of
from trainstack.checkpoint import names
from trainstack.errors import ConfigError
from trainstack.resilience.faults import parse
from trainstack.storage import layout

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def lab(home, tmp_path_factory):
    return Lab(home, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def reference(lab):
    return lab.train("reference")


DEATHS = [  # row, fault, how the summary names it
    ("F07", "kill:rank=1,step=12,attempt=1", "rank 1 on HOST: killed by SIGKILL"),
    ("F08", "raise:rank=1,step=26,attempt=2", "rank 1 on HOST: RuntimeError: a fault that"),
    ("F08", "segv:rank=0,step=40,attempt=3", "rank 0 on HOST: killed by SIGSEGV"),
    ("F08", "abort:rank=1,step=55,attempt=4", "rank 1 on HOST: killed by SIGABRT"),
]


def test_a_rank_that_dies_in_any_way_is_named_and_the_job_continues_in_place(lab, reference):
    trace = lab.train("deaths", fault=";".join(fault for _, fault, _ in DEATHS))
    failed = trace.events("failed")
    assert len(failed) == len(DEATHS)
    for event, (row, _, blame) in zip(failed, DEATHS, strict=True):
        assert event["cause"].startswith(blame.replace("HOST", HOST)), row
    assert trace.output.count("Traceback (most recent call last)") == 1, "that of the exception"
    assert "RuntimeError: a fault that TRAINSTACK_FAULT asked for" in trace.output
    # Steps of 10 ms are faster than saves of 80: the newest one is still being written.
    assert trace.redone() <= 2 * 10 * len(DEATHS)
    lab.why(
        "deaths", "F07, F08", f"rank 1 on {HOST}: killed by SIGABRT", "restarted in place, from",
        "redone", "the run got past it", "a library may crash",
        *(blame.replace("HOST", HOST) for _, _, blame in DEATHS),
    )  # fmt: skip
    trace.record("F07, F08", "; ".join(f for _, f, _ in DEATHS), reference, failed[0]["cause"])


HANGS = [
    (  # slow: the watchdog has to look after the first steps, which may take 15 minutes
        "F11",
        "slow:rank=1,step=2,attempt=1;gil:rank=1,step=25,attempt=1",
        "rank 1 on HOST: stopped answering while the others",
    ),
    (
        "F11",
        "sleep:rank=0,step=25,attempt=2",
        r"rank 0 on HOST: no progress for [3-9] s at step 25, s",
    ),
    ("F10", "stop:rank=1,step=35,attempt=3", "rank 1 on HOST: stopped answering while the others"),
]


def test_a_rank_that_hangs_is_found_and_named_and_the_job_continues_in_place(lab, reference):
    faults = ";".join(fault for _, fault, _ in HANGS)
    trace = lab.train("hangs", "guard.hang_seconds=3", fault=faults)
    hung = trace.events("hang")
    assert len(hung) == len(HANGS), trace.events("failed", "hang")
    for event, (row, _, blame) in zip(hung, HANGS, strict=True):
        assert re.match(blame.replace("HOST", HOST), event["cause"]), (row, event["cause"])
    job = hung[0]["job"]
    stacks = {n: (trace.run.logs / f"{job}.{n[0]}.rank{n[1]}.stacks").read_text()
              for n in [(1, 0), (1, 1), (2, 0)]}  # fmt: skip
    assert re.search(r"in \w*gradients\b", stacks[1, 0]), "the one that waited"
    assert "faults.py" in stacks[1, 1], "the one that held the lock of the interpreter"
    assert "faults.py" in stacks[2, 0], "the one that slept"
    lab.why(
        "hangs", "F10, F11", f"rank 1 on {HOST}: stopped answering",
        "rank 0: its watchdog saw no progress", "restarted in place",
        f"rank 0 on {HOST}: no progress for", "at step 25, samples", "ddp.py:",
        "rank 0 waited at step 35, gradients", "raise guard.hang_seconds",
    )  # fmt: skip
    trace.record("F10, F11", "; ".join(f for _, f, _ in HANGS), reference, hung[0]["cause"])


@pytest.mark.matrix  # tests/cluster/test_slurm.py has one on a real Slurm
def test_an_error_that_comes_again_and_again_ends_as_no_progress(lab):
    trace = lab.train("stuck", fault="raise:rank=0,step=5,attempt=all", code=76, NPROC_PER_NODE="1")
    status = trace.run.status()
    assert (status["state"], status["exit_code"]) == ("NO_PROGRESS", 76)
    assert status["cause"].startswith("3 attempts without a newer checkpoint; the last one: rank 0")
    assert len(trace.events("attempt")) == 3
    lab.why("stuck", "F27", "NO_PROGRESS at step", f"rank 0 on {HOST}: RuntimeError: a fault that",
            "resilience/faults.py:", "ends in the same way, as three times near step",
            "ended the job", "bash submit.sh --resume stuck --local")  # fmt: skip
    write_row("F27", fault="raise:rank=0,step=5,attempt=all", redone=trace.redone(), repeated=0,
              skipped=0, identical=None, seconds=None, code=76,
              message=status["cause"])  # fmt: skip


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(lab):
    trace = lab.train("nan-stop", fault="nan:rank=1,step=25", code=79)
    status = trace.run.status()
    assert status["state"] == "DIVERGED"
    assert "step 25: not finite: loss nan" in status["cause"]
    assert "optim.learning_rate" in status["cause"]
    assert max(step for step, _ in names.checkpoints(trace.run.checkpoints)) == 20
    lab.why("nan-stop", "F28 stop", "DIVERGED: step 25: not finite", "lower",
            "ends in the same way; it lies with the workload", "resumes from checkpoint-20",
            "bash submit.sh --resume nan-stop --local")  # fmt: skip
    write_row("F28 stop", fault="nan:rank=1,step=25", redone=0, repeated=0, skipped=0,
              identical=None, seconds=None, code=79, message=status["cause"])  # fmt: skip


def test_a_skipped_update_leaves_the_weights_as_they_were_also_after_a_restart(lab):
    """The same NaN with and without a death behind it: what was decided is decided again."""
    skip = "guard.on_divergence=skip"
    once = lab.train("nan-skip", skip, fault="nan:rank=1,step=25")
    assert [e["step"] for e in once.events("skip")] == [25]
    assert "skip    step 25: not finite: loss nan" in once.output
    assert "1 of its 60 updates were not made, since a loss or gradient was not" in once.output
    again = lab.train("nan-skip-died", skip,
                      fault="nan:rank=1,step=25,attempt=all;kill:rank=0,step=28")  # fmt: skip
    assert again.equals(once)
    again.ledger()
    skipped = ("SKIPPED: step 25: not finite", "left that update out", "look at the data")
    lab.why("nan-skip", "F28 skip", *skipped, "nothing is wrong")
    lab.why("nan-skip-died", "F28 skip, killed", *skipped, f"rank 0 on {HOST}: killed by SIGKILL")
    write_row("F28 skip", fault="nan:rank=1,step=25,attempt=all;kill:rank=0,step=28",
              redone=again.redone(), repeated=0, skipped=0, identical=True,
              seconds=max(again.recovery_seconds()), code=0,
              message=once.events("skip")[0]["cause"])  # fmt: skip


def test_too_many_skips_in_a_row_are_a_divergence(lab):
    faults = ";".join(f"nan:rank=0,step={step}" for step in (24, 25, 26))
    settings = ("guard.on_divergence=skip", "guard.max_skips=2")
    trace = lab.train("nan-often", *settings, fault=faults, code=79, NPROC_PER_NODE="1")
    assert [e["step"] for e in trace.events("skip")] == [24, 25]
    assert "2 updates in a row were skipped before" in trace.run.status()["cause"]


def test_a_rollback_leaves_the_window_out_and_a_replay_agrees(lab):
    """NaN at step 25 of the first attempt, then a death: both must use the same samples."""
    settings = ("guard.on_divergence=rollback",)
    trace = lab.train(
        "nan-back", *settings, fault="nan:rank=1,step=25;kill:rank=1,step=33,attempt=2"
    )
    window = trace.run.left_out()
    assert len(window) == 1
    after, steps = window[0]["after"], window[0]["steps"]
    assert after in (10, 20)
    assert after + steps == 25
    assert f"the data of steps {after + 1} to 25 is left out" in trace.output
    text = trace.ledger()
    assert "left out" in text
    sampler_steps = {record["step"]: record["samples_hash"] for record in trace.steps()}
    plain = {record["step"]: record["samples_hash"] for record in lab.trace("reference").steps()}
    assert all(sampler_steps[s] == plain[s] for s in range(1, after + 1))
    assert all(sampler_steps[s] == plain[s + steps] for s in range(after + 1, 61 - steps))
    lab.why("nan-back", "F28 rollback", f"rank 1 on {HOST}: killed by SIGKILL", "redone",
            f"the data of steps {after + 1} to 25 is left out", "restarted in place")  # fmt: skip
    write_row("F28 rollback", fault="nan:rank=1,step=25; kill:rank=1,step=33,attempt=2",
              redone=trace.redone(), repeated=0, skipped=0, identical=None,
              seconds=max(trace.recovery_seconds()), code=0,
              message=trace.events("rollback")[0]["cause"])  # fmt: skip


def test_a_kill_in_the_middle_of_a_save_costs_no_more_than_that_save(lab, reference):
    """Points within a save that no timing could hit; the crash enumerator tries all of them."""
    faults = "crash:rank=0,op=4,attempt=1;crash:rank=1,op=2,attempt=2"
    trace = lab.train("torn", fault=faults)
    assert [e["cause"].partition(": killed by ")[2][:7] for e in trace.events("failed")] == [
        "SIGKILL", "SIGKILL"
    ]  # fmt: skip
    assert not list(trace.run.checkpoints.glob(".*")), "what was torn is cleaned up"
    lab.why("torn", "F17", f"rank 1 on {HOST}: killed by SIGKILL", "restarted in place",
            f"rank 0 on {HOST}: killed by SIGKILL", "the run got past it")  # fmt: skip
    trace.record("F17", faults, reference, trace.events("failed")[0]["cause"])


def test_a_full_quota_and_a_broken_disk_cost_a_save_but_no_step(lab, reference):
    faults = "edquot:rank=1,op=2;eio:rank=0,op=9"
    trace = lab.train("disk", fault=faults)
    failed = trace.events("save_failed")
    assert [e["step"] for e in failed] == [10]
    assert os.strerror(122) in failed[0]["cause"]
    assert "GB free" in failed[0]["cause"]
    assert "needed by rank 1" in failed[0]["cause"]
    lab.why("disk", "F18 EDQUOT, EIO", "SAVE_FAILED at step 10", os.strerror(122), "make space",
            f"needed by rank 1 on {HOST}", "left that save out", "the infrastructure")  # fmt: skip
    trace.record("F18 EDQUOT, EIO", faults, reference, failed[0]["cause"])


@pytest.mark.matrix
def test_a_disk_that_is_really_full_costs_saves_until_there_is_space_again(lab, reference):
    run = layout.run_folder(lab.home, "full")
    (run / "checkpoints").mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", run / "checkpoints"])
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        (run / "checkpoints/filler").write_bytes(b"x" * 1_950_000)
        process = lab.start("full", fault="slow:rank=0,step=1")  # a second between two saves
        trace = lab.trace("full")
        wait_until(lambda: trace.events("save_failed"), "a failed save")
        (run / "checkpoints/filler").unlink()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
        causes = [e["cause"] for e in trace.events("save_failed")]
        assert all("No space left on device (0.00 GB free)" in cause for cause in causes)
        assert len(trace.events("attempt")) == 1, "it continues"
        trace.output = output
        lab.why("full", "F18 ENOSPC", "SAVE_FAILED", "No space left on device", "make space",
                "left that save out", f"on {HOST}")  # fmt: skip
        trace.record("F18 ENOSPC", "a disk of 2 MiB, filled", reference, causes[0])
    finally:
        subprocess.run(["umount", run / "checkpoints"], check=True)


def test_a_stop_in_the_first_second_and_one_in_the_last_save_lose_nothing(lab, reference):
    process = lab.start("early")
    trace = lab.trace("early")
    wait_until(lambda: trace.events("attempt"), "the first attempt")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert trace.run.status()["state"] == "PAUSED"
    assert re.search(r"PAUSED(: | \(| at step 0 )", output), output
    process = lab.start("early")
    wait_until(lambda: any(r["step"] >= 55 for r in trace.steps()), "the last steps")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 75), output
    if process.returncode == 75:
        assert trace.run.status()["state"] == "PAUSED"
        lab.train("early")
    lab.why("early", "F31", "PAUSED", "nothing is wrong", "continued it")
    trace.record("F31", "SIGTERM at start, SIGTERM in the last save", reference, "PAUSED")


@pytest.mark.matrix
def test_a_rank_that_the_kernel_kills_for_its_memory_is_named_with_the_limit(lab, reference):
    """A real memory cgroup: the kernel chooses the rank that takes the most."""
    parent = Path("/sys/fs/cgroup/memory")
    if not (parent / "memory.limit_in_bytes").exists() or os.geteuid() != 0:
        pytest.skip("only root with a memory controller of cgroup v1 can limit memory here")
    group = parent / f"trainstack-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(3 << 30))
        command = lab.command("run.name=oom")
        script = f"echo $$ >{group}/cgroup.procs && exec {shlex.join(command)}"
        environment = lab.environment(TRAINSTACK_FAULT="oom:rank=1,step=25")
        done = subprocess.run(
            ["bash", "-c", script], env=environment, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the end of the job")
        group.rmdir()
    assert done.returncode == 0, done.stdout[-3000:]
    trace = lab.trace("oom", done.stdout)
    cause = trace.events("failed")[0]["cause"]
    assert cause == (
        f"rank 1 on {HOST}: killed by the kernel: out of memory (host memory, limit 3,072 MiB)"
    )
    lab.why("oom", "F12", cause, "the kernel counted a kill for memory", "restarted in place",
            "lower train.micro_batch_size")  # fmt: skip
    trace.record("F12", "memory taken beyond a cgroup's limit", reference, cause)


def test_a_run_moves_from_two_to_four_to_one_process_and_uses_every_sample_once(lab, reference):
    for processes, step in (("2", 20), ("4", 40)):
        fault = f"term:rank=0,step={step}"
        lab.train("moved", fault=fault, code=75, NPROC_PER_NODE=processes)
    trace = lab.train("moved", NPROC_PER_NODE="1")
    assert trace.redone() == 0
    trace.ledger()
    losses, theirs = trace.losses(), reference.losses()
    assert losses.keys() == theirs.keys()
    furthest = max(abs(losses[s] - theirs[s]) / theirs[s] for s in losses)
    assert furthest < 1e-4
    changes = [event["changes"] for event in trace.events("resume")]
    assert changes == [["processes: 2 -> 4"], ["processes: 4 -> 1"]]
    lab.why(
        "moved",
        "F13",
        "PAUSED at step 40: asked to end by SIGTERM",
        "saved",
        "processes: 4 -> 1",
        "no step;",
    )
    write_row("F13", fault="2 -> 4 -> 1 processes", redone=0, repeated=0, skipped=0,
              identical=None, seconds=max(trace.recovery_seconds()), code=0,
              message=f"losses differ by at most {furthest:.1e}, relative")  # fmt: skip


def test_a_clock_that_is_a_minute_off_is_named_before_anything_begins(lab):
    if not shutil.which("faketime"):
        pytest.skip("Debian's faketime is not here")
    library = subprocess.run(
        ["faketime", "-f", "+60s", "printenv", "LD_PRELOAD"], capture_output=True, text=True
    ).stdout.strip()
    clock = {"LD_PRELOAD": library, "FAKETIME": "+60s", "NO_FAKE_STAT": "1"}
    clock["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"
    trace = lab.train("skewed", code=2, **clock)
    cause = trace.run.status()["cause"]
    assert cause == f"the clock of {HOST} is +60 s off that of the file system; fix its NTP"
    assert not trace.steps()
    lab.why("skewed", "F29", cause, "the infrastructure", "on other nodes only", "--resume skewed")
    write_row("F29", fault="clock of the node 60 s ahead (faketime)", redone=0, repeated=0,
              skipped=0, identical=None, seconds=None, code=2, message=cause)  # fmt: skip


@pytest.mark.matrix
def test_data_that_is_refreshed_while_a_job_trains_reaches_only_new_runs(home, tmp_path):
    """The job keeps the data it began with; the same run does not resume with other data."""
    source = tmp_path / "source"
    source.mkdir()
    documents = [json.dumps({"text": "one two three four five six " * 30}) for _ in range(300)]
    (source / "train.jsonl").write_text("\n".join(documents))
    model = tmp_path / "model"
    shutil.copytree(home / "models/tiny", model, ignore=shutil.ignore_patterns("manifest.json"))
    lab = Lab(home, tmp_path / "lab", data__name=str(source), model__name=str(model))
    fetch = ["bash", str(lab.checkout / "download_data_model.sh")]

    def download(**changes: str) -> None:
        environment = lab.environment(MODEL_NAME=str(model), DATASET_NAME=str(source), **changes)
        done = subprocess.run(fetch, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    download()
    process = lab.start("f34", fault="slow:rank=0,step=1")
    trace = lab.trace("f34")
    wait_until(lambda: len(trace.steps()) >= 10, "training")
    (source / "train.jsonl").write_text("\n".join(documents).replace("six", "ten"))
    download(FORCE_REFRESH="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    trace.ledger()
    refused = subprocess.run(
        lab.command("run.name=f34", "train.max_steps=80"), env=lab.environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode == 78, refused.stderr
    assert "run f34 cannot continue with tokens=" in refused.stderr
    lab.why("f34", "F34", "DONE at step 60", "cannot continue with tokens=", "before the queue",
            "ends in the same way; it lies with", "choose another run.name")  # fmt: skip
    lab.train("f34-new", "train.max_steps=5").ledger()
    write_row("F34", fault="FORCE_REFRESH while a job trains", redone=0, repeated=0, skipped=0,
              identical=None, seconds=None, code=78, message=refused.stderr.strip())  # fmt: skip


@pytest.mark.parametrize(
    ("kills", "stops"), [(4, 2), pytest.param(12, 8, marks=pytest.mark.matrix)]
)
def test_random_kills_and_stops_change_no_loss_no_weight_and_no_second(lab, kills, stops):
    """Kills of everything and polite stops at random moments; where the time went adds up."""
    steps = 10 * (kills + stops)
    settings = (f"train.max_steps={steps}", f"eval.eval_steps={steps // 2}")
    alone = lab.train(f"alone-{steps}", *settings)
    generator, slow = random.Random(7), "slow:rank=0,step=1"
    kinds = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    generator.shuffle(kinds)
    run, began_at = f"random-{steps}", None
    trace = lab.trace(run)
    for attempt, kind in enumerate(kinds, start=1):
        process = lab.start(run, *settings, fault=slow)
        wait_until(lambda n=attempt: len(trace.events("attempt")) == n, "an attempt")
        began_at = began_at or time.time()
        if ahead := generator.choice([0, 0, 2, 4, 6, 12]):  # 0: while it starts and loads
            done = len(trace.steps())
            wait_until(lambda n=done + ahead: len(trace.steps()) >= n, "some steps")
        time.sleep(generator.random() * 0.5)
        os.killpg(process.pid, kind)
        process.communicate(timeout=60)
        assert trace.run.status()["state"] != "DONE", "it ended before it was interrupted"
    lab.train(run, *settings)
    # Up to the last event: how long processes then take to end depends on the machine.
    wall_seconds = (trace.run.path / "events.jsonl").stat().st_mtime - began_at
    assert len(trace.events("attempt")) == len(kinds) + 1
    goodput = tiny.run_command("goodput", trace.run.path).stdout
    rows = dict(re.findall(r"^  (\w+) +([\d.]+) +[\d.]+", goodput, re.MULTILINE))
    total = float(rows.pop("all"))
    assert sum(map(float, rows.values())) == pytest.approx(total, abs=0.05 * len(rows))
    assert total == pytest.approx(wall_seconds, rel=0.01, abs=1.0)
    share = goodput.splitlines()[-1].strip().partition(",")[0]
    message = f"{share}; its causes add up to {total:.1f} s of {wall_seconds:.1f} s on the clock"
    said = lab.why(run, f"F14 {kills}, {stops}", f"{kills + stops} incidents, the last")
    assert ("PAUSED" if kinds[-1] == signal.SIGTERM else "KILLED") in said
    trace.record("F14", f"{kills} kills, {stops} stops, {steps} steps", alone, message)
    print(goodput)


@pytest.mark.matrix
def test_an_interval_that_is_chosen_automatically_changes_nothing_but_when_it_saves(lab, reference):
    settings = ("checkpoint.save_steps=auto", "checkpoint.failure_hours=0.00001")
    trace = lab.train("auto", *settings, fault="slow:rank=0,step=1")
    saved = [event["step"] for event in trace.events("checkpoint")]
    assert len(saved) >= 3
    assert all(b - a >= 10 for a, b in zip(saved, saved[1:-1], strict=False))
    assert trace.equals(reference)


def test_an_evaluation_that_a_stop_cut_short_is_made_first_in_the_next_attempt(lab):
    settings = ("train.max_steps=20", "eval.eval_steps=10")
    alone = lab.train("evaluated", *settings, NPROC_PER_NODE="1")
    lab.train("broken-off", *settings, fault="term:rank=0,step=10", code=75, NPROC_PER_NODE="1")
    trace = lab.trace("broken-off")
    assert trace.run.status()["step"] == 10
    assert not trace.events("evaluation"), "no time for it"
    lab.train("broken-off", *settings, NPROC_PER_NODE="1")
    assert [event["step"] for event in trace.events("evaluation")] == [10, 20]
    theirs, ours = (tiny.metrics(lab.home, t.run.path.name, "eval_loss") for t in (alone, trace))
    assert theirs == ours
    assert trace.equals(alone)


def test_a_job_that_was_stopped_as_a_whole_has_not_hung_and_ctrl_c_saves_in_one_line(lab):
    process = lab.start("interrupted", "train.max_steps=100000", "guard.hang_seconds=1")
    trace = lab.trace("interrupted")
    wait_until(lambda: len(trace.steps()) > 5, "training")
    pids = [*processes_of("interrupted")]  # the launcher and the ranks, as Slurm suspends them
    assert len(pids) >= 3
    for number, seconds in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)  # beyond hang_seconds and LOCKED_SECONDS
    before = len(trace.steps())
    wait_until(lambda: len(trace.steps()) > before + 100, "further steps")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert "PAUSED at step" in output
    assert not trace.events("hang", "failed")


def test_a_pipe_whose_reader_has_gone_costs_nothing(lab):
    """``submit.sh | head``, and Ctrl-C with ``| tee``, which ends tee first."""
    process = lab.start("piped", "train.max_steps=100000")
    trace = lab.trace("piped")
    wait_until(lambda: len(trace.steps()) > 5, "training")
    process.stdout.close()
    before = len(trace.steps())
    wait_until(lambda: len(trace.steps()) > before + 100, "further steps")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert trace.run.status()["state"] == "PAUSED"
    assert not trace.events("failed")
    logs = "".join(path.read_text() for path in trace.run.logs.glob("*.rank*.log"))
    assert "PAUSED at step" in logs and "Traceback" not in logs


@pytest.mark.parametrize(
    ("text", "problem"),
    [("kill:rank=x", "rank=x; write rank=1,step=25"), ("melt", "melt is none of kill, stop"),
     ("kill:node=1", "node=1; write rank=1,step=25")],
)  # fmt: skip
def test_a_fault_that_is_none_is_one_clear_line(text, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(text)


def test_a_fault_is_checked_and_announced_before_anything_begins(lab):
    command = lab.command("run.name=typo", "train.max_steps=1")
    done = subprocess.run(
        [*command, "--dry-run"], env=lab.environment(TRAINSTACK_FAULT="kil:rank=1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("submit.sh: error: TRAINSTACK_FAULT=kil:rank=1: kil is none of")
    done = subprocess.run(
        [*command, "--dry-run"], env=lab.environment(TRAINSTACK_FAULT="kill:rank=1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "TRAINSTACK_FAULT is set, this run breaks on purpose: kill:rank=1" in done.stderr
