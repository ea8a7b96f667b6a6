"""What runs are doing: the Python half of monitor.sh, from run folders and squeue's lines alone."""

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.checkpoint import names
from trainstack.processes import process_start
from trainstack.run.folder import RunFolder
from trainstack.run.states import EXIT_CODES, RUNNING
from trainstack.storage import layout
from trainstack.units import NOTHING, ago, clock

COLUMNS = "RUN JOB SLURM STATE STEP LOSS TOK/S JOB_LEFT RUN_ETA CHECKPOINT".split()  # noqa: SIM905


@dataclass(frozen=True)
class Job:
    """One line of squeue."""

    state: str
    left: str
    reason: str


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainstack.monitor.screen", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument(
        "--queue", action="store_true", help="stdin has squeue's lines: id|state|time left|reason"
    )
    parser.add_argument("run", nargs="?")
    options = parser.parse_args(arguments)
    jobs = read_queue(sys.stdin.read()) if options.queue else None  # None: no Slurm here
    runs = sorted((options.home / "runs").glob("*/status.json"))
    if options.run:
        run = RunFolder(layout.run_folder(options.home, options.run))
        if not run.path.is_dir():
            have = ", ".join(path.parent.name for path in runs) or "none yet"
            print(f"monitor.sh: error: no run {options.run}; there are: {have}", file=sys.stderr)
            return 1
        show_run(run, jobs)
        return 0
    if not runs:
        print("monitor.sh: no runs yet; start one: bash submit.sh", file=sys.stderr)
        return 0
    rows = [COLUMNS] + [row(describe(RunFolder(path.parent), jobs)) for path in runs]
    widths = [max(len(line[column]) for line in rows) for column in range(len(COLUMNS))]
    for line in rows:
        cells = (cell.replace("_", " ") if line is COLUMNS else cell for cell in line)
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())
    return 0


def read_queue(text: str) -> dict[str, Job]:
    """Jobs by id from squeue's lines ``id|state|time left|reason``."""
    lines = (line.split("|") for line in text.splitlines())
    return {line[0]: Job(line[1], line[2], line[3]) for line in lines if len(line) == 4}


def describe(run: RunFolder, jobs: dict[str, Job] | None) -> dict[str, Any]:
    """All that the table and the screen show, as plain values."""
    status, newest = run.status(), names.checkpoints(run.checkpoints)
    events = run.events()
    submitted = [event["job"] for event in events if event["event"] == "submitted"]
    job_id = status.get("job") or (submitted[-1] if submitted else None)
    job = (jobs or {}).get(job_id)
    measured, evaluated = last_measurements(run.path / "metrics.jsonl")
    max_steps = status.get("max_steps")
    step = max(status.get("step") or 0, measured.get("step", 0))
    left = None
    state = true_state(status, job, jobs)
    if state == RUNNING and max_steps and measured:
        left = (max_steps - step) * measured["step_seconds"]
    return {
        "run": run.path.name,
        "job": job_id,
        "slurm": job.state if job else None,
        "reason": job.reason if job else None,
        "job_left": job.left if job else None,
        "state": state,
        "cause": status.get("cause") if state in EXIT_CODES else lost_cause(state),
        "next_action": status.get("next_action"),
        "step": step,
        "max_steps": max_steps,
        "measured": measured,
        "evaluated": evaluated,
        "eta_seconds": left,
        "checkpoint": newest[0] if newest else None,
        "attempt": status.get("attempt"),
        "nodes": status.get("nodes") or [],
        "updated_at": status.get("updated_at"),
        "events": events,
    }


def true_state(status: dict[str, Any], job: Job | None, jobs: dict[str, Job] | None) -> str:
    """The state that holds now: a job that was killed could not write that it ended."""
    state = status.get("state", "UNKNOWN")
    if state in EXIT_CODES:
        return state if job is None or job.state != "PENDING" else f"{state}, QUEUED"
    if job is not None:
        return "QUEUED" if job.state == "PENDING" else state
    if state == "QUEUED":
        return state if jobs is None else "LOST"
    name = str(status.get("job", ""))
    if name.startswith("local"):
        if status.get("host") != socket.gethostname():
            return state  # only its own host could tell
        return state if process_start(status["pid"]) else "KILLED"
    return state if jobs is None else "LOST"


