"""The waits that depend on each other stay in the relation that the right rank is blamed by."""

from torch.distributed.run import get_args_parser

import tiny
from trainstack import waits
from trainstack.config.load import load

TORCHRUN_KILLS_SECONDS = 30  # torch.distributed.elastic.multiprocessing.api, PContext.close


def test_torchrun_sees_the_rank_that_failed_first_before_its_victims_end():
    looks_each = get_args_parser().get_default("monitor_interval")
    assert looks_each < waits.PEER_LOST_SECONDS


def test_all_ranks_can_report_before_launch_kills_them():
    assert waits.PEER_LOST_SECONDS < waits.SHUTDOWN_SECONDS
    # A rank that holds Python's lock: faulthandler writes its stacks, launch.py looks, and ends it.
    looks = waits.LOOK_SECONDS * (waits.LOCKED_LOOKS + 1)
    assert waits.LOCKED_SECONDS + looks < waits.SHUTDOWN_SECONDS


def test_ranks_that_wait_for_a_locked_one_report_before_it_ends():
    assert waits.TICKS_SECONDS < waits.LOCKED_SECONDS


def test_launch_kills_a_rank_that_does_not_hear_before_torchrun_would():
    assert waits.LOOK_SECONDS + waits.SHUTDOWN_SECONDS < TORCHRUN_KILLS_SECONDS


def test_a_hang_is_reported_before_a_locked_rank_is_taken_for_one_though_a_record_may_take_long():
    assert waits.TICKS_SECONDS + waits.RECORD_SECONDS < waits.LOCKED_SECONDS


def test_a_watchdog_that_is_late_by_a_tick_does_not_take_its_process_for_stopped():
    assert waits.TICKS_SECONDS < waits.STOPPED_SECONDS


def test_a_new_owner_waits_until_the_former_one_has_looked_at_the_lease():
    assert waits.OWNED_SECONDS < waits.TAKEOVER_SECONDS


def test_a_hang_is_found_and_blamed_before_the_collectives_give_up():
    """Otherwise the ranks that wait would all be victims of a timeout, and none would hang."""
    shipped = load(tiny.ROOT / "config.yaml", [])
    assert shipped.guard.hang_seconds < waits.COLLECTIVE_SECONDS


def test_ranks_that_wait_for_rank_0_meet_long_before_a_collective_gives_up():
    assert 10 * waits.MEET_SECONDS < waits.COLLECTIVE_SECONDS


def test_a_text_is_cut_before_the_ranks_that_wait_for_it_give_up():
    assert waits.ANSWER_SECONDS < waits.COLLECTIVE_SECONDS


def test_many_heartbeats_are_missed_before_a_job_is_taken_for_gone():
    assert 4 * waits.HEARTBEAT_SECONDS < waits.ALIVE_SECONDS


def test_hosts_that_cannot_reach_each_other_are_named_within_two_minutes():
    assert waits.REACH_SECONDS + waits.SHUTDOWN_SECONDS < 60


def test_a_node_that_is_slow_to_begin_is_waited_for_as_long_as_ranks_may_start():
    assert waits.REACH_SECONDS < waits.MARK_SECONDS < waits.CONNECT_SECONDS
