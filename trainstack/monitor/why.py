"""Why a run is as it is: what happened to whom, what it cost, what was done, and what helps.

By the run's own records, and by Slurm's words of its jobs while it still has them.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainstack.errors import USAGE_ERROR
from trainstack.history import attempts as history
from trainstack.history.attempts import Interruption
from trainstack.history.settings import changed_settings
from trainstack.job.blame import blame, host_of, place_of, ranks_of, telling_lines, witness
from trainstack.job.verdict import next_start, titled
from trainstack.monitor.drawing import cut, laid_out
from trainstack.monitor.health import health_of
from trainstack.monitor.view import LOST_CAUSES, View
from trainstack.resilience.kinds import MISTAKE, MORE, NO, UNKNOWN, WORKLOAD, Kind, kind_of
from trainstack.run import refusal
from trainstack.run.folder import RunFolder
from trainstack.run.lease import is_local_job
from trainstack.run.queue import NO_JOB, Job, meaning
from trainstack.run.states import EXIT_CODES, NOT_SUBMITTED, RESTARTING
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
DONE_ABOUT = {
    "SKIPPED": "left that update out",
    "SAVE_FAILED": "left that save out",
    "SLOW": "named it",
}
Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Told:
    """An interruption in words."""

    it: Interruption
    state: str
    cause: str
    at: str  # as records have it
    step: int | None
    host: str  # of the rank or the node to blame
    report: dict[str, Any] = field(default_factory=dict)  # of the rank to blame

    @property
    def is_passed(self) -> bool:
        return self.it.event.get("event") in history.PASSED

    @property
    def title(self) -> str:
        times = f" ({self.it.times} times in this attempt)" if self.it.times > 1 else ""
        if self.step is None:
            return f"{self.state}: {self.cause}{times}"
        return titled(self.state, self.step, self.cause) + times


def lines_of(view: View, jobs: Mapping[str, Job] | None = None) -> list[str]:
    """At most MOST_LINES: how the run is, what interrupted it last, what a person does now.

    ``jobs``: all that Slurm shows, for those of earlier attempts.
    """
    running = (view.status.get("job"), view.status.get("attempt"))
    is_lost = view.state in LOST_CAUSES
    found = history.interruptions(view.events, (None, None) if is_lost else running)
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
    so_far = f"; {counted(count, 'incident')} before, the last:" if count else ""
    return f"{text}; {'nothing is wrong' if is_well else f'{health.word}: {health.reason}'}{so_far}"


def is_bad(view: View) -> bool:
    """Whether the run neither trains nor is done, and nothing starts it by itself."""
    is_ended = view.state in EXIT_CODES and view.state != "DONE"
    return is_ended or view.state in (*LOST_CAUSES, NOT_SUBMITTED)


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
        return ["judged by the sum of all ranks, so none of them is named"]
    reports = run.failures(told.it.job, told.it.attempt)
    told_by, rank = [report["rank"] for report in reports], told.report.get("rank")
    silent = [f"rank {rank} did not report"] if told.report and rank not in told_by else []
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


# --- What followed


def after_rows(view: View, told: Told, job: Job, is_stuck: bool) -> Rows:
    """What it cost, what was done about it, whether trying again can help, what a person does.

    ``is_stuck``: the two interruptions before came at the same step.
    """
    yield "lost", cost_of(view, told)
    yield "then", answer_to(view, told)
    is_usage = view.status.get("exit_code") == USAGE_ERROR
    word = job.state if told.state == "KILLED" else ""  # a later job has continued it
    kind = kind_of(f"{told.state} {told.cause} {word}", MISTAKE if is_usage else UNKNOWN)
    is_said = "--exclude" in told.cause or is_local_job(told.it.job)  # which has no other node
    if is_said:
        parts = [part for part in kind.advice.split("; ") if "--exclude" not in part]
        kind = kind._replace(advice="; ".join(parts).replace(MORE, ""))
    has_repeated = told.state == "NO_PROGRESS" or "; twice, " in told.cause
    helps = NO if is_stuck or (has_repeated and kind.whose == WORKLOAD) else kind.helps
    helps += f", as three times at step {told.step:,}" if is_stuck else ""
    helps = "nothing failed" if told.state == "PAUSED" else helps
    helps = helps if is_bad(view) else "is tried now"
    if is_bad(view) and (
        changed := changed_settings(view.run.path, "optim", "guard", "checkpoint")
    ):
        values = {key: map(json.dumps, pair) for key, pair in changed.items()}
        texts = [f"{key}={own} (shipped: {was})" for key, (own, was) in values.items()]
        yield "settings", cut(", ".join(texts))
    is_past = told.is_passed and told.it.event not in view.slow_ranks  # which are slow now
    is_past |= bool(told.it.next("training")) or view.state == "DONE"
    lies = f"the run got past it; it lay with {kind.whose}"
    yield "retry", lies if is_past else f"{helps}; it lies with {kind.whose}"
    yield "do", action_of(view, kind, told.host, is_over=is_past or not is_bad(view))


def cost_of(view: View, told: Told) -> str:
    """Steps and seconds."""
    it, resumed = told.it, told.it.next("training")
    if told.is_passed:
        updates = f"the update of {counted(it.times, 'step')}, and no time"
        of_others = "no step, but time: each step waits for it"
        lost = {"SKIPPED": updates, "SLOW": of_others}
        return lost.get(told.state, "no step, and no time")
    is_saved, step = told.state == "PAUSED" and told.step is not None, told.step or view.step
    if not resumed and (told.state in ("REFUSED", NOT_SUBMITTED) or not step):
        return "no step"
    if not resumed:
        return f"resumes from {next_start(view.run, None if is_saved else step)}"
    seconds = age(seconds_of(resumed["at"]) - seconds_of(told.at))
    reached = it.next("attempt").get("reached") if told.step is None else told.step
    redone = None if reached is None else reached - resumed["step"]
    steps = f"{counted(redone, 'step')} redone" if redone and redone > 0 else "no step"
    if redone is None or redone < 0:
        steps = f"what was beyond step {resumed['step']:,}"
    return f"{steps}; {seconds} until it trained again"


def answer_to(view: View, told: Told) -> str:
    """What the toolkit did about it."""
    it, following, resume = told.it, told.it.next("attempt"), told.it.next("resume")
    if told.is_passed:
        return f"{DONE_ABOUT[told.state]}, and trained on"
    saved = "saved; " if told.state == "PAUSED" and told.step is not None else ""
    if not following:
        return saved + first_answer(view, told)
    how = f"job {following['job']} continued it"
    if following["job"] == it.job:
        how = "the job went back into the queue" if it.is_requeued else "restarted in place"
    if not resume:
        return f"{saved}{how}, from the beginning"
    how += f", from {resume['checkpoint']}"
    if resume["step"] < following.get("newest", 0):
        how += f", for checkpoint-{following['newest']} is damaged and was set aside"
    return saved + "; ".join([how, *resume.get("changes", [])])


def first_answer(view: View, told: Told) -> str:
    """The same, while no attempt has followed."""
    if told.state in (*LOST_CAUSES, "NODE_LOST"):
        return "nothing yet: nobody was left to restart it"
    if told.state == "PAUSED":
        return "the job is in the queue again" if view.job.is_live else "ended the job in order"
    if told.state in ("REFUSED", NOT_SUBMITTED):
        return "refused it; nothing was changed"
    if view.state == RESTARTING:
        return "restarts in place"
    return "ended the job, and did not restart it"


def action_of(view: View, kind: Kind, host: str, is_over: bool) -> str:
    """What a person does: by the kind of the cause, then the command."""
    advice, action = kind.advice.replace("NODE", host), view.next_action or ""
    if view.job.is_waiting:
        held = meaning(view.job.reason, view.job_id).partition(": ")[2] if view.job.is_held else ""
        return action or held or "nothing: Slurm starts it by itself"
    if view.state == "SUSPENDED":
        return f"if it was you: scontrol resume {view.job_id}; else Slurm does it"
    if is_over or not action:
        return f"nothing now; {advice}" if advice else "nothing"
    then = action.removeprefix("fix the cause, ")
    return f"{advice.removeprefix('if it comes again, ')}; {then}" if advice else action
