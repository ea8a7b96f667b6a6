"""Why a run is as it is: what happened to whom, what it cost, what was done, and what helps.

By the run's own records, and by Slurm's words of its jobs while it still has them.
"""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainstack.history.attempts import Interruption
from trainstack.job.blame import blame, host_of, place_of, ranks_of, telling_lines, witness
from trainstack.monitor.aftermath import Rows, Told, action_of, after_rows, is_bad
from trainstack.monitor.drawing import cut, laid_out
from trainstack.monitor.health import health_of
from trainstack.monitor.view import LOST_CAUSES, View
from trainstack.resilience.kinds import MISTAKE, kind_of
from trainstack.run import refusal
from trainstack.run.folder import RunFolder
from trainstack.run.queue import NO_JOB, Job
from trainstack.units import age, counted, seconds_of, time_of

MOST_LINES = 15
MOST_HOSTS = 3  # that are named
SHOWN = 5  # interruptions: the last is explained, the others named
LOG_LINES = 3
CAUSES = {  # of events that have none
    "preempted": "Slurm needed the nodes for another job",
    "node_lost": "a node failed, and Slurm took the job back",
}
STATES = {"preempted": "PAUSED", "skip": "SKIPPED", "slow_rank": "SLOW"}  # if not its name


def lines_of(view: View, jobs: Mapping[str, Job] | None = None) -> list[str]:
    """At most MOST_LINES: how the run is, what interrupted it last, what a person does now.

    ``jobs``: all that Slurm shows, for those of earlier attempts.
    """
    found = view.incidents
    lines = laid_out(("", head_of(view, len(found))))
    refused = [*refusal_rows(view.run)]
    if not found:
        return [*lines, *laid_out(*(refused or alone(view)))][:MOST_LINES]
    lines += laid_out(*((label, cut(text)) for label, text in refused[:1]))
    last, *former = [told_of(view, one) for one in found[: -SHOWN - 1 : -1]]
    job = (jobs or {}).get(last.it.job) or (view.job if view.job_id == last.it.job else NO_JOB)
    is_stuck = bool(last.step) and [one.step for one in former[:2]] == [last.step] * 2
    above = laid_out(*what_rows(view, last, job))
    below = laid_out(*after_rows(view, last, job, is_stuck))
    above = above[: MOST_LINES - len(lines) - len(below)]  # what to do is never cut off
    room = MOST_LINES - len(lines) - len(above) - len(below)
    logged = [("log", cut(text)) for text in log_lines(view.run, last)[:room]]
    lines += [*above, *laid_out(*logged), *below]
    before = laid_out(*(("before", f"{one.at[:19]}Z {one.title}") for one in former))
    if len(lines) + len(before) > MOST_LINES:
        before = laid_out(*(("before", cut(f"{one.at[:19]}Z {one.title}")) for one in former))
    return [*lines, *before][:MOST_LINES]


def head_of(view: View, count: int) -> str:
    """The state in one sentence, and whether anything is wrong with it."""
    total, health = f"/{view.max_steps:,}" if view.max_steps else "", health_of(view)
    text = f"{view.run.path.name}: {view.state}"
    text += f" at step {view.step:,}{total}" if view.step else ""
    if view.job.is_waiting:
        return f"{text}; job {view.job_id} waits, {view.job.reason}: {health.reason}"
    if is_bad(view):
        return text
    is_well = health.word in ("good", "done")
    so_far = f"; {'it got past ' * is_well}{counted(count, 'incident')}, the last:" if count else ""
    return f"{text}; {'nothing is wrong' if is_well else f'{health.word}: {health.reason}'}{so_far}"


def alone(view: View) -> Rows:
    """The rows of a run of which no attempt was interrupted."""
    kind = kind_of(view.cause or "")
    if view.cause and is_bad(view):
        yield "what", view.cause
        yield "retry", f"{kind.helps}; it lies with {kind.whose}"
    if is_bad(view) or view.job.is_waiting or view.state == "SUSPENDED":
        yield "do", action_of(view, kind, "NODE", is_over=not is_bad(view))


def refusal_rows(run: RunFolder) -> Rows:
    """What submit.sh refused last, if nothing happened in the run since."""
    if text := refusal.last(run):
        kind = kind_of(text, MISTAKE)
        yield "refused", text
        yield "retry", f"{kind.helps}; it lies with {kind.whose}"
        yield "do", kind.advice or "change what that line says, then submit again"


def lines_without_run(folder: Path) -> list[str]:
    """The same, of a run that is not there; empty if none was refused."""
    rows = [*refusal_rows(RunFolder(folder))]
    return laid_out(("", f"{folder.name}: there is no such run"), *rows) if rows else []


# --- What happened


