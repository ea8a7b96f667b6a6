"""How a run is, in one word with its reason."""

import itertools
import math
import statistics
import time
from typing import NamedTuple

from trainstack.monitor.view import LOST_CAUSES, UNKNOWN, View, written_at
from trainstack.run.queue import meaning
from trainstack.run.states import EXIT_CODES, QUEUED, RESTARTING, RUNNING, STARTING
from trainstack.units import age, counted, seconds_of, time_of

SILENT_SECONDS = 180  # without a sign of a run that trains; at least
SILENT_LINES = 5  # as many times as it takes from one line of its log to the next
PAUSES = 20  # events, among which the longest evaluation and save are looked for
LOADING_SECONDS = 900  # within which a job begins to train
DATA_SHARE = 0.2  # of a step, spent waiting for data
LINES = 20  # of the log, from which the present is told
RISE = 0.02  # of the loss, above what it was
EVALUATIONS = 3  # in a row, each with a greater loss


class Health(NamedTuple):
    """A word for the table, and its reason, which may be empty."""

    word: str
    reason: str = ""


def health_of(view: View) -> Health:
    """The first of these that holds."""
    if view.job.is_waiting:
        word = "blocked" if view.job.never_starts else "held" if view.job.is_held else "queued"
        return Health(word, waiting_for(view))
    if view.job.state == "COMPLETING" and view.state not in EXIT_CODES:
        return Health(
            "ending", "Slurm takes its job from the nodes: one failed, or somebody ended it"
        )
    if view.state == "SUSPENDED":
        return Health("suspended", "Slurm stopped its processes; it goes on when Slurm lets it")
    if view.state == "DONE":
        return Health("done")
    if view.state in LOST_CAUSES:
        return Health("lost", view.cause or "")
    if view.state == "PAUSED":
        return Health("paused", view.cause or "")
    if view.state == UNKNOWN:
        return Health("unknown", view.cause or "its status cannot be read")
    if view.state == QUEUED:
        return Health("queued", "Slurm does not show its job, and may hide it")
    if view.state in (STARTING, RESTARTING) or (view.state == RUNNING and not view.has_trained):
        return start_of(view)
    if view.state != RUNNING:
        return Health("failed", view.cause or "")
    return next((found for find in FINDERS if (found := find(view))), Health("good"))


def waiting_for(view: View) -> str:
    """Slurm's reason in words, with the start that it expects."""
    text = meaning(view.job.reason, view.job_id or "").partition(": ")
    told = text[2] or text[0]
    left = view.job.starts_at - time.time()
    return f"{told}; Slurm expects to start it in {age(left)}" if left > 0 else told


def start_of(view: View) -> Health:
    """A job that does not train yet: what it does, and for how long."""
    last = view.events[-1] if view.events else {"event": "", "at": time_of(0)}
    phases = {"start": "loading", "loaded": "warming up, or compiling"}
    what = phases.get(last["event"], "beginning")
    status_at = written_at(view.run.path / "status.json")
    seconds = time.time() - max(seconds_of(last["at"]), view.job.starts_at, status_at)
    word = "silent" if seconds > LOADING_SECONDS else "starting"
    return Health(word, f"{what} for {age(seconds)}")


def silent(view: View) -> Health | None:
    """Nothing new in the log, nor in its history."""
    logged = view.logged[:2]
    steps = logged[0]["step"] - logged[1]["step"] if len(logged) > 1 else 1
    between = view.measured.get("step_seconds", 0.0) * steps
    pauses = (e.get("seconds", e.get("save_seconds", 0.0)) for e in view.events[-PAUSES:])
    seconds = time.time() - view.last_sign_at
    if seconds > max(SILENT_SECONDS, SILENT_LINES * between) + max(pauses, default=0.0):
        return Health("silent", f"nothing new for {age(seconds)}")
    return None


def save_fails(view: View) -> Health | None:
    saves = [e for e in view.events if e["event"] in ("checkpoint", "save_failed")]
    failed = 0
    while failed < len(saves) and saves[-1 - failed]["event"] == "save_failed":
        failed += 1
    if not failed:
        return None
    how_often = f"the last {failed} saves failed" if failed > 1 else "the last save failed"
    return Health("unsaved", f"{how_often}: {saves[-1].get('cause', '')}")


def slow_rank(view: View) -> Health | None:
    slow = view.slow_ranks
    if not slow:
        return None
    worst = max(slow, key=lambda event: event["own_seconds"] / event["others_seconds"])
    ratio = worst["own_seconds"] / worst["others_seconds"]
    where, more = f"rank {worst['rank']} on {worst['host']}", counted(len(slow) - 1, "more rank")
    told = f"{where} takes {ratio:.1f} times as long as the others"
    return Health("slow", f"{told}, and {more}" if len(slow) > 1 else told)


def skips(view: View) -> Health | None:
    """Updates that were left out lately."""
    since = view.logged[:LINES][-1]["step"] if view.logged else 0
    late = [e for e in view.events if e["event"] in ("skip", "rollback") and e["step"] >= since]
    if not late:
        return None
    return Health("skipping", f"{counted(len(late), 'update')} left out since step {since:,}")


def loss_rises(view: View) -> Health | None:
    """Losses of the last lines against those before; held-out losses that rise each time."""
    losses = [r["loss"] for r in view.logged if math.isfinite(r["loss"])]
    late, early = losses[:LINES], losses[LINES : 4 * LINES]
    if len(early) == 3 * LINES:
        now, before = statistics.median(late), statistics.median(early)
        spread = statistics.median(abs(loss - before) for loss in early)
        # Three standard errors of a median of so many normal values; 1.48 makes a deviation of it.
        if now > before * (1 + RISE) and now - before > 3 * 1.25 * 1.48 * spread / LINES**0.5:
            return Health(
                "rising", f"loss {now:.3f} in the last {LINES} lines, {before:.3f} before"
            )
    held_out = [r["eval_loss"] for r in view.evaluations[: EVALUATIONS + 1]]
    pairs = list(itertools.pairwise(held_out))
    if len(pairs) == EVALUATIONS and all(later > earlier for later, earlier in pairs):
        return Health(
            "rising", f"held-out loss rose {EVALUATIONS} times in a row, to {held_out[0]:.3f}"
        )
    return None


def waits_for_data(view: View) -> Health | None:
    steps = [r for r in view.logged[:LINES] if r.get("step_seconds") and "data_seconds" in r]
    if not steps:
        return None
    share = sum(r["data_seconds"] for r in steps) / sum(r["step_seconds"] for r in steps)
    return Health("data", f"{share:.0%} of a step waits for data") if share > DATA_SHARE else None


FINDERS = (silent, save_fails, slow_rank, skips, loss_rises, waits_for_data)
