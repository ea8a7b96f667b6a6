"""The attempts of a job: its shell asks here to begin one, and to end one.

Command line: ``python -m trainstack.job.attempts port|holder|submitted|begin|fail|finish ...``.
"""

import argparse
import contextlib
import json
import shutil
import socket
import sys
from pathlib import Path

from trainstack.checkpoint import names
from trainstack.errors import USAGE_ERROR
from trainstack.job import verdict
from trainstack.job.preflight import free_port
from trainstack.processes import tell
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, Owner, user
from trainstack.run.owner import claim_of
from trainstack.run.queue import NO_JOB, Job, read_queue
from trainstack.run.states import EXIT_CODES, NOT_SUBMITTED, STARTING, is_local_job, resume_command
from trainstack.storage import files

FOR_A_PERSON = {"NO_PROGRESS", "DIVERGED", "REFUSED"}  # states that no other job gets past


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.attempts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("port").add_argument("first", type=int)
    for name in ("holder", "submitted", "begin", "fail", "finish"):
        command = commands.add_parser(name)
        command.add_argument("run_folder", type=Path)
        command.add_argument("--job", default="")
        command.add_argument("--attempt", type=int, default=1)
        command.add_argument("--restarts", type=int, default=0, help="how often Slurm requeued it")
        command.add_argument("--code", type=int, default=0, help="of sbatch, srun or torchrun")
        command.add_argument("--stop-file", type=Path)
        command.add_argument("--taken-back", action="store_true", help="Slurm has the job again")
        command.add_argument("--preempted", action="store_true", help="Slurm wants its nodes")
        command.add_argument("--cause", default="", help="why it failed, or was refused")
        command.add_argument("--elsewhere", action="store_true", help="it may run on other nodes")
        command.add_argument("--chain", action="store_true", help="others wait behind this job")
        command.add_argument("--ending", action="store_true", help="the job ends: no restart")
    options = parser.parse_args(arguments)
    if options.command == "port":
        print(free_port(options.first))
        return 0
    run = RunFolder(options.run_folder)
    if options.command == "holder":
        print(gone_holder(run, options.job, read_queue(sys.stdin.read())))
        return 0
    if options.command == "submitted":
        note_submission(run, options.job, options.code, options.cause.strip())
        return 0
    if options.command == "begin":
        return begin(run, options.job, options.restarts, options.chain)
    if options.command == "fail":
        run.add_failure(
            options.job, options.attempt, "none", "FAILED", options.code or 1, options.cause, False,
            is_second_hand=True, is_elsewhere=options.elsewhere,
        )  # fmt: skip
        return 0
    owner = Owner(options.job, options.attempt, options.restarts)
    told = verdict.Told(
        options.code, options.stop_file, options.taken_back, options.preempted, options.ending
    )
    return finish(run, owner, told)


def note_submission(run: RunFolder, job: str, code: int, cause: str) -> None:
    """Record the job id; if sbatch refused, the status becomes what it was before."""
    if code == 0:
        run.add_event("submitted", job=job, user=user())
    else:
        run.add_event("not_submitted", cause=cause)
    if code and run.status_before.exists():  # of a chain, the first job
        former = json.loads(run.status_before.read_bytes())
        if former and former.get("state") != NOT_SUBMITTED:
            files.replace_file(run.path / "status.json", json.dumps(former).encode())
        else:
            run.set_status(
                NOT_SUBMITTED, cause=cause, next_action="fix the cause, then submit again"
            )
    run.status_before.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        files.unlink(claim_of(run))  # from here on the job itself tells


