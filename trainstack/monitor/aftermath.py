"""What followed an incident: what it cost, what was done about it, and what a person does."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainstack.errors import USAGE_ERROR
from trainstack.history import attempts as history
from trainstack.history.attempts import Interruption
from trainstack.history.settings import changed_settings, settings_of
from trainstack.job.verdict import next_start, titled
from trainstack.monitor.drawing import cut
from trainstack.monitor.view import LOST_CAUSES, View
from trainstack.resilience.kinds import MISTAKE, MORE, NO, UNKNOWN, WORKLOAD, Kind, kind_of
from trainstack.run.queue import Job, meaning
from trainstack.run.states import EXIT_CODES, NOT_SUBMITTED, RESTARTING, is_local_job
from trainstack.units import age, counted, seconds_of

Rows = Iterator[tuple[str, str]]
DONE_ABOUT = {
    "SKIPPED": "left that update out",
    "SAVE_FAILED": "left that save out",
    "SLOW": "named it",
}


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


def is_bad(view: View) -> bool:
    """Whether the run neither trains nor is done, and nothing starts it by itself."""
    is_ended = view.state in EXIT_CODES and view.state != "DONE"
    return is_ended or view.state in (*LOST_CAUSES, NOT_SUBMITTED)


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
    helps += f", as three times near step {told.step:,}" if is_stuck else ""
    if is_stuck:
        who = f"rank {told.report['rank']}" if told.report else "the ranks"
        advice = f"look at what comes near step {told.step:,}, and at the logs of {who}: "
        kind = kind._replace(advice=advice + log_of(view, told))
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


def log_of(view: View, told: Told) -> str:
    """Where the rank to blame wrote, and where its stacks lie."""
    rank = told.report.get("rank", 0)
    return f"{view.run.rank_log(told.it.job, told.it.attempt, rank).with_suffix('')}.*"


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
    if not resumed and view.spoiled_loss and view.state == "DIVERGED":
        return "all since the loss left its range: the newest checkpoint is not good either"
    if not resumed:
        saved = settings_of(view.run.path / "config.yaml").get("checkpoint.save_steps")
        none = (
            f"; none was saved yet (checkpoint.save_steps={saved})" if not view.checkpoint else ""
        )
        return f"resumes from {next_start(view.run, None if is_saved else step)}{none}"
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
