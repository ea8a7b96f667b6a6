"""Who is to blame, by the accounts that the ranks of an attempt left, or did not leave."""

import argparse
import json

import pytest

from trainstack.job import attempts, blame
from trainstack.run.folder import RunFolder

SAMPLES, GRADIENTS = 1, 2  # positions within a step


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "a")
    run.create()
    ranks = [f"rank {rank} on node{rank // 2}: CPU, pid 1" for rank in range(4)]
    run.add_event("attempt", job="7", attempt=1, newest=0)
    run.add_event("start", job="7", attempt=1, ranks=ranks)
    return run


def account(run: RunFolder, rank: int, state: str = "FAILED", victim: bool = False, **facts):
    run.add_failure("7", 1, rank, state, 1, f"account of {rank}", victim, **facts)


def hang(run: RunFolder, rank: int, place: int) -> None:
    account(run, rank, "HANG", position=[25, place])


def blamed(run: RunFolder) -> tuple[int | str, str]:
    failure = blame.first_failure(run, "7", 1)
    return failure["rank"], failure["state"]


def test_the_first_that_was_no_victim_is_the_cause(run):
    account(run, 0, victim=True)
    account(run, 2)
    account(run, 1)
    assert blamed(run) == (2, "FAILED")


def test_ranks_that_only_lost_a_peer_point_at_the_one_that_left_no_word(run):
    for rank in (0, 1, 3):
        account(run, rank, victim=True)
    assert blamed(run) == (2, "FAILED")
    failure = blame.first_failure(run, "7", 1)
    assert failure["host"] == "node1"
    assert "left no word" in failure["cause"]


def test_of_ranks_that_hang_the_silent_one_holds_up_the_others(run):
    for rank in (0, 1, 2):
        hang(run, rank, GRADIENTS)
    assert blamed(run) == (3, "HANG")
    account(run, 3, is_second_hand=True)  # killed by launch.py in the end
    assert blamed(run) == (3, "HANG")


def test_a_rank_that_hangs_over_its_own_samples_waits_for_nobody(run):
    """NCCL aborts those who wait, and launch.py kills what is left: that says nothing of them."""
    hang(run, 3, SAMPLES)
    account(run, 0, is_second_hand=True, is_abort=True)
    account(run, 1, is_second_hand=True)
    assert blamed(run) == (3, "HANG")


def test_where_all_hang_and_speak_the_least_advanced_is_to_blame(run):
    for rank in (0, 1, 3):
        hang(run, rank, GRADIENTS + 1)
    hang(run, 2, GRADIENTS)
    assert blamed(run) == (2, "HANG")


def test_an_abort_by_nccl_comes_behind_any_other_account(run):
    account(run, 0, is_second_hand=True, is_abort=True, at="2026-01-01T00:00:00.000Z")
    account(run, 2, is_second_hand=True, at="2026-01-01T00:00:30.000Z")
    assert blamed(run) == (2, "FAILED")


def test_an_abort_alone_is_the_cause(run):
    account(run, 1, victim=True)
    account(run, 2, is_second_hand=True, is_abort=True)
    assert blamed(run) == (2, "FAILED")


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"job": "7", "attempt": 1, "restarts": 0, **changes})


@pytest.mark.parametrize(
    ("job_id", "restarts", "attempt", "is_replaced"),
    [("7", 0, 1, False), ("7", 1, 2, True), ("7", 0, 2, True), ("8", 0, 1, True)],
)
def test_a_life_knows_that_another_owns_the_run(run, job_id, restarts, attempt, is_replaced):
    holder = {"job": job_id, "attempt": attempt, "restarts": restarts, "host": "x", "pid": 1}
    (run.path / "lease/5.json").write_text(json.dumps(holder))
    assert attempts.is_replaced(run, options()) is is_replaced


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
    assert attempts.is_stuck(run, "7") is is_stuck


def test_windows_that_are_left_out_add_up_also_where_one_swallows_another(run):
    run.leave_out(20, 25)
    assert run.left_out() == [{"after": 20, "steps": 5}]
    run.leave_out(40, 44)
    assert run.left_out() == [{"after": 20, "steps": 5}, {"after": 40, "steps": 4}]
    run.leave_out(15, 42)  # back beyond both: steps 16 to 42 had used 27 + 5 + 4 steps of data
    assert run.left_out() == [{"after": 15, "steps": 36}]