def begin(run: RunFolder, job: str, restarts: int, is_in_chain: bool) -> int:
    """Record a new attempt and print its number; if nothing is printed, the job ends by this code.

    Counted here, before anything can break, so that an attempt that Slurm killed counts as well.
    """
    status = run.status()
    state = status.get("state")
    if state == "DONE":
        say(run, f"complete: DONE at step {status.get('step', 0):,}; nothing to do")
        return 0
    needs_a_person = state in FOR_A_PERSON or status.get("exit_code") == USAGE_ERROR
    if is_in_chain and needs_a_person and status.get("job") != job:
        say(run, f"{state} in job {status.get('job')}: the rest of the chain does not continue")
        return EXIT_CODES[state] if state in FOR_A_PERSON else USAGE_ERROR
    own = verdict.attempts_of(run, job)
    if verdict.is_stuck(run, job):
        last = Owner(job, own[-1]["attempt"], restarts)
        code = EXIT_CODES["NO_PROGRESS"]
        stuck = verdict.Ending(verdict.END, code, "NO_PROGRESS", verdict.STUCK, status.get("step"))
        record(run, last, stuck)
        return code
    for former in run.meeting(job, 0).parent.glob(f"{job}.*"):
        shutil.rmtree(former, ignore_errors=True)
    # Restarts count too: an attempt may have died before it was recorded.
    attempt = max([restarts, *(event["attempt"] for event in own)]) + 1
    holder = Lease(run.path).unreleased()
    is_replaced = verdict.is_replaced(run, Owner(job, attempt, restarts))
    if holder is None or (holder["job"] == job and not is_replaced):  # else that status stays
        facts = dict.fromkeys(("cause", "exit_code", "next_action"))
        run.set_status(STARTING, job=job, attempt=attempt, **facts, **place(job))
    run.add_event("attempt", job=job, attempt=attempt, restarts=restarts,
                  newest=names.newest_checkpoint(run.checkpoints)[0],
                  reached=verdict.last_step(run))  # fmt: skip
    print(attempt)
    return 0


def gone_holder(run: RunFolder, job: str, jobs: dict[str, Job]) -> str:
    """The job that could not give the run folder back, if it has ended and is not ``job`` itself.

    One that Slurm does not show may be hidden, or of another cluster: its heartbeat tells.
    """
    holder = Lease(run.path).unreleased()
    if holder is None or holder["job"] == job or is_local_job(holder["job"]):
        return ""
    known = jobs.get(holder["job"], NO_JOB)
    is_gone = not known.is_started if known.state else not run.is_beating(holder["job"])
    return holder["job"] if is_gone else ""


def place(job: str) -> dict[str, str | int]:
    """Where a job without Slurm begins: its shell's host and pid, which its id has."""
    if not is_local_job(job):
        return {}
    return {"host": socket.gethostname(), "pid": int(job.rsplit("-", 2)[1])}


def finish(run: RunFolder, owner: Owner, told: verdict.Told) -> int:
    """Decide how an attempt ended, record it, print what follows; returns the job's exit code.

    Printed is ``restart`` (here, at once), ``requeue``, or ``end``.
    """
    ending = verdict.decide(run, owner, told)
    record(run, owner, ending)
    if told.is_preempted and run.status().get("state") == "PAUSED":
        run.add_event("preempted", job=owner.job, attempt=owner.attempt)
        run.set_status("PAUSED", cause="Slurm needed the nodes for another job")
    if ending.verdict == verdict.RESTART and verdict.is_false_stop(told.stop_file):
        told.stop_file.unlink()  # or the next attempt would stop at once
    print(ending.verdict)
    return ending.code


def record(run: RunFolder, owner: Owner, ending: verdict.Ending) -> None:
    """Write down how an attempt ended, and say it."""
    if ending.event:
        run.add_event(ending.event, **ending.facts)
    for line in ending.lines:
        say(run, line)
    if ending.state == "PAUSED":
        run.pause(owner.job, owner.attempt, ending.cause)
        say(run, f"PAUSED: {ending.cause}; resumes from {verdict.next_start(run)}")
    elif ending.state == "RESTARTING":
        run.set_status("RESTARTING", job=owner.job, attempt=owner.attempt, exit_code=None,
                       cause=ending.cause)  # fmt: skip
    elif ending.state is not None:
        conclude(run, owner, ending)


def conclude(run: RunFolder, owner: Owner, ending: verdict.Ending) -> None:
    """Write a final state and say it: at which step, why, what is safe, what to do."""
    fix = f"fix the cause, then: {resume_command(run.path.name, owner.job)}"
    run.set_status(
        ending.state, job=owner.job, attempt=owner.attempt, cause=ending.cause, next_action=fix,
        exit_code=ending.code,
    )  # fmt: skip
    facts = {"job": owner.job, "attempt": owner.attempt, "step": ending.step}
    run.add_event(ending.state.lower(), **facts, cause=ending.cause)
    _, newest = names.newest_checkpoint(run.checkpoints)
    kept, begins = "no checkpoint yet", "begins again at step 1"
    if newest:
        kept, begins = newest.name, f"resumes from {newest.name}"
    say(run, verdict.titled(ending.state, ending.step, ending.cause))
    say(run, f"kept: {kept}; logs: {run.logs}/{owner.job}.*; {fix}; it {begins}")


def say(run: RunFolder, text: str) -> None:
    tell(f"{run.path.name}: {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
