"""The copy of code, settings and environment that a job runs."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from trainstack.config.schema import Config
from trainstack.errors import SECRET_IN_CODE, without_secrets
from trainstack.run.folder import RunFolder
from trainstack.run.states import QUEUED, STARTING
from trainstack.storage import files, manifest

SNAPSHOT = (  # beside the package: what a job runs, and what resumes the run without any checkout
    "train.py", "train.slurm", "job.sh", "slurm.sh", "requirements.txt", "submit.sh", "setup.sh",
    "monitor.sh", "config.yaml",
)  # fmt: skip
MAY_LACK = ("env.sh", "requirements-*.txt")  # what setup.sh writes; packages of trackers


def make_run_folder(repository: Path, config: Config, run: RunFolder, is_local: bool) -> None:
    """Keep code, settings and environment, so that the job runs what was submitted."""
    run.create()
    snapshot = run.path / f".code.{os.getpid()}.tmp"
    shutil.rmtree(snapshot, ignore_errors=True)
    copy_code(repository, snapshot)
    manifest.swap_in(snapshot, run.path / "code")
    config = keep_templates(config, run.path / "chat_templates")
    files.replace_file(run.path / "config.yaml", config.to_yaml().encode())
    described = describe_environment(repository)
    if described["git_commit"] is None and repository == run.path / "code":  # it resumes itself
        former = json.loads((run.path / "environment.json").read_bytes())
        described |= {key: former[key] for key in ("git_commit", "git_difference")}
    described = json.dumps(described, indent=1)
    files.replace_file(run.path / "environment.json", described.encode())
    if not is_local:
        files.replace_file(run.status_before, json.dumps(run.status()).encode())
    # Also here: a DONE of before would tell the job that there is nothing to do.
    state = STARTING if is_local else QUEUED
    run.set_status(state, job=None, attempt=None, exit_code=None, cause=None, next_action=None)


def keep_templates(config: Config, folder: Path) -> Config:
    """The same settings, with copies of the chat templates that they name: those may change."""

    def kept(section):
        if not section.chat_template:
            return section
        content = Path(section.chat_template).read_bytes()
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.jinja"
        folder.mkdir(exist_ok=True)
        files.replace_file(path, content)
        return section.model_copy(update={"chat_template": str(path)})

    mixture = [kept(source) for source in config.data.mixture]
    data = kept(config.data).model_copy(update={"mixture": mixture})
    return config.model_copy(update={"data": data})


def copy_code(repository: Path, folder: Path) -> None:
    """Copy what a job runs: the package with all its folders, and the files of SNAPSHOT.

    Not by copytree, which gives folders the mode that they have in the checkout: a copy of a
    read-only one could not be replaced, and one of a private one not be read by the group.
    """
    package = (repository / "trainstack").rglob("[!.]*")  # an editor may have hidden files open
    kept = [p for p in package if p.is_file() and p.parent.name != "__pycache__"]
    kept += [path for name in MAY_LACK for path in repository.glob(name)]
    for name in [*SNAPSHOT, *(path.relative_to(repository) for path in kept)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, folder / name)


def describe_environment(repository: Path) -> dict[str, Any]:
    """Git commit and uncommitted difference of a checkout, Python, and every installed package."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "git_commit": _git(repository, "rev-parse", "HEAD"),
        "git_difference": _git(repository, "diff", "HEAD"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(repository: Path, *arguments: str) -> str | None:
    """Git's answer, without the tokens in it; None outside a checkout or without git."""
    try:
        result = subprocess.run(
            ["git", "-C", repository, *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = without_secrets(result.stdout.strip(), SECRET_IN_CODE)
    return said if result.returncode == 0 else None