def lost_cause(state: str) -> str | None:
    """Why a state differs from what the run itself last wrote."""
    if state == "KILLED":
        return "its processes are gone and left no word; the same command continues it"
    if state == "LOST":
        return "Slurm no longer has its job, and it left no word; the same command continues it"
    return None


def last_measurements(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last logged step and the last evaluation, read from the end of metrics.jsonl."""
    measured, evaluated = {}, {}
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return {}, {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first may be cut, the last may be in writing
        if "loss" in record:
            measured = record
        elif "eval_loss" in record:
            evaluated = record
    return measured, evaluated


def row(facts: dict[str, Any]) -> list[str]:
    """The cells of one run, in the order of COLUMNS."""
    measured, is_running = facts["measured"], facts["state"] == RUNNING
    speed = f"{measured['tokens_per_second']:,.0f}" if measured and is_running else NOTHING
    cells = {
        "RUN": facts["run"],
        "JOB": facts["job"] if facts["job"] and not is_local(facts["job"]) else NOTHING,
        "SLURM": facts["slurm"] or NOTHING,
        "STATE": facts["state"],
        "STEP": steps(facts),
        "LOSS": f"{measured['loss']:.3f}" if measured else NOTHING,
        "TOK/S": speed,
        "JOB_LEFT": facts["job_left"] or NOTHING,
        "RUN_ETA": clock(facts["eta_seconds"]),
        "CHECKPOINT": newest_checkpoint(facts),
    }
    return [cells[column] for column in COLUMNS]


def is_local(job: str) -> bool:
    return str(job).startswith("local")


def steps(facts: dict[str, Any]) -> str:
    total = f"/{facts['max_steps']:,}" if facts["max_steps"] else ""
    return f"{facts['step']:,}{total}" if facts["step"] or total else NOTHING


def newest_checkpoint(facts: dict[str, Any]) -> str:
    if facts["checkpoint"] is None:
        return NOTHING
    step, path = facts["checkpoint"]
    return f"step {step:,}, {ago(time.time() - path.stat().st_mtime)} old"


def show_run(run: RunFolder, jobs: dict[str, Job] | None) -> None:
    """One screen about one run: what it does, how it learns, what happened, where to look."""
    facts = describe(run, jobs)
    measured, evaluated = facts["measured"], facts["evaluated"]
    lines = [("state", facts["state"]), ("step", steps(facts))]
    if facts["cause"]:
        lines.append(("cause", facts["cause"]))
    if facts["next_action"]:
        lines.append(("next", facts["next_action"]))
    if facts["job"]:
        waits = f" ({facts['reason']})" if facts["slurm"] == "PENDING" else ""
        slurm = f", Slurm says {facts['slurm']}{waits}" if facts["slurm"] else ""
        lines.append(("job", f"{facts['job']}, attempt {facts['attempt'] or 1}{slurm}"))
        if facts["job_left"]:
            lines.append(("job left", facts["job_left"]))
    if facts["nodes"]:
        lines.append(("nodes", ", ".join(facts["nodes"])))
    if measured:
        pace = f"{measured['tokens_per_second']:,.0f} tokens/s"
        lines.append(("loss", f"{measured['loss']:.4f} at step {measured['step']:,}"))
        lines.append(("speed", f"{pace}, {measured['step_seconds']:.2f} s per step"))
        lines.append(("seen", f"{measured['tokens_seen']:,} tokens, epoch {measured['epoch']:.3f}"))
    if evaluated:
        perplexity = f"perplexity {evaluated['eval_perplexity']:.2f} at step {evaluated['step']:,}"
        lines.append(("held out", f"loss {evaluated['eval_loss']:.4f}, {perplexity}"))
    if facts["eta_seconds"] is not None:
        lines.append(("run ETA", clock(facts["eta_seconds"])))
    lines.append(("checkpoint", newest_checkpoint(facts)))
    lines.append(("folder", str(run.path)))
    logs = sorted(run.logs.glob("*.out")) or sorted(run.logs.glob("*.rank0.log"))
    if logs:
        lines.append(("log", str(max(logs, key=lambda path: path.stat().st_mtime))))
    print(f"run {facts['run']}")
    for name, text in lines:
        print(f"  {name:<11} {text}")
    if facts["events"]:
        print("  history")
        for event in facts["events"][-8:]:
            step = f" step {event['step']:,}" if event.get("step") is not None else ""
            cause = f": {event['cause']}" if event.get("cause") else ""
            print(f"    {event['at'][:19]}Z  {event['event']}{step}{cause}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
