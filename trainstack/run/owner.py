"""May this run be submitted? Not while another job has it, or is about to."""

import json
import socket
import time
from pathlib import Path
from typing import Any

from trainstack.errors import Refused
from trainstack.processes import is_dead, process_start
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, is_known_here, user
from trainstack.run.queue import NO_JOB, Job
from trainstack.run.states import QUEUED
from trainstack.storage import files
from trainstack.units import age, seconds_of
from trainstack.waits import CLAIM_SECONDS


def check_owner(run: RunFolder, jobs: dict[str, Job]) -> None:
    """Refused if a job that runs or waits already works on this run.

    Slurm may hide the jobs of others: then the heartbeat of the run tells.
    """
    name, submitted = run.path.name, [e for e in run.events() if e["event"] == "submitted"]
    live = [
        job for job in dict.fromkeys(e["job"] for e in submitted) if jobs.get(job, NO_JOB).is_live
    ]
    if live:  # of a chain, several
        named = ", ".join(f"{job} ({jobs[job].state})" for job in live)
        held = [job for job in live if jobs[job].is_held]
        wait = f"scontrol release {held[0]}" if held else "wait for it"
        raise Refused(
            f"run {name} has job {named} already; {wait}, or end it: scancel {' '.join(live)}"
        )
    last = submitted[-1] if submitted else {}
    other = last.get("user", user())
    if run.status().get("state") == QUEUED and other != user() and last["job"] not in jobs:
        raise Refused(
            f"run {name} has job {last['job']} of {other}, which Slurm does not show you; ask "
            "them, or choose another run.name"
        )
    holder = Lease(run.path).unreleased()
    if holder is None or (is_known_here(holder) and is_dead(holder)):
        return  # its heartbeat may be seconds old
    job = holder["job"]
    held = f"run {name} is in the hands of job {job}"
    if is_known_here(holder):
        raise Refused(f"{held}; wait for it, or stop it: kill -INT {holder['pid']}")
    if jobs.get(job, NO_JOB).is_started:
        raise Refused(f"{held}; wait for it")
    if job not in jobs and run.is_beating(job):
        raise Refused(
            f"{held} of {holder.get('user', 'somebody')}, whose heartbeat is "
            f"{age(run.silence(job))} old; wait for it"
        )


def claim(run: RunFolder, shell: int, asked_at: float) -> None:
    """Refused if another submit.sh is about to submit this run, or to start it here, or just has.

    Else the process ``shell`` is, until it ends: a lease is only taken once a job has begun. On
    another host it is believed for CLAIM_SECONDS. ``asked_at``: when Slurm told its jobs, in
    seconds since 1970. Best effort where the file system has no locks.
    """
    name, here = run.path.name, socket.gethostname()
    mine = {"host": here, "pid": shell, "process_started": process_start(shell)}
    path = claim_of(run)
    try:
        with files.only_one(path.with_suffix(".lock"), lambda: None):
            if (other := live_claim(path)) and other != mine:
                raise Refused(
                    f"run {name} is in the hands of process {other['pid']} on {other['host']}, "
                    f"which has just begun; wait for it, or stop it: kill -INT {other['pid']}"
                )
            last = [event for event in run.events() if event["event"] == "submitted"][-1:]
            if any(seconds_of(event["at"]) > asked_at for event in last):
                raise Refused(f"run {name} has job {last[0]['job']}, just submitted; wait for it")
            files.replace_file(path, json.dumps(mine).encode())
    except OSError:  # the folder of the locks is somebody else's
        return


def claim_of(run: RunFolder) -> Path:
    """The file that says who submits the run, or starts it here."""
    return run.path.parent.parent / "cache" / "locks" / f"run--{run.path.name}.json"


def live_claim(path: Path) -> dict[str, Any]:
    """What a claim says; nothing if there is none, or if its process has ended."""
    try:
        found, age_seconds = json.loads(path.read_bytes()), time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return {}
    is_here = found["host"] == socket.gethostname()
    is_live = not is_dead(found) if is_here else age_seconds < CLAIM_SECONDS
    return found if is_live else {}
