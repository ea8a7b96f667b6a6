"""What a tracker that breaks does to a job: one line, and nothing else."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_site import Job, Site, end_group

from trainstack.processes import process_start
from trainstack.run.lease import Lease, Owner
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
    until(job, lambda: list(job.run_dir.glob("wandb/offline-run-*/*.wandb")))
    return child(job.process.pid, "trackers.feed")


def until(job: Job, condition) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def child(pid: int, command: str) -> int | None:
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", command], capture_output=True, text=True)
    return int(found.stdout or 0) or None


def ranks_wait(job: Job, state: str = "DONE") -> None:
    job.ranks(f"while [[ ! -e {job.release} ]]; do sleep 0.2; done\n{job.status(state)}")


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


@pytest.mark.parametrize(
    ("sent", "state", "tenths"), [(signal.SIGKILL, "DONE", 0), (signal.SIGSTOP, "PAUSED", 10)]
)
def test_a_tracker_that_dies_or_hangs_is_one_line(job, install, sent, state, tenths):
    """Before a requeue it has a second; nothing that it started stays."""
    install(job.run_dir.parents[1], "wandb")
    job.commands.add("sleep", f'exec {shutil.which("sleep")} "$@"')
    ranks_wait(job, state)
    job.start()
    tracker = tracker_of(job)
    core = child(tracker, "wandb-core")
    assert core
    os.kill(tracker, sent)
    job.release.touch()
    _, errors = job.process.communicate(timeout=60)
    assert job.process.returncode == EXIT_CODES[state], errors
    assert sent == signal.SIGKILL or process_start(core) is None  # else it sees that itself
    assert job.commands.calls("sleep").count(["0.1"]) == tenths
    assert lines_about_it(errors) == [
        "train.slurm: wandb did not get all of the run (code 137, see logs/77.wandb.log); the run "
        "is not touched; to send it: bash monitor.sh first --sync"
    ]
    assert job.run.status()["state"] == state


def test_a_job_that_is_refused_leaves_alone_what_the_owner_shows(job, install):
    install(job.run_dir.parents[1], "wandb")
    Lease(job.run_dir).take(Owner("76", 1))
    job.run.set_status("RUNNING", job="76", step=3)
    of_owner = job.run_dir / "wandb" / "offline-run-1" / "run-1.wandb"
    of_owner.parent.mkdir(parents=True)
    of_owner.touch()
    job.ranks(f"while [[ ! -e {job.release} ]]; do sleep 0.2; done\nexit 78")
    job.run.add_failure("77", 1, 0, "REFUSED", 78, "job 76 works there", False)
    job.start()

    def catches_sigterm() -> bool:
        pid = child(job.process.pid, "trackers.feed")
        status = Path(f"/proc/{pid}/status").read_text() if pid else "SigCgt: 0"
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> signal.SIGTERM - 1 & 1)

    until(job, catches_sigterm)
    job.release.touch()
    _, errors = job.process.communicate(timeout=60)
    assert (job.process.returncode, lines_about_it(errors)) == (78, [])
    assert [*job.run_dir.glob("wandb/*/*")] == [of_owner]


def test_a_tracker_that_is_not_installed_is_one_line(job):
    log = shlex.quote(str(job.run_dir / "logs/77.wandb.log"))
    job.ranks(f"while [[ ! -s {log} ]]; do sleep 0.1; done\n{job.status('DONE')}")
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
    config = job.run_dir / "config.yaml"
    config.write_text(config.read_text().replace("wandb", "trackio"))
    database = job.folder / "database"
    told = Site.run(job, "monitor.sh", "first", "--sync", TRACKIO_DIR=str(database))
    assert told.returncode == 2 and "TRACKERS=trackio bash setup.sh" in told.stderr
    install(job.run_dir.parents[1], "trackio")
    told = Site.run(job, "monitor.sh", "first", "--sync", TRACKIO_DIR=str(database))
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.startswith(f"trackio: shown up to step 0, in {database}/")
