"""The copy of code, settings and environment that a job runs."""

import argparse
import json
import os
import shutil

from trainstack.config.schema import Config
from trainstack.run.environment import describe_environment
from trainstack.run.folder import RunFolder
from trainstack.run.states import QUEUED, STARTING
from trainstack.storage import files

SNAPSHOT = ("train.py", "train.slurm", "requirements.txt")


def make_run_folder(options: argparse.Namespace, config: Config, run: RunFolder) -> None:
    """Keep code, settings and environment, so that the job runs what was submitted."""
    run.create()
    snapshot = run.path / f".code.{os.getpid()}.tmp"
    shutil.rmtree(snapshot, ignore_errors=True)
    snapshot.mkdir()
    for name in SNAPSHOT:
        shutil.copy2(options.repository / name, snapshot / name)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(options.repository / "trainstack", snapshot / "trainstack", ignore=skipped)
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
