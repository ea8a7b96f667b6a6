"""What train.slurm and submit.sh ask of Python: a port, a lease's holder, how an attempt ended.

Command line: ``python -m trainstack.job.attempts port|holder|submitted|begin|finish ...``.
"""

import argparse
import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

from trainstack.checkpoint import names
from trainstack.errors import USAGE_ERROR
from trainstack.job.blame import first_failure, ranks_of, without_word
from trainstack.run.folder import TORCHRUN_GOT, RunFolder
from trainstack.run.lease import Lease
from trainstack.run.states import EXIT_CODES
from trainstack.storage import files

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
STUCK = f"{MAX_ATTEMPTS_WITHOUT_PROGRESS} attempts without a newer checkpoint"
RESTARTING = {"FAILED", "HANG"}  # states that another attempt may get past
ENDING = {"NO_PROGRESS", "DIVERGED", "REFUSED"}  # states that a person has to look at
PORTS_TRIED = 50


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.attempts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("port").add_argument("first", type=int)
    for name in ("holder", "submitted", "begin", "finish"):
        command = commands.add_parser(name)
        command.add_argument("run_folder", type=Path)
        command.add_argument("--job", default="")
        command.add_argument("--attempt", type=int, default=1)
        command.add_argument("--restarts", type=int, default=0, help="how often Slurm requeued it")
        command.add_argument("--code", type=int, default=0)
        command.add_argument("--stop-file", type=Path)
        command.add_argument("--taken-back", action="store_true", help="Slurm has the job again")
        command.add_argument("--chain", action="store_true", help="others wait behind this job")
        command.add_argument("--ending", action="store_true", help="the job ends: no restart")
    options = parser.parse_args(arguments)
    if options.command == "port":
        print(free_port(options.first))
        return 0
    run = RunFolder(options.run_folder)
    if options.command == "holder":
        print(unreleased_holder(run))
        return 0
    if options.command == "submitted":
        note_submission(run, options.job, options.code)
        return 0
    if options.command == "begin":
        return begin(run, options)
    return finish(run, options)


def begin(run: RunFolder, options: argparse.Namespace) -> int:
    """Record a new attempt and print its number; with nothing printed, the job ends with this code.

    Counted here, before anything can break, so that a life that Slurm killed counts as well.
    """
    status = run.status()
    state = status.get("state")
    if state == "DONE":
        say(run, f"complete: DONE at step {status.get('step', 0):,}; nothing to do")
        return 0
    needs_a_person = state in ENDING or status.get("exit_code") == USAGE_ERROR
    if options.chain and needs_a_person and status.get("job") != options.job:
        say(run, f"{state} in job {status.get('job')}: the rest of the chain does not go on")
        return EXIT_CODES[state] if state in ENDING else USAGE_ERROR
    own = [e for e in run.events() if e["event"] == "attempt" and e["job"] == options.job]
    if is_stuck(run, options.job):
        attempt = own[-1]["attempt"]
        conclude(run, {**status, "job": options.job, "attempt": attempt}, "NO_PROGRESS", STUCK)
        return EXIT_CODES["NO_PROGRESS"]
    attempt = max([options.restarts, *(event["attempt"] for event in own)]) + 1
    run.add_event("attempt", job=options.job, attempt=attempt, restarts=options.restarts,
                  newest=names.newest_checkpoint(run.checkpoints)[0])  # fmt: skip
    print(attempt)
    return 0


def free_port(first: int) -> int:
    """The first port from ``first`` on that nothing on this host listens at."""
    for port in range(first, first + PORTS_TRIED):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as probe:
            probe.bind(("", port))
            return port
    raise SystemExit(f"train.slurm: error: no free port in {first}..{port}; set MASTER_PORT")


def unreleased_holder(run: RunFolder) -> str:
    """The job that last took the run folder and did not give it back; empty where none."""
    _, holder = Lease(run.path).holder()
    return "" if not holder or holder.get("released") else holder["job"]


def note_submission(run: RunFolder, job: str, code: int) -> None:
    """Record the job id; where sbatch refused, the status goes back to what it was."""
    before = run.path / ".status.before"
    if code == 0:
        run.add_event("submitted", job=job)
    elif before.exists():
        former = json.loads(before.read_bytes())
        if former:
            files.replace_file(run.path / "status.json", json.dumps(former).encode())
        else:
            (run.path / "status.json").unlink(missing_ok=True)
    before.unlink(missing_ok=True)


