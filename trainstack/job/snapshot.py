"""The copy of code, settings and environment that a job runs."""

import argparse
import json
import os
import shutil
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.run.environment import describe_environment
from trainstack.run.folder import RunFolder
from trainstack.run.states import QUEUED, STARTING
from trainstack.storage import files

SNAPSHOT = ("train.py", "train.slurm", "job.sh", "requirements.txt")  # beside the package


def copy_code(repository: Path, folder: Path) -> None:
    """Copy what a job runs: the package with all its folders, and the files of SNAPSHOT.

    Not by copytree, which gives folders the mode that they have in the checkout: a copy of a
    read-only one could not be replaced, and one of a private one not be read by the group.
    """
    package = (repository / "trainstack").rglob("[!.]*")  # an editor may have hidden files open
    kept = [p for p in package if p.is_file() and p.parent.name != "__pycache__"]
    for name in [*SNAPSHOT, *(path.relative_to(repository) for path in kept)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, folder / name)


def make_run_folder(options: argparse.Namespace, config: Config, run: RunFolder) -> None:
    """Keep code, settings and environment, so that the job runs what was submitted."""
    run.create()
    snapshot = run.path / f".code.{os.getpid()}.tmp"
    shutil.rmtree(snapshot, ignore_errors=True)
    copy_code(options.repository, snapshot)
    before = run.path / ".code.before"
    shutil.rmtree(before, ignore_errors=True)
    if (run.path / "code").exists():
        os.rename(run.path / "code", before)
    os.rename(snapshot, run.path / "code")
    shutil.rmtree(before, ignore_errors=True)
    files.replace_file(run.path / "config.yaml", config.to_yaml().encode())
    described = json.dumps(describe_environment(options.repository), indent=1)
    files.replace_file(run.path / "environment.json", described.encode())
    if not options.local:
        before_status = run.status()
        files.replace_file(run.path / ".status.before", json.dumps(before_status).encode())
    # Also here: a DONE of before would tell the job that there is nothing to do.
    state = STARTING if options.local else QUEUED
    run.set_status(state, job=None, attempt=None, exit_code=None, cause=None)
