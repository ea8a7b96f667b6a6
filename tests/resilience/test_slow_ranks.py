"""Who is slower than the others for a while, by which own times; what is left as evidence."""

import os
import re
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tiny
from trainstack import processes
from trainstack.data.feed import StepData
from trainstack.distributed import World
from trainstack.resilience import evidence
from trainstack.resilience.slow_ranks import Change, SlowRanks, median_without
from trainstack.run.folder import RunFolder
from trainstack.train.attempt import Attempt
from trainstack.train.numbers import Requested, StepNumbers, StepResult
from trainstack.train.ranks import Ranks

Told = list[tuple[int, int, bool]]  # at which second, which rank, whether it is slow


def judged(
    own_seconds: Callable[[int], list[float]], seconds: float, step_seconds: float = 0.1
) -> Told:
    """What is told within so many seconds; ``own_seconds``: of each rank in a step, from 0."""
    ranks, told = SlowRanks(), []
    for step in range(round(seconds / step_seconds)):
        changes = ranks.note(own_seconds(step), 1000 + step * step_seconds)
        told += [(round(step * step_seconds), c.rank, c.is_slow) for c in changes]
    return told


@pytest.mark.parametrize("usual", [[0.04, 0.04], [0.04, 0.04, 0.05], [0.04] * 9])
def test_a_rank_slowed_to_half_is_told_once_within_two_minutes_and_once_when_it_is_over(usual):
    def own_seconds(step: int) -> list[float]:  # slow from 40 to 300 s
        factor = 2 if 400 <= step < 3000 else 1
        return [*usual[:-1], usual[-1] * factor]

    (began, *slow), (ended, *fast) = judged(own_seconds, 600)
    assert slow == [len(usual) - 1, True] and fast == [len(usual) - 1, False]
    assert 40 + 80 <= began <= 40 + 115
    assert 300 + 80 <= ended <= 300 + 115


def test_two_of_five_that_are_slow_are_both_told():
    told = judged(lambda step: [0.04, 0.08, 0.04, 0.04, 0.07], 200)
    assert told == [(100, 1, True), (100, 4, True)]


@pytest.mark.parametrize("step_seconds", [0.004, 0.1, 1.5, 5.0])
def test_steps_of_any_length_are_judged_in_time(step_seconds):
    own = step_seconds / 3
    ((at, rank, is_slow),) = judged(lambda step: [own * 2, own], 130, step_seconds)
    assert (rank, is_slow) == (0, True) and 90 <= at <= 120


def test_a_burst_a_drift_and_a_rank_that_is_a_little_slower_are_not_told():
    def own_seconds(step: int) -> list[float]:  # 75 s of something else on the machine
        return [0.04 * (5 if 300 <= step < 1050 else 1), 0.04]

    assert not judged(own_seconds, 600)
    assert not judged(lambda step: [0.04, 0.056, 0.04], 600)
    assert not judged(lambda step: [0.04 + step / 1e4] * 2, 600), "all alike"


def test_pauses_that_hit_one_step_of_many_count():
    """As by a quota of CPU time: it may run for half of each second, and then not at all."""
    own = lambda step: [0.01 + 0.5 * (step % 25 == 7), 0.01]  # noqa: E731  # a second each
    ((at, rank, is_slow),) = judged(own, 130, 0.04)
    assert (rank, is_slow) == (0, True) and at <= 105


def test_a_rank_is_compared_with_all_others_and_not_with_itself():
    for size in range(2, 10):
        seconds = np.random.default_rng(size).integers(1, 5, size).tolist()  # some alike
        for rank in range(size):
            others = [*seconds[:rank], *seconds[rank + 1 :]]
            found = median_without(sorted(seconds), seconds[rank])
            assert found == statistics.median(others)


def test_thousands_of_ranks_are_judged_in_little_time():
    ranks, own = SlowRanks(), np.random.default_rng(1).random(4096).tolist()
    began = time.process_time()
    for step in range(9):  # two windows
        ranks.note(own, 6.0 * step)
    assert time.process_time() - began < 0.3, "1 s or more if each rank sorts the others"


def test_what_is_kept_until_a_log_line_does_not_grow_and_the_line_has_all_of_it(tmp_path):
    world = World(0, 0, 1, 1, torch.device("cpu"))
    ranks = Ranks(Attempt(None, world, None, RunFolder(tmp_path), None, None, 9, 9))
    tracemalloc.start()
    try:
        for step in range(10_000):
            own = [0.1 + step / 1e6, 0.2, *[0.3] * 62]
            ranks.note(StepResult(step, 1, 1, False, None, "", own, step / 10, 0, 0))
        assert tracemalloc.get_traced_memory()[0] < 1e6, "5 MB if all are kept"
    finally:
        tracemalloc.stop()
    ranks.note(StepResult(step, 1, 1, False, None, "", [9000.0, 0.2, *[0.3] * 62], 1000, 0, 0))
    assert ranks.read(step, 0.1) == {"slowest_rank": 0, "slowest_ratio": 3.35}
    shown = RunFolder(tmp_path).rank_seconds()
    assert set(shown) == {"at", "step", "hosts", "seconds"}
    assert shown["seconds"][:3] == pytest.approx([1.004900, 0.2, 0.3], rel=1e-3)
    assert ranks.read(step, 0.1) == {}, "since the line before"


