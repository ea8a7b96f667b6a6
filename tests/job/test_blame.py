"""Who is to blame, by the failure reports that the ranks of an attempt left, or did not leave."""

import pytest

from trainstack.job.blame import blame, unreported
from trainstack.run.folder import RunFolder
from trainstack.run.states import Phase
from trainstack.units import time_of


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "a")
    run.create()
    ranks = [f"rank {rank} on node{rank // 2}: CPU, pid 1" for rank in range(4)]
    run.add_event("attempt", job="7", attempt=1, newest=0)
    run.add_event("start", job="7", attempt=1, ranks=ranks)
    return run


def report(run: RunFolder, rank: int, state: str = "FAILED", victim: bool = False, **facts):
    run.add_failure("7", 1, rank, state, 1, f"report of {rank}", victim, **facts)


def hang(run: RunFolder, rank: int, phase: Phase, step: int = 25, **facts) -> None:
    report(run, rank, "HANG", position=[step, phase.number], **facts)


def blamed(run: RunFolder) -> tuple[int | str, str]:
    failure = blame(run, "7", 1)
    return failure["rank"], failure["state"]


# --- Rule 1: a hang over its own samples


def test_a_rank_that_hangs_over_its_own_samples_waits_for_nobody(run):
    """NCCL aborts those who wait, and launch.py kills what is left: that says nothing of them."""
    hang(run, 3, Phase.SAMPLES)
    report(run, 0, is_second_hand=True, is_abort=True)
    report(run, 1, is_second_hand=True)
    assert blamed(run) == (3, "HANG")


def test_a_hang_over_samples_comes_before_a_silent_rank_and_a_less_advanced_one(run):
    hang(run, 0, Phase.GRADIENTS, step=24)
    hang(run, 2, Phase.SAMPLES)
    assert blamed(run) == (2, "HANG")


# --- Rule 2: the silent rank that the hung ones wait for


def test_of_ranks_that_hang_the_silent_one_holds_up_the_others(run):
    for rank in (0, 1, 2):
        hang(run, rank, Phase.GRADIENTS)
    assert blamed(run) == (3, "HANG")
    report(run, 3, is_second_hand=True)  # killed by launch.py in the end
    assert blamed(run) == (3, "HANG")
    failure = blame(run, "7", 1)
    assert failure["host"] == "node1"
    assert (
        failure["cause"] == "stopped answering while the others waited for it (rank 0: report of 0)"
    )


# --- Rule 3: the least advanced


def test_if_all_hang_and_report_the_least_advanced_is_to_blame(run):
    for rank in (0, 1, 3):
        hang(run, rank, Phase.UPDATE)
    hang(run, 2, Phase.GRADIENTS)
    assert blamed(run) == (2, "HANG")


def test_of_ranks_that_wait_at_one_place_the_one_that_began_the_fewest_collectives_is_to_blame(run):
    """On GPUs the hosts are ahead, and all wait for what they queued."""
    for rank, collective in ((0, 120), (1, 120), (2, 119), (3, 120)):
        hang(run, rank, Phase.GRADIENTS, collective=collective)
    assert blamed(run) == (2, "HANG")


def test_a_step_counts_more_than_a_phase(run):
    for rank in (0, 1, 2):
        hang(run, rank, Phase.GRADIENTS, step=26)
    hang(run, 3, Phase.SAVE, step=25)
    assert blamed(run) == (3, "HANG")


def test_a_failure_of_another_kind_is_the_cause_of_hangs(run):
    """Rules 1 to 3 need hangs and victims alone."""
    hang(run, 0, Phase.SAMPLES)
    report(run, 1, at="2026-01-01T00:00:00.000Z")
    assert blamed(run) == (1, "FAILED")


# --- Rule 4: the silent rank that the others lost


def test_ranks_that_only_lost_a_peer_point_at_the_one_that_did_not_report(run):
    for rank in (0, 1, 3):
        report(run, rank, victim=True)
    assert blamed(run) == (2, "FAILED")
    failure = blame(run, "7", 1)
    assert failure["host"] == "node1"
    assert "disappeared without a report, and the others lost it" in failure["cause"]


# --- Rule 5: the first that was not a victim


def test_the_first_that_was_not_a_victim_is_the_cause(run):
    report(run, 0, victim=True, at=time_of(1e9 + 0))
    report(run, 2, at=time_of(1e9 + 1))
    report(run, 1, at=time_of(1e9 + 2))
    assert blamed(run) == (2, "FAILED")


def test_an_abort_by_nccl_comes_after_any_other_report(run):
    report(run, 0, is_second_hand=True, is_abort=True, at="2026-01-01T00:00:00.000Z")
    report(run, 2, is_second_hand=True, at="2026-01-01T00:00:30.000Z")
    assert blamed(run) == (2, "FAILED")


def test_an_abort_alone_is_the_cause(run):
    report(run, 1, victim=True)
    report(run, 2, is_second_hand=True, is_abort=True)
    assert blamed(run) == (2, "FAILED")


def test_victims_alone_blame_the_first_of_them(run):
    for second, rank in enumerate((1, 0, 2, 3)):
        report(run, rank, victim=True, at=time_of(1e9 + second))
    assert blamed(run) == (1, "FAILED")


# --- No report at all


def test_without_any_report_nobody_is_blamed_and_the_hosts_are_named(run):
    assert blame(run, "7", 1) is None
    cause = unreported(run, "7", 1, code=42)["cause"]
    assert cause == (
        "the processes exited with code 42 without reporting a cause (node lost, or killed; it ran "
        "on node0, node1)"
    )
    assert unreported(run, "7", 2, code=1)["cause"].endswith("(killed, or never begun)")
