"""Shows a run in Weights & Biases and trackio.

Command line: ``python -m trainstack track RUN [--home HOME]`` sends what is new to the trackers of
log.report_to, or, if it names none, to those that are installed. ``--follow SHELL JOB --to NAME``:
a job shows itself, without a network, as long as that process runs.
"""

import os
import subprocess
import sys
from pathlib import Path

from trainstack.errors import ConfigError
from trainstack.history.settings import settings_of
from trainstack.options import parse, parser_of
from trainstack.run.folder import find_run
from trainstack.storage import layout


def main(arguments: list[str]) -> int:
    parser = parser_of("track", __doc__)
    parser.add_argument("run", metavar="RUN", help="name or folder of a run")
    parser.add_argument("--to", choices=layout.TRACKERS, help="this tracker alone")
    parser.add_argument(
        "--follow", nargs=2, metavar=("SHELL", "JOB"), help="the process of the job's shell"
    )
    options = parse(parser, arguments, needs_home=False)
    run = find_run(options.run, options.home)
    asked = settings_of(run / "config.yaml").get("log.report_to") or []
    asked = [name for name in layout.TRACKERS if name in asked]
    if options.follow:
        if options.to in asked:
            start = start_of(options.to, run, "--offline", "--follow", *options.follow)
            os.setsid()  # a group, with what it starts, that Ctrl-C does not reach
            os.nice(19)
            os.execve(sys.executable, *start)  # else two processes would wait beside the job
        return 0
    installed = [name for name in layout.TRACKERS if packages_of(name, run)]
    names = [options.to] if options.to else asked or installed
    if not names:
        raise ConfigError("no tracker is installed; run: TRACKERS=wandb bash setup.sh, or trackio")
    codes = [send(name, run) for name in names]
    return max(codes)


def packages_of(name: str, run: Path) -> Path | None:
    return layout.tracker_packages(run.parents[1], name)


def start_of(name: str, run: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """What starts feed.py with the packages of a tracker: a command, and its environment."""
    packages = packages_of(name, run)
    if packages is None:
        raise ConfigError(f"{name} is not installed; run: TRACKERS={name} bash setup.sh")
    environment = {**os.environ, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    environment["PYTHONPATH"] = f"{packages}{os.pathsep}{layout.CODE}"
    if "--offline" in options:
        environment["TRACKIO_DIR"] = str(run / "trackio")
        # The file may lie on a shared disk, and be read from another host.
        environment.setdefault("TRACKIO_SQLITE_JOURNAL_MODE", "delete")
    project = os.environ.get(f"{name.upper()}_PROJECT") or run.parents[1].name
    command = [sys.executable, "-m", "trainstack.trackers.feed", name, str(run)]
    return [*command, "--project", project, *options], environment


def send(name: str, run: Path) -> int:
    """Send what is new; 0, or another code after a line that says why not."""
    options = []
    if name == "trackio" and (space := os.environ.get("TRACKIO_SPACE_ID")):
        options = ["--space", space]
    command, environment = start_of(name, run, *options)
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
