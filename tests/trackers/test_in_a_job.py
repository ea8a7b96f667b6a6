"""What a tracker that breaks does to a job: one line, and nothing else."""

import os
import signal
import subprocess
import time

import pytest
from fake_site import Job, Site, end_group

from trainstack.run.states import EXIT_CODES


@pytest.fixture
def job(tmp_path, home):
    job = Job(tmp_path, home)
    (job.run_dir / "config.yaml").write_text(
        "log:\n  report_to: [wandb]\nmodel:\n  name: tiny\ndata:\n  name: tiny\n"
    )
    job.run.add_event("submitted")
    yield job
    if hasattr(job, "process"):
        end_group(job.process)


def tracker_of(job: Job) -> int:
    """The process that shows the run, once it has opened its file."""
    deadline = time.monotonic() + 40
    while not list(job.run_dir.glob("wandb/offline-run-*/*.wandb")):
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-P", str(job.process.pid), "-f", "trackers.feed"], capture_output=True, text=True
    )
    return int(found.stdout)


def ranks_wait(job: Job, state: str = "DONE") -> None:
    job.ranks(f"while [[ ! -e {job.release} ]]; do sleep 0.1; done\n{job.status(state)}")


def lines_about_it(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "wandb" in line]


@pytest.mark.parametrize("state", ["DONE", "DIVERGED"])
def test_a_tracker_that_works_says_nothing_and_is_whole(job, install, state):
    install(job.run_dir.parents[1], "wandb")
    ranks_wait(job, state)
    job.start()
    tracker_of(job)
    job.release.touch()
    _, errors = job.process.communicate(timeout=60)
    assert (job.process.returncode, lines_about_it(errors)) == (EXIT_CODES[state], [])
    assert "wandb: shown up to step" in (job.run_dir / "logs/77.wandb.log").read_text()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_tracker_that_dies_or_hangs_is_one_line(job, install, sent):
    install(job.run_dir.parents[1], "wandb")
    ranks_wait(job)
    job.start()
    os.kill(tracker_of(job), sent)
    begun = time.monotonic()
    job.release.touch()
    _, errors = job.process.communicate(timeout=60)
    assert job.process.returncode == 0, errors
    assert lines_about_it(errors) == [
        "train.slurm: wandb did not get all of the run (code 137, see logs/77.wandb.log); the run "
        "is not touched; to send it: bash monitor.sh first --sync"
    ]
    assert job.run.status()["state"] == "DONE"
    assert time.monotonic() - begun < 30


def test_a_tracker_that_is_not_installed_is_one_line(job):
    job.ranks(f"sleep 3\n{job.status('DONE')}")
    code, errors = job.wait()
    assert code == 0, errors
    (line,) = lines_about_it(errors)
    assert "code 2, see logs/77.wandb.log" in line
    assert "TRACKERS=wandb bash setup.sh" in (job.run_dir / "logs/77.wandb.log").read_text()


def test_a_job_without_trackers_starts_no_process_for_them(job):
    (job.run_dir / "config.yaml").write_text("log:\n  report_to: [tensorboard]\n")
    code, errors = job.wait()
    assert code == 0, errors
    assert not list((job.run_dir / "logs").glob("77.wandb*"))


def test_monitor_sends_a_run_and_says_where_it_is(job, install):
    told = Site.run(job, "monitor.sh", "first", "--sync", WANDB_MODE="offline")
    assert told.returncode == 2 and "TRACKERS=wandb bash setup.sh" in told.stderr
    install(job.run_dir.parents[1], "wandb")
    told = Site.run(job, "monitor.sh", "first", "--sync", WANDB_MODE="offline")
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.startswith(f"wandb: shown up to step 0, in {job.run_dir}/wandb/offline-run-")
