"""Checkpoints: whole or not there, verified before use, and loadable by transformers."""

import errno
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from trainstack.checkpoint.load import newest_whole, read_optimizer
from trainstack.checkpoint.names import BEST, LATEST, checkpoints, linked, newest_state
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import SaveError, Share, Snapshot, replicated_share
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.distributed import World
from trainstack.errors import ConfigError, Refused
from trainstack.storage import files, manifest

IDENTITY = {"run.seed": 1234}
ALONE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def snapshot(step: int, value: float = 1.0) -> Snapshot:
    weights = {"a": torch.full((3, 4), value), "b": torch.ones(2, dtype=torch.bfloat16)}
    optimizer = {"a/exp_avg": torch.full((3, 4), value), "a/exp_avg_sq": torch.zeros(3, 4)}
    state = TrainState.at_start(IDENTITY, settings={}, left_out=[], data_sets=1)
    state.step = step
    return Snapshot(step, Share(weights, optimizer), state.to_json(), {"config.json": b"{}"})


def save(folder, step, keep=2, check=lambda: None, value=1.0, best=0):
    """Save to the end; the checkpoint's folder. Raises what a run that needs it would raise."""
    folder.mkdir(exist_ok=True)
    saver = Saver(folder, ALONE, keep, "job.1", check)
    saver.start(replace(snapshot(step, value), best_step=best))
    saved = saver.wait()
    if saved.problem:
        raise SaveError(saved.problem)
    return saved.path


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool],
)
def test_the_safetensors_library_reads_what_we_write(tmp_path, dtype):
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "strided": torch.randn(4, 6).to(dtype).T,
    }
    entry = write_safetensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert entry == manifest.hash_file(tmp_path / "x.safetensors")


def test_files_are_readable_by_the_group_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        path = save(tmp_path / "c", 1)
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_file()}
    assert modes == {0o640}


def test_the_newest_checkpoints_are_kept_and_never_less_than_two(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path / "c", step, keep=1)
    assert [step for step, _ in checkpoints(tmp_path / "c")] == [4, 3]


def test_the_best_checkpoint_is_never_pruned_and_the_links_lead_to_it_and_to_the_newest(tmp_path):
    folder = tmp_path / "c"
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 9), (8, 9)]:
        save(folder, step, best=best)
        assert linked(folder, LATEST) == folder / f"checkpoint-{step}"
        if best < 9:  # the save of step 9 failed: the best one that exists stays
            assert linked(folder, BEST) == folder / f"checkpoint-{best}"
    assert [step for step, _ in checkpoints(folder)] == [8, 7, 4]
    assert linked(folder, BEST) == folder / "checkpoint-4"
    assert not (folder / BEST).readlink().is_absolute()


def test_no_link_leads_to_a_damaged_checkpoint_that_is_set_aside(tmp_path):
    folder = tmp_path / "c"
    save(folder, 1)
    damaged = save(folder, 2, best=2)
    (damaged / "config.json").write_bytes(b"[]")
    assert newest_whole(folder) == linked(folder, LATEST) == folder / "checkpoint-1"
    assert not (folder / BEST).is_symlink()


def test_a_file_system_without_links_only_lacks_the_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)
    for step in (1, 2, 3, 4):
        save(tmp_path / "c", step, best=1)
    assert [step for step, _ in checkpoints(tmp_path / "c")] == [4, 3, 1]


def test_no_temporary_folder_of_a_killed_attempt_stays(tmp_path):
    leftover = tmp_path / "c" / ".checkpoint-1.old.1.tmp" / "training"
    leftover.mkdir(parents=True)
    save(tmp_path / "c", 2)
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"checkpoint-2", "latest"}


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path):
    path = save(tmp_path / "c", 1)
    generator = random.Random(1)
    everything = [p for p in path.rglob("*") if p.is_file()]
    assert len(everything) == 5  # weights, optimizer, state, config, manifest
    for trial in range(200):
        victim = everything[trial % len(everything)]
        whole = victim.read_bytes()
        bit = generator.randrange(len(whole) * 8)
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(broken)
        found = list(manifest.damage(path))
        assert len(found) == 1, f"bit {bit} of {victim.name}: {found}"
        assert found[0].startswith(str(victim.relative_to(path)))
        victim.write_bytes(whole)
    assert not list(manifest.damage(path))


def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(tmp_path, caplog):
    first, second = save(tmp_path / "c", 1), save(tmp_path / "c", 2)
    (second / "model.safetensors").write_bytes(b"")
    with caplog.at_level("WARNING", "trainstack"):
        assert newest_whole(tmp_path / "c") == first
    assert "checkpoint-2 is damaged (model.safetensors: 0 bytes instead of" in caplog.text
    assert "using checkpoint-1 instead" in caplog.text
    assert (tmp_path / "c" / "damaged-checkpoint-2").is_dir()
    assert not second.exists()


