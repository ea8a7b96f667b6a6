"""What all ranks do together, by real processes over gloo."""

import datetime
import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tiny
from trainstack import distributed
from trainstack.distributed import World
from trainstack.errors import ConfigError, Refused

LIMIT = 2.5  # seconds that a collective may take here


def together(action, folder: Path) -> list:
    """What ``action(world, folder)`` gives on each of two ranks: its result, or its error."""
    with tiny.forkserver().Pool(2) as pool:
        tasks = [pool.apply_async(one_rank, (rank, action, folder)) for rank in range(2)]
        return [task.get(timeout=60) for task in tasks]


def one_rank(rank: int, action, folder: Path):
    limit = datetime.timedelta(seconds=LIMIT)
    where = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=limit)
    try:
        return action(World(rank, rank, 2, 2, torch.device("cpu")), folder)
    except Exception as error:
        return error


def slowly(world: World, folder: Path):
    waited = []

    def act() -> list[int]:
        assert world.is_main
        time.sleep(1.5 * LIMIT)
        return [4, 7]

    result = distributed.main_decides(world, act, waiting=lambda: waited.append(1))
    return result, len(waited)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU that is here")
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.54'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ConfigError, match=r"has a GPU \(NVIDIA H100, 550.54\), but torch 2.*cannot"
    ):
        distributed.read_world()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    with pytest.raises(ConfigError, match="cannot use it with CUDA_VISIBLE_DEVICES=9: choose"):
        distributed.read_world()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.read_world().device.type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert distributed.read_world().device.type == "cpu"


def recorded(world: World, folder: Path):
    for _ in range(2 + world.rank):  # the last of rank 1 has begun, and nobody answers
        dist.all_reduce(torch.zeros(1), async_op=True)
    record, count = distributed.flight_record()
    return json.loads(record)["entries"][0]["profiling_name"], count


def test_a_rank_knows_how_many_collectives_it_has_begun(tmp_path):
    """By torch's flight recorder; of ranks that hang, the one with the fewest is to blame."""
    first, second = together(recorded, tmp_path)
    assert first[0] == "gloo:all_reduce" and second[1] == first[1] + 1


def test_a_matrix_of_fp32_is_multiplied_as_the_precision_says(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for precision in ("tf32", "fp32", "bf16"):
        distributed.set_numerics(precision, False)
    assert said == ["high", "highest", "highest"] and not torch.backends.cudnn.allow_tf32


def test_rank_0_may_take_longer_than_a_collective_while_the_others_wait(tmp_path):
    (first, not_waited), (second, waited) = together(slowly, tmp_path)
    assert first == second == [4, 7]
    assert not_waited == 0  # rank 0 itself does not say that the wait is in order
    assert waited >= 2


def refuses(world: World, folder: Path):
    def act():
        raise Refused("that run is another's; choose another run.name")

    distributed.main_decides(world, act)


def test_what_rank_0_refuses_all_ranks_refuse(tmp_path):
    for error in together(refuses, tmp_path):
        assert isinstance(error, Refused)
        assert error.problems == ["that run is another's; choose another run.name"]


def breaks(world: World, folder: Path):
    def act():
        raise KeyError("no such")

    distributed.main_decides(world, act)


def test_an_error_of_rank_0_is_its_own_and_the_others_lose_their_peer(tmp_path):
    first, second = together(breaks, tmp_path)
    assert isinstance(first, KeyError)
    assert distributed.is_peer_lost(second)
