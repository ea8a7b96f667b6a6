"""How an attempt ended, and what follows, by what the ranks, Slurm and the stop file say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainstack.job import verdict
from trainstack.job.verdict import Ending, Told, decide
from trainstack.run.folder import TORCHRUN_GOT, RunFolder
from trainstack.run.lease import Owner

OURS = Owner("7", 3)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run in its third attempt, which has trained beyond a checkpoint of its own."""
    run = RunFolder(tmp_path / "runs" / "a")
    run.create()
    for attempt in (1, 2, 3):
        run.add_event("attempt", job="7", attempt=attempt, newest=0)
    run.add_event("start", job="7", attempt=3, ranks=["rank 0 on node0: CPU, pid 1"])
    run.add_event("training", step=0)
    (run.checkpoints / "checkpoint-5").mkdir()
    run.set_status("RUNNING", job="7", attempt=3, step=9)
    return run


def node_failed(run: RunFolder, **facts) -> None:
    run.add_failure("7", 3, "none", "FAILED", 1, "node2: no sight of x", False, **facts)


def fail(run: RunFolder, state: str = "FAILED", code: int = 1, **facts) -> None:
    run.add_failure("7", 3, 0, state, code, "no space left", False, **facts)


def lose(run: RunFolder, job: str, attempt: int, restarts: int = 0) -> None:
    holder = {"job": job, "attempt": attempt, "restarts": restarts, "host": "x", "pid": 1}
    (run.path / "lease/5.json").write_text(json.dumps(holder))


def stop(run: RunFolder, reason: str = "Slurm warned of the end of the job") -> Path:
    path = run.logs / "7.0.stop"
    path.write_text(f"{reason}\n")
    return path


def forget_progress(run: RunFolder) -> None:
    (run.checkpoints / "checkpoint-5").rmdir()


def paused(run: RunFolder) -> None:
    run.pause("7", 3, "SIGTERM")


def paused_and_taken_over(run: RunFolder) -> None:
    paused(run)
    run.set_status("STARTING", job="8", attempt=1)
    run.add_event("attempt", job="8", attempt=1, newest=5)


def paused_without_progress(run: RunFolder) -> None:
    forget_progress(run)
    paused(run)


def failed_without_progress(run: RunFolder) -> None:
    forget_progress(run)
    fail(run)


def stopped_then_failed(run: RunFolder) -> None:
    stop(run)
    fail(run)


def failed_and_ended_by_srun(run: RunFolder) -> None:
    stop(run, f"{TORCHRUN_GOT} SIGTERM")
    fail(run)


def refused(run: RunFolder) -> None:
    lose(run, "7", 3)
    run.set_status("RUNNING", job="8", attempt=1)
    fail(run, "REFUSED", 78)


SITUATIONS: dict[str, tuple[Callable, str, int, str | None]] = {
    # what happened -> what follows, exit code, state to write
    "done": (lambda run: run.set_status("DONE", job="7", attempt=3), "end", 0, None),
    "paused": (paused, "requeue", 75, None),
    "paused without progress": (paused_without_progress, "end", 76, "NO_PROGRESS"),
    "replaced": (lambda run: lose(run, "7", 4), "end", 78, None),
    "no report": (lambda run: None, "restart", 1, "RESTARTING"),
    "failed": (fail, "restart", 1, "RESTARTING"),
    "hung": (lambda run: fail(run, "HANG", 81, position=[3, 1]), "restart", 81, "RESTARTING"),
    "rolled back": (
        lambda run: fail(run, "DIVERGED", 79, is_rollback=True), "restart", 79, "RESTARTING"
    ),
    "failed without progress": (failed_without_progress, "end", 76, "NO_PROGRESS"),
    "failed, srun ended the others": (failed_and_ended_by_srun, "restart", 1, "RESTARTING"),
    "paused, and the next job of the chain has begun": (
        paused_and_taken_over, "requeue", 75, None
    ),
    "stopped, then failed": (stopped_then_failed, "requeue", 75, "PAUSED"),
    "wrong setting": (lambda run: fail(run, code=2), "end", 2, "FAILED"),
    "a node is blind": (lambda run: node_failed(run, is_final=True), "end", 1, "FAILED"),
    "a node is blind, others are there": (
        lambda run: node_failed(run, is_elsewhere=True), "requeue", 75, "PAUSED"
    ),
    "diverged": (lambda run: fail(run, "DIVERGED", 79), "end", 79, "DIVERGED"),
    "refused by the holder": (refused, "end", 78, None),
}  # fmt: skip


