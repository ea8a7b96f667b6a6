"""Why a run is as it is: what happened to whom, what it cost, what was done, and what helps.

By the run's own records, and by Slurm's words of its jobs while it still has them.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import shorten, wrap
from typing import Any

from trainstack.errors import USAGE_ERROR, without_secrets
from trainstack.job.blame import blame, host_of, place_of, ranks_of, witness
from trainstack.job.verdict import next_start, titled
from trainstack.monitor import history
from trainstack.monitor.history import Interruption
from trainstack.monitor.view import LOST_CAUSES, View
from trainstack.resilience.kinds import MISTAKE, NO, UNKNOWN, WORKLOAD, Kind, kind_of
from trainstack.run import refusal
from trainstack.run.folder import RunFolder, tail_of
from trainstack.run.queue import NO_JOB, Job, meaning
from trainstack.run.states import EXIT_CODES, NOT_SUBMITTED
from trainstack.units import age, counted, seconds_of, time_of

MOST_LINES, WIDTH = 15, 110
MOST_TEXT = 300  # characters of a row: three lines
SHOWN = 5  # interruptions: the last is explained, the others named
TAIL_BYTES = 1 << 16  # of a log
LOG_LINES = 3
CAUSES = {  # of events that have none
    "preempted": "Slurm needed the nodes for another job",
    "node_lost": "a node failed, and Slurm took the job back",
}
STATES = {"preempted": "PAUSED", "skip": "SKIPPED"}  # of an event, if it is not its name
TELLING = re.compile(
    r"^[\w.]+(Error|Exception)\b|\berror:|CANCELLED|oom.kill|[Oo]ut of memory|is damaged"
    r"|No space|quota|NCCL WARN|Xid"
)
REPEATED = re.compile(
    r"launch: |srun: .*Exited|train\.slurm: |\S+: [A-Z_]+ at step |HANG "
)  # what events say too
STAMP = re.compile(
    r"^\S+ \S+ rank \d+ |^\[rank \d+\] |^slurmstepd\S* error: "
)  # of a line of a log
Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Told:
    """An interruption in words."""

    it: Interruption
    state: str
    cause: str
    at: str  # as records have it
    step: int | None
    report: dict[str, Any] = field(default_factory=dict)  # of the rank to blame

    @property
    def is_passed(self) -> bool:
        return self.it.event.get("event") in history.PASSED

    @property
    def title(self) -> str:
        times = f" ({self.it.times} times in this attempt)" if self.it.times > 1 else ""
        is_known = self.step is not None
        text = (
            titled(self.state, self.step, self.cause) if is_known else f"{self.state}: {self.cause}"
        )
        return text + times


def lines_of(view: View, jobs: Mapping[str, Job] | None = None) -> list[str]:
    """At most MOST_LINES: how the run is, what interrupted it last, what a person does now.

    ``jobs``: all that Slurm shows, for those of earlier attempts.
    """
    running = (view.status.get("job"), view.status.get("attempt"))
    is_lost = view.state in LOST_CAUSES
    found = history.interruptions(view.events, (None, None) if is_lost else running)
    lines = laid_out(("", head_of(view, len(found))))
    refused = [*refusal_rows(view.run)]
    if refused or not found:
        return [*lines, *laid_out(*(refused or alone(view)))][:MOST_LINES]
    last, *former = [told_of(view, one) for one in found[: -SHOWN - 1 : -1]]
    job = (jobs or {}).get(last.it.job) or (view.job if view.job_id == last.it.job else NO_JOB)
    above, below = laid_out(*what_rows(view, last, job)), laid_out(*after_rows(view, last))
    room = max(0, MOST_LINES - len(lines) - len(above) - len(below))
    logged = [in_one_line("log", text) for text in log_lines(view.run, last)[:room]]
    lines += [*above, *logged, *below]
    before = [("before", f"{one.at[:19]}Z {one.title}") for one in former]
    whole = laid_out(*before)
    is_room = len(lines) + len(whole) <= MOST_LINES
    return [*lines, *(whole if is_room else (in_one_line(*row) for row in before))][:MOST_LINES]


def laid_out(*rows: tuple[str, str]) -> list[str]:
    """Rows of a label and a text in lines of at most WIDTH; without a label it is a title."""
    lines = []
    for label, text in rows:
        text = without_secrets(shorten(text, MOST_TEXT, placeholder=" ..."))
        parts = wrap(text, WIDTH - 12, break_on_hyphens=False) or [""]
        lines.append(f"  {label:<10}{parts[0]}" if label else parts[0])
        lines += [" " * 12 + part for part in parts[1:]]
    return lines


def in_one_line(label: str, text: str) -> str:
    return laid_out((label, shorten(text, WIDTH - 12, placeholder=" ...")))[0]


def head_of(view: View, count: int) -> str:
    """The state in one sentence, and whether anything is wrong with it."""
    total = f"/{view.max_steps:,}" if view.max_steps else ""
    text = f"{view.run.path.name}: {view.state}"
    text += f" at step {view.step:,}{total}" if view.step else ""
    if view.job.is_waiting:
        known = view.job.start[:1].isdigit()
        start = f"; Slurm expects to start it at {view.job.start}" if known else ""
        return f"{text}; job {view.job_id} waits: {meaning(view.job.reason, view.job_id)}{start}"
    if view.state == "SUSPENDED":
        return f"{text}; Slurm stopped job {view.job_id} as a whole, and nothing of it hangs"
    if is_bad(view):
        return text
    so_far = f"; {counted(count, 'interruption')} before, the last:" if count else ""
    return f"{text}; nothing is wrong{so_far}"


def is_bad(view: View) -> bool:
    """Whether the run neither trains nor is done, and nothing starts it by itself."""
    is_ended = view.state in EXIT_CODES and view.state != "DONE"
    return is_ended or view.state in (*LOST_CAUSES, NOT_SUBMITTED)


def alone(view: View) -> Rows:
    """The rows of a run of which no attempt was interrupted."""
    kind = kind_of(view.cause or "")
    if view.cause and is_bad(view):
        yield "what", view.cause
        yield "again", f"{kind.helps}; it lies with {kind.whose}"
    if is_bad(view) or view.job.is_waiting or view.state == "SUSPENDED":
        yield "do", action_of(view, kind, "NODE", is_over=not is_bad(view))


def refusal_rows(run: RunFolder) -> Rows:
    """What submit.sh refused last, if nothing happened in the run since."""
    if text := refusal.last(run):
        kind = kind_of(text, MISTAKE)
        yield "refused", text
        yield "again", f"{kind.helps}; it lies with {kind.whose}"
        yield "do", kind.advice or "change what that line says, then submit again"


def lines_without_run(run: RunFolder) -> list[str]:
    """The same, of a run that is not there; empty if none was refused."""
    rows = [*refusal_rows(run)]
    return laid_out(("", f"{run.path.name}: there is no such run"), *rows) if rows else []


# --- What happened


def told_of(view: View, it: Interruption) -> Told:
    """An interruption in words; if its end is not on record, by the reports and what came next."""
    report, event = blame(view.run, it.job, it.attempt) or {}, it.event
    name, following = event.get("event", ""), it.next("attempt")
    state, cause = STATES.get(name, name.upper()), event.get("cause") or CAUSES.get(name, "")
    at, step = event.get("at") or it.events[it.index]["at"], event.get("step")
    if name == "preempted":  # the pause before it has the step
        before = (e for e in reversed(it.events[: it.index]) if e["event"] == "paused")
        step = next(before, {}).get("step")
    if not event:
        state, cause, at = "KILLED", LOST_CAUSES["KILLED"], report.get("at", at)
        step = following.get("reached") if following else view.step
        if report:
            step = None if report["state"] == "REFUSED" and not it.is_requeued else step
            is_of_rank = isinstance(report["rank"], int)
            state, cause = report["state"], report["cause"]
            cause = f"rank {report['rank']} on {report['host']}: {cause}" if is_of_rank else cause
        elif it.is_requeued:
            state, cause = "NODE_LOST", CAUSES["node_lost"]
        elif not following and view.cause:
            state, cause = view.state, view.cause
    if it.is_requeued and state in ("NODE_LOST", "REFUSED"):
        later = hosts_of(view.run, following["job"], following["attempt"])
        gone = sorted(hosts_of(view.run, it.job, it.attempt) - later)
        cause += f"; not among its nodes since: {', '.join(gone)}" if gone and later else ""
    cause = re.sub(r"^(torchrun got )?(SIG[A-Z0-9]+)$", r"asked to end by \2", cause)
    if state == "DIVERGED":  # of all ranks alike; one of them told
        cause = re.sub(r"^rank \d+ on \S+: ", "", cause)
    return Told(it, state, cause.replace(home_of(view.run), ""), at, step, report)


def home_of(run: RunFolder) -> str:
    """How long paths begin, which need not be read."""
    return f"{run.path.parents[1]}/"


def hosts_of(run: RunFolder, job: str, attempt: int) -> set[str]:
    return {host_of(line) for line in ranks_of(run, job, attempt)}


def what_rows(view: View, told: Told, job: Job) -> Rows:
    """What happened to whom, when, and how that is known."""
    yield "what", told.title
    it, nodes = told.it, ", ".join(sorted(hosts_of(view.run, told.it.job, told.it.attempt)))
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
    is_silent = told.report and told.report["rank"] not in [report["rank"] for report in reports]
    silent = [f"rank {told.report['rank']} did not report"] if is_silent else []
    return [*silent, *map(witness, reports[:3])]


def signs(run: RunFolder, told: Told, job: Job) -> Iterator[str]:
    """What Slurm says of the job, its last heartbeat if nobody told its end."""
    if job.state and not job.is_live and job.state not in ("COMPLETED", "FAILED"):
        reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
        yield f"Slurm says {job.state}{reason}"
    silence = run.silence(told.it.job)
    if told.state in ("KILLED", "LOST", "NODE_LOST") and silence is not None:
        yield f"last heartbeat {time_of(time.time() - silence)[:19]}Z"


def log_lines(run: RunFolder, told: Told) -> list[str]:
    """The lines that tell something of its end, in the log of its rank, else in that of its job."""
    job, attempt, rank = told.it.job, told.it.attempt, told.report.get("rank")
    paths = [run.rank_log(job, attempt, rank)] if isinstance(rank, int) else []
    for path in (*paths, run.logs / f"{job}.out"):
        text = tail_of(path, TAIL_BYTES)
        if path.suffix == ".out":  # it has all attempts of the job
            text = text.rpartition(f"job {job}, attempt {attempt} on ")[2]
            text = text.partition(f"job {job}, attempt {attempt + 1} on ")[0]
        lines = [STAMP.sub("", line).strip() for line in text.splitlines()]
        found = [line for line in lines if TELLING.search(line) and not REPEATED.match(line)]
        if told.state == "PAUSED":  # srun complains of every stop; Slurm may say why it asked
            found = [line for line in found if "DUE TO" in line][:1]
        if new := [line for line in dict.fromkeys(found) if line not in told.cause]:
            shown = (line.replace(home_of(run), "") for line in new[-LOG_LINES:])
            return [f"{path.name}: {line}" for line in shown]
    return []


# --- What followed


def after_rows(view: View, told: Told) -> Rows:
    """What it cost, what was done about it, whether trying again can help, what a person does."""
    yield "lost", cost_of(view, told)
    yield "then", answer_to(view, told)
    is_usage = view.status.get("exit_code") == USAGE_ERROR
    kind = kind_of(f"{told.state} {told.cause}", MISTAKE if is_usage else UNKNOWN)
    is_over = told.is_passed or bool(told.it.next("training")) or not is_bad(view)
    has_repeated = told.state == "NO_PROGRESS" or "; twice, " in told.cause
    helps = NO if has_repeated and kind.whose == WORKLOAD else kind.helps
    helps = "nothing failed" if told.state == "PAUSED" else helps
    lies = f"the run got past it; it lay with {kind.whose}"
    yield "again", lies if is_over else f"{helps}; it lies with {kind.whose}"
    yield "do", action_of(view, kind, told.report.get("host", "NODE"), is_over)


def cost_of(view: View, told: Told) -> str:
    """Steps and seconds."""
    resumed = told.it.next("training")
    if told.is_passed:
        updates = f"the update of {counted(told.it.times, 'step')}"
        return f"{updates if told.state == 'SKIPPED' else 'no step'}, and no time"
    if not resumed and (told.state in ("REFUSED", NOT_SUBMITTED) or not (told.step or view.step)):
        return "no step"
    is_saved = told.state == "PAUSED" and told.step is not None
    if not resumed:
        return f"resumes from {next_start(view.run, None if is_saved else told.step or view.step)}"
    seconds = age(seconds_of(resumed["at"]) - seconds_of(told.at))
    redone = max(0, (told.step or 0) - resumed["step"])
    steps = f"{counted(redone, 'step')} made again" if redone else "no step"
    if told.step is None and not is_saved:
        steps = f"what was beyond step {resumed['step']:,}"
    return f"{steps}; {seconds} until it trained again"


def answer_to(view: View, told: Told) -> str:
    """What the toolkit did about it."""
    it, following, resume = told.it, told.it.next("attempt"), told.it.next("resume")
    if told.is_passed:
        is_update = told.state == "SKIPPED"
        return f"left that {'update' if is_update else 'save'} out, and trained on"
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
    is_live = view.state == "RESTARTING"
    return "restarts in place" if is_live else "ended the job: another attempt would end alike"


def action_of(view: View, kind: Kind, host: str, is_over: bool) -> str:
    """What a person does: by the kind of the cause, then the command."""
    advice, action = kind.advice.replace("NODE", host), view.next_action or ""
    if view.job.is_waiting:
        held = meaning(view.job.reason, view.job_id).partition(": ")[2] if view.job.is_held else ""
        return action or held or "nothing: Slurm starts it by itself"
    if view.state == "SUSPENDED":
        return f"if it was you: scontrol resume {view.job_id}; else Slurm does it"
    if not is_over:
        advice = advice.removeprefix("if it comes again, ")
    if is_over or not action:
        return f"nothing now; {advice}" if advice else "nothing"
    return f"{advice}; {action.removeprefix('fix the cause, ')}" if advice else action