def test_a_copy_under_another_step_is_no_checkpoint_of_that_step(tmp_path, caplog):
    newest = save(tmp_path / "c", 2)
    shutil.copytree(newest, tmp_path / "c" / "checkpoint-500")
    assert newest_state(tmp_path / "c")[0] == 2
    with caplog.at_level("WARNING", "trainstack"):
        assert newest_whole(tmp_path / "c") == newest
    assert "checkpoint-500 is a copy of another step; it is passed over" in caplog.text
    assert (tmp_path / "c" / "checkpoint-500").exists()


@pytest.mark.parametrize("missing", ["manifest.json", "training/state.json", "model.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_not_used(tmp_path, missing):
    first, second = save(tmp_path / "c", 1), save(tmp_path / "c", 2)
    (second / missing).unlink()
    assert newest_whole(tmp_path / "c") == first


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["manifest.json", "training/state.json", "model.safetensors"])
def test_a_file_that_was_cut_short_or_emptied_is_named(tmp_path, name, size, caplog):
    first, second = save(tmp_path / "c", 1), save(tmp_path / "c", 2)
    whole = (second / name).read_bytes()
    (second / name).write_bytes(whole[:size])
    with caplog.at_level("WARNING", "trainstack"):
        assert newest_whole(tmp_path / "c") == first
    assert f"checkpoint-2 is damaged ({name}: " in caplog.text


def test_a_flipped_bit_in_its_state_makes_no_run_another_experiment(tmp_path):
    """Valid JSON with another seed, say: it must be named as damaged, not refused."""
    for step in (1, 2):
        save(tmp_path / "c", step)
    step, state = newest_state(tmp_path / "c")
    assert (step, state.identity) == (2, IDENTITY)
    path = tmp_path / "c" / "checkpoint-2" / STATE
    path.write_text(path.read_text().replace("1234", "1235"))
    step, state = newest_state(tmp_path / "c")
    assert (step, state.identity) == (1, IDENTITY)
    assert newest_state(tmp_path / "nothing") == (0, None)


def test_verifying_a_large_file_tells_that_it_moves(tmp_path):
    """By that the watchdog knows an hour of hashing from a hang."""
    folder, moved = tmp_path / "c" / "checkpoint-1", []
    folder.mkdir(parents=True)
    entry = files.write_file(folder / "model.safetensors", bytes(3 * files.READ_BYTES + 1))
    manifest.write_manifest(folder, {"model.safetensors": entry})
    assert newest_whole(tmp_path / "c", lambda: moved.append(1)) == folder
    assert len(moved) == 4


def test_it_never_starts_over_when_no_checkpoint_verifies(tmp_path):
    for step in (1, 2):
        (save(tmp_path / "c", step) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint verifies: checkpoint-2 .* checkpoint-1"):
        newest_whole(tmp_path / "c")
    assert newest_whole(tmp_path / "nothing") is None


def test_other_names_and_links_are_no_checkpoints(tmp_path):
    real = save(tmp_path / "c", 3)
    (tmp_path / "c" / "checkpoint-abc").mkdir()
    (tmp_path / "c" / "checkpoint-9").symlink_to(real)
    (tmp_path / "c" / "checkpoint-8").write_text("a file")
    assert newest_whole(tmp_path / "c") == real


def fail(number: int, *when: int):
    """A watcher that raises an OSError at those changes to the disk, counted from 1."""
    count = itertools.count(1)

    def watcher(operation, path, _detail):
        if next(count) in when:
            raise OSError(number, os.strerror(number), str(path))

    return watcher


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_anywhere_in_a_save_costs_that_save_and_nothing_else(tmp_path, number):
    first, names = save(tmp_path / "c", 1), []
    with files.watched_by(lambda name, *_: names.append(name)):
        save(tmp_path / "c", 2)
    manifest.remove_folder(tmp_path / "c" / "checkpoint-2")
    for change in range(1, names.index("rename") + 2):
        last = change + 200 if number == errno.EIO else change  # EIO is tried again: it has to last
        watcher = fail(number, *range(change, last + 1))
        with files.watched_by(watcher), pytest.raises(SaveError) as caught:
            save(tmp_path / "c", 2)
        assert os.strerror(number) in str(caught.value)
        assert "GB free)" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert not list(manifest.damage(first))
        # What could not be cleaned up either goes with the next save.
        shown = {p.name for p in (tmp_path / "c").iterdir() if p.name[0] != "."}
        assert shown == {"checkpoint-1", "latest"}
    save(tmp_path / "c", 2)
    left = {p.name for p in (tmp_path / "c").iterdir()}
    assert left == {"checkpoint-1", "checkpoint-2", "latest"}


def test_a_moment_of_eio_is_survived_by_writing_the_file_again(tmp_path):
    names = []
    with files.watched_by(lambda name, *_: names.append(name)):
        save(tmp_path / "c", 1)
    sync = names.index("sync") + 1
    with files.watched_by(fail(errno.EIO, sync)):
        path = save(tmp_path / "c", 2)
    assert not list(manifest.damage(path))


def test_a_really_full_disk_is_named_and_the_next_save_succeeds_once_there_is_space(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder])
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        (folder / "filler").write_bytes(b"x" * 900_000)
        big = snapshot(1)
        big.share.weights = {"a": torch.zeros(100_000)}
        saver = Saver(folder / "c", ALONE, 2, "job.1", lambda: None)
        (folder / "c").mkdir()
        saver.start(big)
        problem = saver.wait().problem
        assert "No space left on device (0.00 GB free)" in problem
        assert "needed by rank 0" in problem
        assert "model.safetensors" in problem
        assert not list((folder / "c").iterdir())
        (folder / "filler").unlink()
        saver.start(big)
        assert saver.wait().problem is None
    finally:
        subprocess.run(["umount", folder], check=True)


def test_training_may_change_the_weights_as_soon_as_they_are_copied(tmp_path):
    (tmp_path / "c").mkdir()
    saver = Saver(tmp_path / "c", ALONE, 2, "job.1", lambda: None)
    for step in (1, 2):  # the second reuses the memory of the first
        snap = snapshot(step, float(step))
        saver.start(snap)
        saver.before_update()
        snap.share.weights["a"].fill_(99.0)
        snap.share.optimizer["a/exp_avg"].fill_(99.0)
        path = saver.wait().path
        assert torch.equal(
            load_file(path / "model.safetensors")["a"], torch.full((3, 4), float(step))
        )
        assert torch.equal(read_optimizer(path)["a/exp_avg"], torch.full((3, 4), float(step)))


def test_memory_that_the_host_does_not_have_costs_the_save_alone(tmp_path):
    (tmp_path / "c").mkdir()
    saver = Saver(tmp_path / "c", ALONE, 2, "job.1", lambda: None)
    huge = snapshot(1)
    huge.share.optimizer["a/exp_avg"] = torch.zeros(1).expand(1 << 50)
    saver.start(huge)
    assert saver.before_update() < 60, "training goes on"
    assert "can't allocate memory" in saver.wait().problem
    assert not checkpoints(tmp_path / "c")
    saver.start(snapshot(2))
    assert saver.wait().problem is None


def test_who_lost_the_run_folder_does_not_publish(tmp_path):
    def lost():
        raise Refused("job 7 took over")

    with pytest.raises(Refused, match="job 7"):
        save(tmp_path / "c", 1, check=lost)
    assert not checkpoints(tmp_path / "c")


def test_who_loses_the_run_folder_during_a_save_takes_nothing_from_the_new_owner(tmp_path):
    theirs = save(tmp_path / "c", 1, value=2.0)
    answers = iter([None])

    def lost_meanwhile():
        if next(answers, "lost") == "lost":
            raise Refused("job 7 took over")

    with pytest.raises(Refused, match="job 7"):
        save(tmp_path / "c", 1, check=lost_meanwhile)
    assert not list(manifest.damage(theirs))
    assert torch.equal(load_file(theirs / "model.safetensors")["a"], torch.full((3, 4), 2.0))


def test_optimizer_shards_are_spread_over_ranks_and_are_whole_together():
    weights = {"w": torch.zeros(100)}
    optimizer = {f"p{i}/{s}": torch.full((10 + i,), i) for i in range(9) for s in "mv"}
    for world_size in (1, 2, 3, 8):
        shares = [
            replicated_share(weights, 400, optimizer, r, world_size) for r in range(world_size)
        ]
        names = [name for share in shares for name in share.optimizer]
        assert sorted(names) == sorted(optimizer)
        assert [bool(share.weights) for share in shares] == [r == 0 for r in range(world_size)]
    shares = [replicated_share(weights, 400, optimizer, rank, 2) for rank in (0, 1)]
    sizes = [sum(t.nbytes for t in share.optimizer.values()) for share in shares]
    assert sizes[0] < sizes[1], "rank 0 writes the weights as well"


def test_readers_see_the_old_or_the_new_status_and_never_a_part(tmp_path):
    path = tmp_path / "status.json"
    contents = [json.dumps({"n": n, "fill": "x" * 5000}).encode() for n in range(2)]
    files.replace_file(path, contents[0])
    done = threading.Event()

    def write():
        for i in range(200):
            files.replace_file(path, contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert path.read_bytes() in contents
    writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_only_one_of_many_creates_a_file(tmp_path):
    won = [files.create_file(tmp_path / "1.json", f"{i}".encode()) for i in range(5)]
    assert won == [True, False, False, False, False]
    assert (tmp_path / "1.json").read_bytes() == b"0"