def test_it_is_told_in_one_line_with_both_times():
    assert str(Change(3, True, 0.21, 0.1)) == (
        "0.2100 s of its own in a step, 2.1 times the others' 0.1000 s"
    )
    assert str(Change(3, False, 0.1, 0.1)).startswith("no longer slow, 0.1000 s of its own")


def send(numbers: StepNumbers, step: int) -> None:
    zero, data = torch.zeros((), dtype=torch.float64), StepData(np.zeros(0), iter(()), 1, 7)
    numbers.send(step, data, zero, zero, Requested(False, False), lambda loss, norm: zero)


STEPS, SLEPT, WAITED = 60, 0.02, 0.01


def steps(rank: int, folder: Path) -> tuple[list[list[float]], list[Change]]:
    """Some steps of two ranks: rank 1 sleeps in its own time, rank 0 after it; evaluations too."""
    where = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    numbers, ranks = StepNumbers(torch.device("cpu")), SlowRanks(window_seconds=0.2)
    seconds, told = [], []

    def read() -> None:
        if result := numbers.read():
            seconds.append(result.rank_seconds)
            if result.rank_seconds:
                told.extend(ranks.note(result.rank_seconds, result.clock))

    for step in range(1, STEPS + 1):
        time.sleep(SLEPT * rank)
        numbers.before_waiting()
        time.sleep(WAITED * (1 - rank))
        read()
        send(numbers, step)
        if step % 20 == 0:
            read()
            time.sleep(0.2)  # it evaluates
    return seconds, told


def test_all_ranks_know_the_own_time_of_each_and_tell_the_slow_one(tmp_path):
    with tiny.forkserver().Pool(2) as pool:
        (seconds, told), found_by_other = pool.starmap(steps, [(0, tmp_path), (1, tmp_path)], 1)
    assert (seconds, told) == found_by_other
    assert [(change.rank, change.is_slow) for change in told] == [(1, True)]
    unknown = [step for step, pair in enumerate(seconds, start=1) if not pair]
    assert unknown == [1, 2, 22, 42], "the first one, and those after an evaluation; a step late"
    known = [pair for pair in seconds if pair]
    assert all(second >= SLEPT for _, second in known)
    assert sorted(first for first, _ in known)[len(known) // 2] < WAITED / 2, "waiting is not own"


def test_a_process_alone_measures_nothing(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        numbers = StepNumbers(torch.device("cpu"))
        numbers.before_waiting()
        send(numbers, 1)
        assert numbers.read().rank_seconds == []
    finally:
        dist.destroy_process_group()


def test_evidence_names_a_busy_process_and_how_much_of_the_time_this_one_ran(monkeypatch):
    monkeypatch.setattr(evidence, "SAMPLE_SECONDS", 0.5)
    monkeypatch.setattr(evidence, "BUSY", 0.02)  # the machine may be full of others
    monkeypatch.setattr(evidence, "MOST_NAMED", 100)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        found = evidence.find_evidence(0.25, gpu=None)
        busy.kill()
    assert f" (pid {busy.pid}) " in found.partition("; beside it: ")[2]
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    assert found.startswith(f"0.2500 s of a step wait for data; it may use {cores}, load ")
    ran = re.search(r"; its main thread ran (\d+)% of the time and waited \d+% for a core; ", found)
    assert int(ran[1]) < 50, "it slept"


def test_a_process_with_any_name_is_counted():
    code = r"open('/proc/self/comm', 'wb').write(b'\xff\xfe'); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        assert str(other.pid) in [pid for pid, name in evidence.cpu_seconds()]
        other.communicate(b"\n")


def test_a_quota_of_cpu_time_is_read_from_the_cgroup_and_those_above_it(tmp_path, monkeypatch):
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job/cpu.stat").write_text("usage_usec 9\nnr_throttled 4\nthrottled_usec 2500000\n")
    (group / "cpu.stat").write_text("nr_periods 0\nnr_throttled 0\nthrottled_time 0\n")
    monkeypatch.setattr(processes, "cgroup_files", lambda *names: [group / "cpu.stat"])
    assert evidence.own_seconds()[2] == 2.5


def test_a_gpu_that_is_held_back_is_told_with_the_reason(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    told = "1200 MHz, 1980 MHz, 88, 402.10 W, 700.00 W, 0x0000000000000024"
    old = 'case "$*" in *clocks_event_reasons*) exit 2 ;; esac'  # a name that it does not know
    smi.write_text(f"#!/bin/sh\n{old}\necho \"$*\" >{tmp_path}/asked\necho '{told}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert evidence.gpu_state("GPU-1234") == (
        "GPU at 1200 MHz of 1980 MHz, 88 C, 402.10 W of 700.00 W, held back by its power limit, "
        "its temperature"
    )
    assert "--id=GPU-1234" in (tmp_path / "asked").read_text()
    smi.write_text("#!/bin/sh\necho No devices were found\n")
    assert evidence.gpu_state("GPU-1234") == "nvidia-smi says: No devices were found"
    smi.write_text("#!/bin/sh\nexit 6\n")
    assert evidence.gpu_state("GPU-1234") == ""