def told_of(view: View, it: Interruption) -> Told:
    """An interruption in words."""
    report, event = blame(view.run, it.job, it.attempt) or {}, it.event
    name, following = event.get("event", ""), it.next("attempt")
    state, cause = STATES.get(name, name.upper()), event.get("cause") or CAUSES.get(name, "")
    at, step = event.get("at") or it.events[it.index]["at"], event.get("step")
    host = report.get("host", "NODE") if name != "slow_rank" else event["host"]
    if not event:
        state, cause = end_without_record(view, it, report)
        at = report.get("at", at)
    if name == "preempted":  # the pause before it has the step
        before = (e for e in reversed(it.events[: it.index]) if e["event"] == "paused")
        step = next(before, {}).get("step")
    elif name in ("", "node_lost") and state != "REFUSED":
        step = following.get("reached") if following else view.step
    if state == "NODE_LOST" and following:
        later = hosts_of(view.run, following["job"], following["attempt"])
        gone = ", ".join(sorted(hosts_of(view.run, it.job, it.attempt) - later)) if later else ""
        cause += f"; not among its nodes since: {gone}" if gone else ""
        host = gone or "NODE"
    cause = re.sub(r"^(torchrun got )?(SIG[A-Z0-9]+)$", r"asked to end by \2", cause)
    cause = cause.replace(f"{view.run.path.parents[1]}/", "")
    return Told(it, state, cause, at, step, host, report)


def end_without_record(view: View, it: Interruption, report: dict[str, Any]) -> tuple[str, str]:
    """State and cause of an attempt whose end nobody wrote down, by what came next."""
    if it.is_requeued:  # the job's shell was on that node
        return "NODE_LOST", CAUSES["node_lost"]
    is_of_rank = isinstance(report.get("rank"), int)
    who = f"rank {report['rank']} on {report['host']}: " if is_of_rank else ""
    told = [f"{who}{report['cause']}"] if report else []
    if view.state in LOST_CAUSES and not it.next("attempt"):
        return view.state, "; ".join([view.cause or "", *told])
    return (report["state"], *told) if report else ("KILLED", LOST_CAUSES["KILLED"])


def hosts_of(run: RunFolder, job: str, attempt: int) -> set[str]:
    return {host_of(line) for line in ranks_of(run, job, attempt)}


def what_rows(view: View, told: Told, job: Job) -> Rows:
    """What happened to whom, when, and how that is known."""
    yield "what", told.title
    it, hosts = told.it, sorted(hosts_of(view.run, told.it.job, told.it.attempt))
    more = f" and {len(hosts) - MOST_HOSTS} more" if len(hosts) > MOST_HOSTS else ""
    nodes = ", ".join(hosts[:MOST_HOSTS]) + more
    where = f"; job {it.job}, attempt {it.attempt}" * bool(it.job) + f" on {nodes}" * bool(nodes)
    yield "when", f"{told.at[:19]}Z, {age(time.time() - seconds_of(told.at))} ago{where}"
    if evidence := "; ".join([*reporters(view.run, told), *signs(view.run, told, job)]):
        yield "evidence", evidence
    if place := place_of(view.run, it.job, it.attempt, told.report):
        yield "where", place


def reporters(run: RunFolder, told: Told) -> list[str]:
    """Who told of the end of an attempt."""
    if told.state == "PAUSED" or told.is_passed:
        return []
    if told.state == "DIVERGED":
        return ["loss and gradient norm are of all ranks together: no rank is to blame"]
    reports = run.failures(told.it.job, told.it.attempt)
    told_by, rank = [report["rank"] for report in reports], told.report.get("rank")
    silent = [f"rank {rank} did not report"] if told.report and rank not in told_by else []
    if any(report["state"] == "HANG" for report in reports):  # what torchrun saw came after it
        reports = [report for report in reports if not report.get("is_second_hand")]
    return [*silent, *map(witness, reports[:3])]


def signs(run: RunFolder, told: Told, job: Job) -> Iterator[str]:
    """What Slurm says of the job, its last heartbeat if nobody told its end."""
    if job.state and not job.is_live and job.state not in ("COMPLETED", "FAILED"):
        reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
        yield f"Slurm says {job.state}{reason}"
    if told.state == "SLOW":
        found = run.evidence(told.it.job, told.it.attempt, told.it.event["rank"])
        yield found or "by the time of its own work in each step"
    silence = run.silence(told.it.job)
    if told.state in LOST_CAUSES and silence is not None and not told.it.next("attempt"):
        yield f"last heartbeat {time_of(time.time() - silence)[:19]}Z"


def log_lines(run: RunFolder, told: Told) -> list[str]:
    """What the logs say of its end beyond its cause, in a few lines."""
    home, rank = f"{run.path.parents[1]}/", told.report.get("rank")
    found = telling_lines(run, told.it.job, told.it.attempt, rank)
    new = [line.replace(home, "") for line in found if line.partition(": ")[2] not in told.cause]
    if told.state == "PAUSED":  # srun complains of every stop; Slurm may say why it asked
        new = [line for line in new if "DUE TO" in line][:1]
    return new[-LOG_LINES:]
