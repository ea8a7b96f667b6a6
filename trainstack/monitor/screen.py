"""What runs are doing: the Python half of monitor.sh, from run folders and squeue's lines alone."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainstack.monitor import why
from trainstack.monitor.view import View, view_of
from trainstack.processes import run_command
from trainstack.run import refusal
from trainstack.run.folder import RunFolder
from trainstack.run.lease import is_local_job
from trainstack.run.queue import meaning, read_queue
from trainstack.run.states import RUNNING
from trainstack.storage import layout
from trainstack.units import NOTHING, age, duration, rounded

SHOWN_EVENTS = 8


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainstack.monitor.screen", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument(
        "--queue", action="store_true", help="stdin has squeue's lines, as run/queue.py has them"
    )
    parser.add_argument(
        "--why", action="store_true", help="what happened to the run, and what helps"
    )
    parser.add_argument("run", nargs="?")
    options = parser.parse_args(arguments)
    jobs = read_queue(sys.stdin.read()) if options.queue else None  # None: no Slurm here
    runs = [path.parent for path in sorted((options.home / "runs").glob("*/status.json"))]
    if not options.run:
        if not runs:
            print("monitor.sh: no runs yet; start one: bash submit.sh", file=sys.stderr)
        else:
            show_table(view_of(RunFolder(path), jobs) for path in runs)
        return 0
    run = RunFolder(layout.run_folder(options.home, options.run))
    if not run.path.is_dir():
        if told := why.lines_without_run(run):
            print("\n".join(told))
            return 1
        have = ", ".join(path.name for path in runs) or "none yet"
        print(f"monitor.sh: error: no run {options.run}; there are: {have}", file=sys.stderr)
        return 1
    view = view_of(run, jobs)
    if options.why:
        print("\n".join(why.lines_of(view, jobs)))
    else:
        show_run(view)
    return 0


def show_table(views: Iterable[View]) -> None:
    """Print one line for each run, of which there is at least one, in columns."""
    cells = [cells_of(view) for view in views]
    rows = [cells[0].keys(), *(row.values() for row in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def cells_of(view: View) -> dict[str, str]:
    """The cells of one run by the titles of their columns, in order."""
    measured = view.measured
    loss = f"{measured['loss']:.3f}" if measured else NOTHING
    speed = f"{measured['tokens_per_second']:,.0f}" if measured else NOTHING
    is_of_slurm = bool(view.job_id) and not is_local_job(view.job_id)
    return {
        "RUN": view.run.path.name,
        "JOB": view.job_id if is_of_slurm else NOTHING,
        "SLURM": view.job.state or NOTHING,
        "STATE": view.state,
        "STEP": steps(view),
        "LOSS": loss,
        "TOK/S": speed if view.state == RUNNING else NOTHING,
        "JOB LEFT": view.job.left if view.job.is_started else NOTHING,
        "RUN ETA": duration(view.seconds_left),
        "CHECKPOINT": newest_checkpoint(view),
    }


def steps(view: View) -> str:
    total = f"/{view.max_steps:,}" if view.max_steps else ""
    return f"{view.step:,}{total}" if view.step or total else NOTHING


def newest_checkpoint(view: View) -> str:
    if view.checkpoint is None:
        return NOTHING
    step, path = view.checkpoint
    return f"step {step:,}, {age(time.time() - path.stat().st_mtime)} old"


def show_run(view: View) -> None:
    """Print one screen: what the run does, how it learns, where to look, what happened."""
    print(f"run {view.run.path.name}")
    for label, text in rows_of(view):
        print(f"  {label:<11} {text}")
    if view.events:
        shown, whole = min(len(view.events), SHOWN_EVENTS), len(view.events)
        print(f"  history     the last {shown} of {whole} in events.jsonl")
    for event in view.events[-SHOWN_EVENTS:]:
        step = f" step {event['step']:,}" if event.get("step") is not None else ""
        cause = f": {event['cause']}" if event.get("cause") else ""
        print(f"    {event['at'][:19]}Z  {event['event']}{step}{cause}")


def rows_of(view: View) -> Iterator[tuple[str, str]]:
    """State and job, loss and speed, where to look: each a label and a text."""
    yield "state", view.state
    yield "step", steps(view)
    if view.cause:
        yield "cause", view.cause
    if view.next_action:
        yield "next", view.next_action
    if refused := refusal.last(view.run):
        yield "refused", refused
    if view.job_id:
        yield "job", job_text(view)
    if view.job.is_started:
        yield "job left", view.job.left
    if view.status.get("nodes"):
        yield "nodes", ", ".join(view.status["nodes"])
    if measured := view.measured:
        speed = f"{measured['tokens_per_second']:,.0f} tokens/s"
        yield "loss", f"{measured['loss']:.4f} at step {measured['step']:,}"
        yield "speed", f"{speed}, {measured['step_seconds']:.2f} s per step"
        yield "seen", f"{measured['tokens_seen']:,} tokens, epoch {measured['epoch']:.3f}"
    if evaluated := view.evaluated:
        perplexity, at_step = rounded(evaluated["eval_perplexity"]), f"step {evaluated['step']:,}"
        loss = f"loss {evaluated['eval_loss']:.4f}"
        bits = evaluated.get("eval_bits_per_byte")
        exact = f", {bits:.4f} bits per byte" if bits else ""
        yield "held out", f"{loss}, perplexity {perplexity}{exact} at {at_step}"
    if view.seconds_left is not None:
        yield "run ETA", duration(view.seconds_left)
    yield "checkpoint", newest_checkpoint(view)
    yield "folder", str(view.run.path)
    logs = sorted(view.run.logs.glob("*.out")) or sorted(view.run.logs.glob("*.rank0.log"))
    if logs:
        yield "log", str(max(logs, key=lambda path: path.stat().st_mtime))


def job_text(view: View) -> str:
    text = f"{view.job_id}, attempt {view.status.get('attempt') or 1}"
    if view.job.state:
        text += f", Slurm says {view.job.state}"
    if view.job.is_waiting:
        text += f" ({meaning(view.job.reason, view.job_id)})"
    return text


if __name__ == "__main__":
    run_command(main)