def finish(run: RunFolder, options: argparse.Namespace) -> int:
    """Say how an attempt ended, record it, print what follows, and return the job's exit code.

    Printed is ``restart`` (here, at once), ``requeue``, or ``end``. ``code`` is what srun or
    torchrun returned; it counts only where the ranks left no word.
    """
    job, attempt, status = options.job, options.attempt, run.status()
    is_ours = status.get("job") == job and status.get("attempt") == attempt
    if is_ours and status["state"] == "PAUSED" and is_stuck(run, job):
        conclude(run, status, "NO_PROGRESS", f"{STUCK}; the last one was paused: {status['cause']}")
        print("end")
        return EXIT_CODES["NO_PROGRESS"]
    if is_ours and status["state"] in EXIT_CODES:
        print("requeue" if status["state"] == "PAUSED" else "end")
        return EXIT_CODES[status["state"]]
    if is_replaced(run, options):
        say(run, f"REFUSED: attempt {attempt} of job {job} goes on elsewhere, or another job does")
        print("end")
        return EXIT_CODES["REFUSED"]
    if options.taken_back:
        say(run, f"Slurm took the job back, a node failed; goes on from "
                 f"{next_start(run, last_step(run))}")  # fmt: skip
        run.add_event("node_lost", job=job, attempt=attempt)
        print("end")
        return EXIT_CODES["FAILED"]
    failure = first_failure(run, job, attempt)
    is_early = not any(e["event"] == "training" for e in events_of(run, job, attempt))
    is_only_victim = failure is None or failure["is_victim"]
    if is_early and is_only_victim and options.stop_file and options.stop_file.exists():
        pause_without_save(run, options)
        print("requeue")
        return EXIT_CODES["PAUSED"]
    return finish_failed(run, options, failure or without_word(run, options), is_ours)


def finish_failed(
    run: RunFolder, options: argparse.Namespace, failure: dict[str, Any], is_ours: bool
) -> int:
    """The second half of ``finish``: what follows from an account of failure."""
    is_of_rank = not isinstance(failure["rank"], str)
    who = f"rank {failure['rank']} on {failure['host']}: " if is_of_rank else ""
    state, code, cause = failure["state"], failure["exit_code"], who + failure["cause"]
    if not is_ours and Lease(run.path).holder()[1] and code == EXIT_CODES["REFUSED"]:
        say(run, f"REFUSED: {cause}")  # the status belongs to the job that holds the run
        print("end")
        return code
    facts = {"job": options.job, "attempt": options.attempt, "step": last_step(run)}
    status = {**run.status(), **facts}
    is_passing = (state in RESTARTING and code != USAGE_ERROR) or failure.get("is_rollback")
    if is_passing and not options.ending:
        forget_false_stop(options.stop_file)
        if options.stop_file and options.stop_file.exists():  # another life would have to stop too
            say(run, f"{state} at step {status['step']:,}: {cause}")
            pause_without_save(run, options)
            print("requeue")
            return EXIT_CODES["PAUSED"]
        return go_on_after(run, status, state, code, cause, failure)
    conclude(run, status, state, cause, code)
    print("end")
    return code


def forget_false_stop(stop_file: Path | None) -> None:
    """Drop a stop file that only says that srun ended the other nodes, since one had failed.

    If Slurm wants the job to end as well, train.slurm itself hears of it.
    """
    if stop_file and stop_file.exists() and stop_file.read_text().startswith(TORCHRUN_GOT):
        stop_file.unlink()


def events_of(run: RunFolder, job: str, attempt: int) -> list[dict[str, Any]]:
    """The events since an attempt began."""
    events = run.events()
    begun = [n for n, e in enumerate(events) if e["event"] == "attempt"
             and (e["job"], e["attempt"]) == (job, attempt)]  # fmt: skip
    return events[begun[-1] :] if begun else []


