"""clean: what it lists, what it refuses, and that no run that can go on loses anything to it."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from trainstack.checkpoint.names import BEST
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.config.load import load
from trainstack.data.store import find_stores
from trainstack.errors import ConfigError, Failed
from trainstack.hub.asset import Asset
from trainstack.hub.fetch import inspect, provide
from trainstack.job.inputs import check_inputs
from trainstack.monitor.clean import items_of, jobs_of_slurm, main
from trainstack.processes import process_start
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.run.lease import user
from trainstack.storage.files import write_file
from trainstack.storage.manifest import write_manifest
from trainstack.units import bytes_text


def make_run(home: Path, name: str, state: str, steps: list[int]) -> RunFolder:
    """A run with checkpoints of these steps, as far as clean and submit.sh look at it."""
    config = load(home / "config.yaml", [f"run.name={name}"])
    run = RunFolder(home / "runs" / name)
    run.create()
    (run.path / "config.yaml").write_text(config.to_yaml())
    run.set_status(state, step=max(steps, default=0))
    (store,) = find_stores(home, config, ())
    for step in steps:
        folder = run.checkpoints / f"checkpoint-{step}"
        (folder / STATE).parent.mkdir(parents=True)
        saved = identity(config, store.name)
        made = TrainState.at_start(saved, config.model_dump(), left_out=[], data_sets=1)
        made.step = step
        (folder / "model.safetensors").write_bytes(bytes(50_000))
        write_manifest(folder, {STATE: write_file(folder / STATE, made.to_json())})
    return run


def names(home: Path) -> set[str]:
    return {item.name for item in items_of(home)}


def can_go_on(home: Path, run: str) -> bool:
    """Whether submit.sh would find all that the run needs."""
    folder = RunFolder(home / "runs" / run)
    try:
        check_inputs(home, load(folder.path / "config.yaml", []), "", folder.checkpoints)
    except (ConfigError, OSError, ValueError):
        return False
    return True


def clean(home: Path, *arguments: str) -> int:
    return main(["--home", str(home), *arguments])


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_removed_every_run_that_is_left_can_go_on(own_home, seed):
    rng = random.Random(seed)
    for number in range(rng.randint(0, 3)):
        state = rng.choice(["PAUSED", "DONE", "FAILED", "RUNNING"])
        make_run(own_home, f"r{number}", state, rng.sample([5, 10, 15], rng.randint(0, 3)))
    if rng.random() < 0.7:
        tiny.make_model(own_home, "spare")
        tiny.make_dataset(own_home, "spare", documents=20)
    for _ in range(12):
        listed = sorted(names(own_home))
        chosen = rng.sample(listed, min(len(listed), rng.choice([1, 1, 1, 2, 3])))
        before = {
            run.name for run in (own_home / "runs").glob("*") if can_go_on(own_home, run.name)
        }
        try:
            clean(own_home, *chosen)
        except Failed:
            assert names(own_home) == {*listed}  # nothing was removed
        left = {run for run in before if (own_home / "runs" / run).exists()}
        assert {run for run in left if not can_go_on(own_home, run)} == set()


def test_what_the_list_says_may_go_is_removed_with_nothing_lost(own_home, capsys):
    make_run(own_home, "done", "DONE", [5, 10, 15])
    make_run(own_home, "paused", "PAUSED", [5])
    tiny.make_model(own_home, "spare")
    before = sum(item.size for item in items_of(own_home) if "/checkpoints/" not in item.name)
    assert clean(own_home) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    spare = [line for line in lines if "may go" in line]
    assert clean(own_home, *(line[12:].split()[0] for line in spare)) == 0
    after = sum(item.size for item in items_of(own_home) if "/checkpoints/" not in item.name)
    freed = bytes_text(before - after)
    assert total.split() == f"{bytes_text(before)} in all, of which {freed} may go".split()
    assert can_go_on(own_home, "done") and can_go_on(own_home, "paused")
    assert (own_home / "runs/done/checkpoints/checkpoint-15").exists()


def test_the_checkpoint_that_best_leads_to_is_not_among_what_may_go(own_home):
    run = make_run(own_home, "paused", "PAUSED", [5, 10, 15, 20])
    (run.checkpoints / BEST).symlink_to("checkpoint-5")
    listed = {name for name in names(own_home) if "checkpoint-" in name}
    assert listed == {"runs/paused/checkpoints/checkpoint-10"}


def test_what_a_run_needs_is_refused_with_the_run_and_a_way_out(own_home):
    make_run(own_home, "begun", "PAUSED", [5])
    make_run(own_home, "fresh", "PAUSED", [])
    (store,) = find_stores(own_home, load(own_home / "config.yaml", []), ())
    with pytest.raises(Failed, match="run begun, fresh needs it to go on; nothing was removed"):
        clean(own_home, f"tokens/{store.name}")
    with pytest.raises(Failed, match="models/tiny: run fresh needs it"):
        clean(own_home, "models/tiny")
    assert clean(own_home, "runs/fresh", "models/tiny", "datasets/tiny") == 0
    assert can_go_on(own_home, "begun")


@pytest.mark.parametrize("how", ["queued", "local", "hidden"])
def test_a_run_that_a_job_works_on_is_not_removed(own_home, how):
    run = make_run(own_home, "live", "QUEUED" if how == "queued" else "RUNNING", [5])
    host = os.uname().nodename if how == "local" else "gpu-07"
    job = f"local-{host}-1-2" if how == "local" else "77"
    holder = {"job": job, "attempt": 1, "host": host, "pid": os.getpid(),
              "process_started": process_start(os.getpid())}  # fmt: skip
    if how != "queued":
        (run.path / "lease" / "1.json").write_text(json.dumps(holder))
        run.beat(job)
    with pytest.raises(Failed, match="runs/live: a job works on it or waits to; end it first"):
        clean(own_home, "runs/live")


def test_a_job_that_was_cancelled_in_the_queue_holds_no_run(own_home, tmp_path, monkeypatch):
    run = make_run(own_home, "live", "QUEUED", [5])
    run.add_event("submitted", job="77", user=user())
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'job|77|PENDING|0:00|None|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    holder = {"job": "50", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (run.path / "lease" / "1.json").write_text(json.dumps(holder))  # of a job that was killed
    run.add_event("submitted", job="78", user=user())  # the next of a chain, forgotten by Slurm
    jobs_of_slurm.cache_clear()
    with pytest.raises(Failed, match="runs/live: a job works on it or waits to"):
        clean(own_home, "runs/live")
    squeue.write_text("#!/bin/sh\necho 'job|77|CANCELLED|0:00|None|'\n")
    jobs_of_slurm.cache_clear()
    assert clean(own_home, "runs/live") == 0
    jobs_of_slurm.cache_clear()


def test_a_run_that_has_ended_may_go_though_its_heartbeat_is_seconds_old(own_home):
    run = make_run(own_home, "done", "DONE", [5])
    run.set_status("DONE", job="77")
    run.beat("77")
    assert clean(own_home, "runs/done") == 0


def test_a_run_whose_settings_cannot_be_read_keeps_everything(own_home):
    run = make_run(own_home, "odd", "PAUSED", [])
    (run.path / "config.yaml").write_text("run: {name: odd, nonsense: 1}\n")
    with pytest.raises(Failed, match="run odd needs it"):
        clean(own_home, "models/tiny")


def test_a_name_that_is_not_listed_is_refused(own_home):
    with pytest.raises(ConfigError, match="models/../x: not in the list"):
        clean(own_home, "models/../x")


def test_the_list_names_size_and_users(own_home):
    make_run(own_home, "a", "PAUSED", [])
    (own_home / "cache" / "pip").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainstack", "clean", "--home", own_home]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tiny.ROOT).stdout
    assert "models/tiny" in told and "needed by run a" in told
    assert "cache/pip" in told and "in all" in told


def test_a_checkpoint_that_another_run_starts_from_is_kept_by_a_second_name(own_home, tmp_path):
    """The run that it is of may prune it, or be removed."""
    checkpoint = own_home / "runs/a/checkpoints/checkpoint-5"
    shutil.copytree(own_home / "models/tiny", checkpoint)
    (checkpoint / "manifest.json").unlink()
    asset = Asset("model", str(checkpoint), "main", own_home)
    provide(asset, False, 0)
    shutil.rmtree(own_home / "runs")
    assert inspect(asset)[1] == ""
    assert (asset.folder / "config.json").read_bytes()
