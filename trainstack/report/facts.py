"""All that the page says of one run, as JSON holds it; moments are in seconds since 1970."""

from collections.abc import Sequence
from typing import Any

from trainstack.checkpoint import names
from trainstack.errors import without_secrets
from trainstack.history import goodput
from trainstack.history.attempts import ENDS, PASSED, Attempt, Event, attempts_of, last_durable_step
from trainstack.history.goodput import Timeline
from trainstack.history.settings import settings_of, shipped_settings
from trainstack.monitor.health import health_of
from trainstack.monitor.view import View
from trainstack.report.series import BY_SOURCE, Executed, curves_of
from trainstack.storage.files import object_in
from trainstack.units import seconds_of

# Events by which an attempt ends; a pause has told what preempted it.
TOLD_ENDS = {*ENDS} - {"preempted", "not_submitted"}
NOTABLE = {*ENDS, *PASSED, "rollback", "slow_rank_over", "early_stop", "branch"}
MOST_NOTES = 200  # the newest are shown
MOST_SAMPLES = 50
FINEST = 2000  # parts of the timeline: what is shorter is not seen


def facts_of(view: View) -> dict[str, Any]:
    """What is known of a run from its folder."""
    run, events, status = view.run, view.events, view.status
    reason = health_of(view).reason
    executed = Executed.read(run.path / "samples.jsonl")
    durable = last_durable_step(status, run.checkpoints)
    told = [e["step"] for e in events if e["event"] in ("checkpoint", "training")]
    attempts = attempts_of(events, executed.telling([*told, durable]))
    measured, evaluated = view.measured, view.evaluated
    return {
        "name": run.path.name,
        "folder": str(run.path),
        "state": view.state,
        "meaning": without_secrets(reason if reason != view.cause else ""),
        "cause": without_secrets(view.cause or ""),
        "next": without_secrets(view.next_action or ""),
        "step": view.step,
        "max_steps": view.max_steps,
        "seconds_left": view.seconds_left,
        "measured": measured,
        "evaluated": evaluated,
        "tokens_per_step": measured.get("tokens_seen", 0) // measured.get("step", 1),
        "redone_steps": executed.redone,
        **times_of(view, attempts),
        "curves": curves_of(
            run.path / "metrics.jsonl", [*evaluated.get(BY_SOURCE, ())], executed
        ),
        "restarts": restarts_of(attempts),
        "notes": notes_of(events),
        "checkpoints": checkpoints_of(view),
        "settings": settings_of(run.path / "config.yaml"),
        "shipped": shipped_settings(run.path),
        "environment": environment_of(view),
        "samples": samples_of(view),
    }  # fmt: skip


def times_of(view: View, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Where the time went: ``spent`` by cause, and a row of the timeline for each attempt."""
    if not view.events and not attempts:
        return {"begin": None, "spent": {}, "rows": []}
    timeline = goodput.timeline_of_run(view.run, view.events, attempts)
    begin, end = goodput.bounds(view.events, attempts)
    return {
        "begin": begin,
        "end": end,
        "spent": {cause: round(seconds, 3) for cause, seconds in timeline.spent.items()},
        "rows": rows_of(timeline, attempts, (end - begin) / FINEST),
    }


def rows_of(timeline: Timeline, attempts: Sequence[Attempt], least: float) -> list[dict[str, Any]]:
    """The rows of the timeline: ``parts`` are [cause, begin, end], none shorter than ``least``."""
    rows = []
    for attempt, parts in zip([*attempts, None], timeline.rows, strict=True):
        seen = [list(parts[0])] if parts else []
        for cause, begin, end in parts[1:]:
            if end - begin < least or cause == seen[-1][0]:
                seen[-1][2] = end
            else:
                seen.append([cause, begin, end])
        if attempt:
            steps = [execution.step for execution in attempt.executions]
            executed = [min(steps), max(steps)] if steps else None
            end = how_ended(attempt)
            rows.append({"name": attempt.name, "steps": executed, "end": end, "parts": seen})
        elif seen:  # since the last attempt ended
            rows.append({"name": None, "steps": None, "end": "", "parts": seen})
    return rows


def how_ended(attempt: Attempt) -> str:
    """Its end in words; empty if it is not on record."""
    ends = [event for event in attempt.events if event["event"] in TOLD_ENDS]
    return words_of(ends[-1]) if ends else ""


def words_of(event: Event) -> str:
    """What an event says beside its time and step."""
    kind, cause = event["event"].replace("_", " "), event.get("cause")
    return f"{kind}: {without_secrets(cause)}" if cause else kind


def restarts_of(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Where the curve of one attempt ends and that of the next begins."""
    found = []
    for before, attempt in zip(attempts, attempts[1:], strict=False):
        for event in attempt.events:
            if event["event"] == "training":
                why = how_ended(before) or "its end is not on record"
                found.append({"step": event["step"], "at": seconds_of(event["at"]), "why": why})
    return found


def notes_of(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Events that a person should know of, the newest MOST_NOTES of them."""
    kept = [event for event in events if event["event"] in NOTABLE]
    return [
        {"kind": event["event"], "at": seconds_of(event["at"]), "step": event.get("step"),
         "text": words_of(event)}
        for event in kept[-MOST_NOTES:]
    ]  # fmt: skip


def checkpoints_of(view: View) -> list[dict[str, Any]]:
    """Every checkpoint that was published, and whether it is still there."""
    kept = {step for step, _ in names.checkpoints(view.run.checkpoints)}
    best = names.linked(view.run.checkpoints, names.BEST)
    return [
        {"step": event["step"], "at": seconds_of(event["at"]), "bytes": event.get("bytes"),
         "seconds": event.get("save_seconds"), "stall": event.get("stall_seconds"),
         "is_kept": event["step"] in kept,
         "is_best": best is not None and best.name == f"checkpoint-{event['step']}"}
        for event in view.events if event["event"] == "checkpoint"
    ]  # fmt: skip


def environment_of(view: View) -> dict[str, Any]:
    """Versions, hosts and ranks. Of uncommitted changes only how many lines: they may be secret."""
    found = object_in(view.run.path / "environment.json")
    difference = found.pop("git_difference", None)
    changed = sum(line[:1] in "+-" for line in (difference or "").splitlines())
    starts = [event for event in view.events if event["event"] == "start"]
    return {
        **found,
        "uncommitted_lines": changed,
        "nodes": view.status.get("nodes") or [],
        "ranks": starts[-1].get("ranks", [])[:64] if starts else [],
    }


def samples_of(view: View) -> list[dict[str, Any]]:
    """What the model said lately, at which step; of a step that came again, the last time."""
    said = {
        (event["step"], event.get("prompt")): event["text"]
        for event in view.events if event["event"] == "sample"
    }  # fmt: skip
    found = [{"step": step, "text": text} for (step, _), text in said.items()][-MOST_SAMPLES:]
    path = view.run.path / "sample.txt"
    if not found and path.exists():
        found = [{"step": view.step, "text": path.read_text(errors="replace").rstrip()}]
    return found