def is_replaced(run: RunFolder, options: argparse.Namespace) -> bool:
    """Whether another life owns the run by now: of this job, requeued by Slurm, or of another.

    A node that Slurm lost may live on, and this shell with it: status and restarts are not its any
    more.
    """
    _, holder = Lease(run.path).holder()
    if not holder:
        return False
    if holder["job"] == options.job:
        theirs = (holder.get("restarts", 0), holder["attempt"])
        return theirs > (options.restarts, options.attempt)
    return bool(ranks_of(run, options.job, options.attempt))  # it was ours once


def go_on_after(
    run: RunFolder, status: dict[str, Any], state: str, code: int, cause: str, failure: dict
) -> int:
    """A failure that another attempt may get past: here and now, unless it goes on like this."""
    job = status["job"]
    run.add_event(state.lower(), job=job, attempt=status["attempt"], cause=cause,
                  step=status["step"], rank=failure["rank"])  # fmt: skip
    say(run, f"{state} at step {status['step']:,}: {cause}")
    for line in failure.get("traceback") or []:
        say(run, f"  {line}")
    if is_stuck(run, job):
        conclude(run, status, "NO_PROGRESS", f"{STUCK}; the last one: {cause}")
        print("end")
        return EXIT_CODES["NO_PROGRESS"]
    say(run, f"restarting in place from {next_start(run, status['step'])} "
             f"(attempt {status['attempt']} ended; {MAX_ATTEMPTS_WITHOUT_PROGRESS} without a newer "
             "checkpoint would end the job)")  # fmt: skip
    run.set_status("RESTARTING", job=job, attempt=status["attempt"], exit_code=None, cause=cause)
    print("restart")
    return code


def next_start(run: RunFolder, step: int) -> str:
    """Where the next attempt begins, and what that costs a run that had come to ``step``."""
    from_step, newest = names.newest_checkpoint(run.checkpoints)
    redo = step - from_step
    again = f"{redo:,} steps to redo" if redo > 0 else "nothing to redo"
    return f"{newest.name if newest else 'the beginning'}: {again}"


def pause_without_save(run: RunFolder, options: argparse.Namespace) -> None:
    """The job was asked to end, and its ranks were gone before they could save, or even begin."""
    reason = options.stop_file.read_text().strip()
    has_begun = ranks_of(run, options.job, options.attempt)
    cause = f"{reason}, before {'the ranks had saved' if has_begun else 'training began'}"
    run.pause(options.job, options.attempt, cause)
    say(run, f"PAUSED: {cause}; goes on from {next_start(run, last_step(run))}")


def last_step(run: RunFolder) -> int:
    """The last step that is known: by the status, which is seconds old, or the last log line."""
    step = run.status().get("step") or 0
    with contextlib.suppress(OSError), (run.path / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - (1 << 14)))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut at either end
                step = max(step, json.loads(line)["step"])
    return step


def conclude(
    run: RunFolder, status: dict[str, Any], state: str, cause: str, code: int | None = None
) -> None:
    """Write the final state and say it: where, why, what is safe, what to do."""
    action = "mend the cause, then the same bash submit.sh goes on from there"
    run.set_status(
        state, job=status["job"], attempt=status["attempt"], cause=cause, next_action=action,
        exit_code=EXIT_CODES[state] if code is None else code,
    )  # fmt: skip
    run.add_event(state.lower(), job=status["job"], step=status.get("step"), cause=cause)
    _, newest = names.newest_checkpoint(run.checkpoints)
    kept = newest.name if newest else "no checkpoint yet"
    say(run, f"{state} at step {status.get('step', 0):,}: {cause}")
    say(run, f"kept: {kept}; logs: {run.logs}/{status['job']}.*; {action}")


def say(run: RunFolder, text: str) -> None:
    print(f"{run.path.name}: {text}", file=sys.stderr, flush=True)


def is_stuck(run: RunFolder, job: str) -> bool:
    """Whether the last attempts of a job all ended without a newer checkpoint, in whatever way."""
    own = [e for e in run.events() if e["event"] == "attempt" and e["job"] == job]
    if len(own) < MAX_ATTEMPTS_WITHOUT_PROGRESS:
        return False
    last = own[-MAX_ATTEMPTS_WITHOUT_PROGRESS:]
    newest, _ = names.newest_checkpoint(run.checkpoints)
    return newest <= min(event["newest"] for event in last)  # a damaged one was newer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
