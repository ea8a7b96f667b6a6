"""Feeds one tracker from metrics.jsonl; the packages of the tracker are on the path.

What was shown cannot be taken back, and a run that is resumed takes steps back: those beyond its
newest checkpoint. So a step is shown once the checkpoint that keeps it is published.
"""

import argparse
import itertools
import json
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack.checkpoint.names import newest_state
from trainstack.config.load import read_yaml
from trainstack.errors import first_words, without_secrets
from trainstack.processes import die_with_parent, run_command
from trainstack.run.folder import RunFolder, numbers_in
from trainstack.storage import files
from trainstack.trackers.to_trackio import Trackio
from trainstack.trackers.to_wandb import Wandb

LOOK_SECONDS = 5.0  # between two looks at a job
STATE = ("state", "step", "max_steps", "checkpoint", "cause")  # of status.json


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tracker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--project", required=True)
    parser.add_argument("--offline", action="store_true", help="write into the run's folder alone")
    parser.add_argument("--space", help="of the Hugging Face Hub, for trackio")
    parser.add_argument("--follow", nargs=2, metavar=("SHELL", "JOB"))
    options = parser.parse_args(arguments)
    is_over = threading.Event()
    if options.follow:
        signal.signal(signal.SIGTERM, lambda *_: is_over.set())
        die_with_parent(int(options.follow[0]))
    else:
        is_over.set()
    try:
        run = RunFolder(options.run)
        if options.follow and not owns(run, options.follow[1], is_over):
            return 0
        kind = {"wandb": Wandb, "trackio": Trackio}[options.tracker]
        tracker = kind(options.project, run.path, run_id(run), about(run), options.offline)
        shown = feed(tracker, run, is_over)
        where = tracker.close(state_of(run), options.space)
    except Exception as error:  # whatever a tracker raises: one line
        print(f"{options.tracker}: error: {first_words(error)}", flush=True)
        return 1
    print(f"{options.tracker}: shown up to step {shown:,}, in {where}", flush=True)
    return 0


def owns(run: RunFolder, job: str, is_over: threading.Event) -> bool:
    """Wait until the run is this job's; False if that never came. Else another one shows it."""
    while run.status().get("job") != job:
        if is_over.wait(LOOK_SECONDS):
            break
    return run.status().get("job") == job


def feed(tracker: Wandb | Trackio, run: RunFolder, is_over: threading.Event) -> int:
    """Show what is final, until it is over; the last step that was shown."""
    after, looked_at = tracker.after, None
    while True:
        is_last = is_over.is_set()
        newest, _ = newest_state(run.checkpoints)
        if is_last or newest != looked_at:
            looked_at = newest
            for step, values in final_steps(run, after):
                tracker.add(step, values)
                after = step
            tracker.flush(state_of(run))
        if is_last:
            return after
        is_over.wait(LOOK_SECONDS)


def final_steps(run: RunFolder, after: int) -> Iterator[tuple[int, dict[str, float]]]:
    """What was logged beyond step ``after`` and stays, by step.

    The evaluation of the newest checkpoint's own step may still follow: a stop cut it short. A run
    that is DONE has made it, and saves nothing after it.
    """
    newest, saved = newest_state(run.checkpoints)
    status = run.status()
    if is_done := status.get("state") == "DONE":
        newest = status["step"]
    for step, lines in itertools.groupby(run.measurements(), key=lambda line: line["step"]):
        if step > newest or (step == newest and not (is_done or saved.is_evaluated)):
            return
        if step > after:
            yield step, {name: value for line in lines for name, value in numbers_in(line)}


def run_id(run: RunFolder) -> str:
    """By which the trackers know this run, whatever job works on it."""
    path = run.path / "trackers.json"
    if not path.exists():
        files.create_file(path, json.dumps({"id": secrets.token_hex(4)}).encode())
    return json.loads(path.read_bytes())["id"]


def about(run: RunFolder) -> dict[str, Any]:
    """The settings by their sections, and ``environment``: commit, system, versions."""
    sections, _ = read_yaml(run.path / "config.yaml")
    described = files.read_object(run.path / "environment.json")
    described.pop("git_difference", None)
    return {**sections, "environment": described}


def state_of(run: RunFolder) -> dict[str, Any]:
    """What the run is doing."""
    status = run.status()
    found = {key: status[key] for key in STATE if status.get(key) is not None}
    return found | ({"cause": without_secrets(found["cause"])} if "cause" in found else {})


if __name__ == "__main__":
    run_command(main)
