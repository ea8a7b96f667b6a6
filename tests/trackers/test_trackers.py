"""Runs in the real Weights & Biases, offline, and in the real trackio; read back by their own."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import WandbServer

import tiny
from trainstack.checkpoint.names import newest_checkpoint
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.run.folder import RunFolder, numbers_in
from trainstack.storage import files, layout, manifest
from trainstack.trackers import feed
from trainstack.trackers.command import start_of

MAX_STEPS = 20
KILL = 8  # a step that a rank does not survive; checkpoints are made of each fifth
every_tracker = pytest.mark.parametrize("tracker", layout.TRACKERS)


def track(run: RunFolder, tracker: str, **options) -> subprocess.CompletedProcess:
    """Show the run in its own folder, as at the end of a job."""
    command, environment = start_of(tracker, run.path, "--offline")
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, **options
    )


def shown(run: RunFolder, tracker: str, packages: Path) -> dict:
    """What the tracker holds of a run, by its own reader, in a Python that has its packages."""
    home = run.path.parents[1]
    files = sorted(map(str, run.path.glob("wandb/offline-run-*/*.wandb")))
    place = files if tracker == "wandb" else [home.name, run.path.name]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("read_back.py"), tracker, *place],
        env={**os.environ, "TRACKIO_DIR": str(run.path / "trackio"),
             "PYTHONPATH": f"{packages}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def attempts(home, tmp_path_factory) -> list[RunFolder]:
    """A run as it is after each of two attempts, of which the first was killed."""
    folder = tmp_path_factory.mktemp("attempts") / "home"
    shutil.copytree(home, folder, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    copies = []
    for number, kill in enumerate((KILL, 0)):
        fault = [f"--fault=kill:rank=0,step={kill}"] if kill else []
        settings = ("run.name=killed", "log.report_to=[tensorboard]")
        tiny.train(folder, 1, *settings, *fault, check=not kill)
        copy = folder.parent / str(number) / "project"
        shutil.copytree(folder, copy, symlinks=True)
        copies.append(RunFolder(copy / "runs" / "killed"))
    return copies


def test_only_steps_that_stay_are_shown(attempts):
    lost = 0
    for run in attempts:
        kept, _ = newest_checkpoint(run.checkpoints)
        assert [step for step, _ in feed.final_steps(run, 0)] == [*range(1, kept + 1)]
        lost += max(line["step"] for line in run.measurements()) - kept
    assert lost
    assert [step for step, _ in feed.final_steps(attempts[-1], 17)] == [18, 19, 20]


def test_the_last_evaluation_is_shown_though_a_stop_put_it_off(tmp_path):
    """The attempt that makes it saves nothing after it."""
    run = RunFolder(tmp_path)
    state = TrainState.at_start({}, {}, left_out=[], data_sets=1)
    state.step, state.is_evaluated = MAX_STEPS, False
    folder = run.checkpoints / f"checkpoint-{MAX_STEPS}"
    (folder / STATE).parent.mkdir(parents=True)
    manifest.write_manifest(folder, {STATE: files.write_file(folder / STATE, state.to_json())})
    for line in (
        {"step": 19, "loss": 2.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval_loss": 3.0},
    ):
        files.append_line(tmp_path / "metrics.jsonl", line)
    run.set_status("PAUSED", step=MAX_STEPS)
    assert [step for step, _ in feed.final_steps(run, 0)] == [19]
    run.set_status("DONE", step=MAX_STEPS)
    last = {"train/loss": 1.0, "eval/loss": 3.0}
    assert [*feed.final_steps(run, 0)] == [(19, {"train/loss": 2.0}), (20, last)]


@every_tracker
def test_a_run_that_was_killed_holds_each_step_once(attempts, tracker, packages, install, tmp_path):
    home = tmp_path / "project"
    run = RunFolder(home / "runs" / "killed")
    install(home, tracker)
    for attempt in (*attempts, attempts[-1]):  # the last time it finds nothing new
        shutil.copytree(attempt.path, run.path, dirs_exist_ok=True)
        done = track(run, tracker)
        assert done.returncode == 0, done.stdout + done.stderr
    found = shown(run, tracker, packages(tracker))
    assert [step for step, _ in found["lines"]] == [*range(1, MAX_STEPS + 1)]
    lines = dict(found["lines"])
    logged = tiny.metrics(home, "killed")
    assert {step: values["train/loss"] for step, values in lines.items()} == logged
    evaluated = {step: v["eval/loss"] for step, v in lines.items() if "eval/loss" in v}
    assert evaluated == tiny.metrics(home, "killed", "eval_loss")
    assert found["config"]["optim"]["learning_rate"] == 0.01
    assert found["state"]["state"] == "DONE"


@pytest.mark.matrix  # half a minute; test_in_a_job.py has the parts
def test_a_job_whose_rank_is_killed_twice_shows_each_step_once(home, packages, install, tmp_path):
    """The whole of it: submit.sh, three attempts, and both trackers beside them."""
    project = tmp_path / "trainstack"
    both = [*layout.TRACKERS]
    tiny.make_checkout(tmp_path / "checkout", tmp_path, log__report_to=both)
    for name in ("models", "datasets", "tokens"):
        (project / name).symlink_to(home / name)
    for tracker in both:
        install(project, tracker)
    fault = "kill:rank=0,step=8;kill:rank=0,step=14,attempt=2"
    variables = {"SHARED_DIR": str(tmp_path), "NPROC_PER_NODE": "1", "TRAINSTACK_FAULT": fault}
    done = subprocess.run(
        ["bash", tmp_path / "checkout/submit.sh", "--local", "run.name=job"],
        env={**tiny.environment(), **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "did not get all" in line]
    run = RunFolder(project / "runs" / "job")
    assert [event["event"] for event in run.events()].count("start") == 3
    for tracker in both:
        found = shown(run, tracker, packages(tracker))
        assert [step for step, _ in found["lines"]] == [*range(1, MAX_STEPS + 1)], tracker
        assert found["state"]["state"] == "DONE" and found["config"]["environment"]["packages"]


def test_a_server_gets_each_step_once_and_only_what_is_new(attempts, install, tmp_path):
    home, server, counts = tmp_path / "project", WandbServer(), []
    run = RunFolder(home / "runs" / "killed")
    install(home, "wandb")
    online = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", "trainstack", "track", run.path, "--to", "wandb"]
    for attempt in (*attempts, attempts[-1]):
        shutil.copytree(attempt.path, run.path, dirs_exist_ok=True)
        done = subprocess.run(command, env=online, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        counts.append(len(server.lines))
        assert counts[-1] == newest_checkpoint(run.checkpoints)[0]
    logged = {line["_step"]: line["train/loss"] for line in map(json.loads, server.lines)}
    assert logged == tiny.metrics(home, "killed")
    assert json.loads(server.summary)["state"] == "DONE"
    assert server.names == {feed.run_id(run)}
    assert not (run.path / "wandb").exists()
    server.shutdown()


@every_tracker
def test_a_full_disk_is_one_line(attempts, tracker, install, tmp_path):
    home = tmp_path / "project"
    shutil.copytree(attempts[-1].path, home / "runs" / "killed")
    install(home, tracker)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    done = track(RunFolder(home / "runs" / "killed"), tracker, preexec_fn=limit)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith(f"{tracker}: error: ")


def test_tensorboard_shows_each_step_once_with_settings_and_sample(attempts):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = attempts[-1]
    shown = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0}).Reload()
    for name, key in {"train/loss": "loss", "train/data_seconds": "data_seconds"}.items():
        logged = tiny.metrics(run.path.parents[1], "killed", key)
        points = [(point.step, point.value) for point in shown.Scalars(name)]
        assert [step for step, _ in points] == [*logged]
        assert dict(points) == pytest.approx(logged, rel=1e-6)
    assert [point.step for point in shown.Scalars("eval/loss")] == [10, 20]
    assert {"train/peak_memory_gb", "eval/perplexity"} <= {*shown.Tags()["scalars"]}
    assert shown.Tensors("sample/1/text_summary")[-1].step == MAX_STEPS
    plugin = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.learning_rate" in plugin


def test_a_line_becomes_numbers_by_the_names_of_curves():
    line = {"step": 3, "eval_loss": 2.5, "source_eval_loss": {"a/b": 2.0}, "samples_hash": "0f"}
    assert dict(numbers_in(line)) == {"eval/loss": 2.5, "eval/loss/a/b": 2.0}
    assert dict(numbers_in({"step": 3, "loss": 1.0})) == {"train/loss": 1.0}