def files(run: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def decided(run: RunFolder, **changes) -> Ending:
    return decide(run, OURS, Told(1, **{"stop_file": run.logs / "7.0.stop", **changes}))


@pytest.mark.parametrize("what", SITUATIONS)
def test_what_follows_an_attempt_is_decided_without_writing_anything(run, what):
    happen, verdict, code, state = SITUATIONS[what]
    happen(run)
    before = files(run)
    ending = decided(run)
    assert (ending.verdict, ending.code, ending.state) == (verdict, code, state)
    assert files(run) == before


def test_a_job_that_ends_is_not_restarted(run):
    fail(run)
    ending = decided(run, is_ending=True)
    assert (ending.verdict, ending.code, ending.state) == ("end", 1, "FAILED")


def test_a_job_that_slurm_took_back_leaves_the_run_to_its_next_start(run):
    fail(run)
    ending = decided(run, is_taken_back=True)
    assert (ending.verdict, ending.state, ending.event) == ("end", None, "node_lost")
    assert "it resumes from checkpoint-5: 4 steps to redo" in ending.lines[0]


def test_an_error_that_comes_again_before_any_step_is_not_tried_a_third_time(tmp_path):
    run = RunFolder(tmp_path / "runs" / "b")
    run.create()
    for attempt, verdict_ in ((1, "restart"), (2, "end")):
        run.add_event("attempt", job="7", attempt=attempt, newest=0)
        report = ("7", attempt, 0, "FAILED", 1, "ValueError: shapes do not fit", False)
        run.add_failure(*report, traceback=["x"])
        ending = decide(run, Owner("7", attempt), Told(1))
        assert ending.verdict == verdict_
        run.add_event("failed", job="7", attempt=attempt, cause=ending.cause)
    assert ending.cause.endswith("ValueError: shapes do not fit; twice, before any step")


def test_memory_that_runs_out_again_is_not_tried_a_third_time(tmp_path):
    run = RunFolder(tmp_path / "runs" / "b")
    run.create()
    gpu = "out of GPU memory: CUDA out of memory. Tried to allocate %d GiB"
    for attempt, verdict_ in ((1, "restart"), (2, "end")):
        run.add_event("attempt", job="7", attempt=attempt, newest=0)
        run.add_failure("7", attempt, 0, "FAILED", 1, gpu % attempt, False)
        ending = decide(run, Owner("7", attempt), Told(1))
        assert ending.verdict == verdict_
        if attempt == 1:
            run.add_event("failed", job="7", attempt=1, cause=ending.cause, step=9)
    assert ending.cause.endswith("2 GiB; twice, without a newer checkpoint")
    (run.checkpoints / "checkpoint-5").mkdir()  # its event may be missing
    assert decide(run, Owner("7", 2), Told(1)).verdict == "restart", "it came further"


def test_a_kill_that_may_be_for_memory_is_no_proof_of_it(run):
    cause = "killed by SIGKILL (out of memory, or somebody's kill -9)"
    run.add_event("failed", job="7", attempt=2, cause=cause, step=9)
    run.add_failure("7", 3, 0, "FAILED", 1, cause, False)
    assert decided(run).verdict == "restart"


@pytest.mark.parametrize("excuse", ["preempted", "node_lost"])
def test_attempts_that_slurm_ended_while_they_started_do_not_count(tmp_path, excuse):
    run = RunFolder(tmp_path / "runs" / "b")
    run.create()
    for attempt in range(1, 6):
        run.add_event("attempt", job="7", attempt=attempt, newest=0)
        run.add_event(excuse, job="7", attempt=attempt)
        assert not verdict.is_stuck(run, "7")
    run.pause("7", 5, "SIGTERM")
    told = Told(1, run.logs / "7.0.stop", is_preempted=True)
    assert decide(run, Owner("7", 5), told).verdict == "requeue"
    for attempt in range(6, 9):
        run.add_event("attempt", job="7", attempt=attempt, newest=0)
        run.add_event("training", step=0)
        run.add_event(excuse, job="7", attempt=attempt)
    assert verdict.is_stuck(run, "7")


@pytest.mark.parametrize(
    ("job", "restarts", "attempt", "is_replaced"),
    [("7", 0, 3, False), ("7", 1, 4, True), ("7", 0, 4, True), ("8", 0, 1, True)],
)
def test_an_attempt_knows_that_another_one_owns_the_run(run, job, restarts, attempt, is_replaced):
    lose(run, job, attempt, restarts)
    assert verdict.is_replaced(run, OURS) is is_replaced


@pytest.mark.parametrize(
    ("newest", "now", "is_stuck"),
    [([0, 0, 0], 0, True), ([0, 10, 20], 30, False), ([10, 10, 10], 20, False), ([0, 0], 0, False),
     ([200, 150, 160], 170, False), ([30, 20, 20], 20, True)],
)  # fmt: skip
def test_three_attempts_without_a_newer_checkpoint_are_enough(tmp_path, newest, now, is_stuck):
    """200 was damaged and set aside: what came after it is newer all the same."""
    run = RunFolder(tmp_path / "runs" / "b")
    run.create()
    for attempt, step in enumerate(newest, start=1):
        run.add_event("attempt", job="7", attempt=attempt, newest=step)
    if now:
        (run.checkpoints / f"checkpoint-{now}").mkdir()
    assert verdict.is_stuck(run, "7") is is_stuck
