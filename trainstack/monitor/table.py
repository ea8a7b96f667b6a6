"""The table of all runs, a line for each, newest first; and the same for scripts."""

import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from trainstack.checkpoint.names import BEST, linked
from trainstack.monitor import drawing
from trainstack.monitor.health import health_of
from trainstack.monitor.view import View, written_at
from trainstack.run.states import RUNNING, is_local_job
from trainstack.units import NOTHING, age, duration

# The columns that may go, first those that a narrow terminal misses least.
LESS_NEEDED = (
    "CHECKPOINT", "ATTEMPTS", "MFU", "WHY", "JOB", "EVAL", "TOK/S", "DONE", "JOB LEFT", "RUN ETA",
    "LOSS", "STEP",
)  # fmt: skip


def lines_of(views: Sequence[View], width: int) -> list[Text]:
    """The table, of which ``views`` has at least one run."""
    newest = sorted(views, key=lambda view: view.last_sign_at, reverse=True)
    ordered = sorted(newest, key=lambda view: not view.is_live)
    return drawing.table([cells_of(view) for view in ordered], width, LESS_NEEDED, cut="WHY")


def cells_of(view: View) -> dict[str, str]:
    """The cells of one run by the titles of their columns, in order."""
    health, is_running = health_of(view), view.state == RUNNING
    mfu = view.measured.get("mfu")
    return {
        "RUN": view.run.path.name,
        "JOB": (slurm_job(view) or NOTHING),
        "STATE": view.state,
        "STEP": steps(view),
        "DONE": f"{view.share:.0%}" if view.share is not None else NOTHING,
        "LOSS": f"{view.measured['loss']:.3f}" if view.measured else NOTHING,
        "EVAL": f"{view.evaluated['eval_loss']:.3f}" if view.evaluated else NOTHING,
        "TOK/S": drawing.number(view.measured["tokens_per_second"])
        if is_running and view.measured
        else NOTHING,
        "MFU": f"{mfu:.0%}" if is_running and mfu else NOTHING,
        "JOB LEFT": view.job.left if view.job.is_started else NOTHING,
        "RUN ETA": duration(view.seconds_left),
        "ATTEMPTS": str(view.attempts) if view.attempts > 1 else NOTHING,
        "CHECKPOINT": newest_checkpoint(view),
        "HEALTH": health.word,
        "WHY": health.reason or NOTHING,
    }


def slurm_job(view: View) -> str | None:
    """Its id, unless its job is one of this machine."""
    return view.job_id if view.job_id and not is_local_job(view.job_id) else None


def steps(view: View) -> str:
    total = f"/{view.max_steps:,}" if view.max_steps else ""
    return f"{view.step:,}{total}" if view.step or total else NOTHING


def newest_checkpoint(view: View) -> str:
    if view.checkpoint is None:
        return NOTHING
    step, path = view.checkpoint
    return f"step {step:,}, {age(time.time() - written_at(path))} old"


def facts_of(view: View) -> dict[str, Any]:
    """What ``--json`` tells of a run; null where a thing is not known."""
    health, measured, evaluated = health_of(view), view.measured, view.evaluated
    return {
        "run": view.run.path.name,
        "folder": str(view.run.path),
        "state": view.state,
        "health": health.word,
        "reason": health.reason or None,
        "cause": view.cause,
        "next_action": view.next_action,
        "job": view.job_id,
        "slurm_state": view.job.state or None,
        "slurm_reason": view.job.reason or None,
        "job_left": view.job.left or None,
        "attempts": view.attempts,
        "step": view.step,
        "max_steps": view.max_steps,
        "seconds_left": view.seconds_left,
        "jobs_left": view.jobs_left,
        "last_sign_at": view.last_sign_at,
        "checkpoint": str(view.checkpoint[1]) if view.checkpoint else None,
        "best": str(best) if (best := linked(view.run.checkpoints, BEST)) else None,
        "measured": measured or None,
        "evaluated": evaluated or None,
    }
