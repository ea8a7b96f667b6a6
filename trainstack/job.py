"""What train.slurm and submit.sh ask of Python: a port, a lease's holder, the end of a job.

Command line: ``python -m trainstack.job port|holder|submitted|finish ...``.
"""

import argparse
import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

from trainstack import files
from trainstack.runfolder import EXIT_CODES, Lease, RunFolder

MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
PORTS_TRIED = 50


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack.job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("port").add_argument("first", type=int)
    for name in ("holder", "submitted", "finish"):
        command = commands.add_parser(name)
        command.add_argument("run_folder", type=Path)
        command.add_argument("--job", default="")
        command.add_argument("--attempt", type=int, default=1)
        command.add_argument("--code", type=int, default=0)
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
    return finish(run, options.job, options.attempt, options.code)


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


def finish(run: RunFolder, job: str, attempt: int, code: int) -> int:
    """Say how the job ended, record it, and return its exit code.

    ``code`` is what srun or torchrun returned; it counts only where the ranks left no word.
    """
    status = run.status()
    is_ours = status.get("job") == job and status.get("attempt") == attempt
    if is_ours and status["state"] == "PAUSED" and is_stuck(run, job):
        cause = f"{MAX_ATTEMPTS_WITHOUT_PROGRESS} attempts without a newer checkpoint"
        return conclude(run, status, "NO_PROGRESS", EXIT_CODES["NO_PROGRESS"], cause)
    if is_ours and status["state"] in EXIT_CODES:
        return EXIT_CODES[status["state"]]
    failure = next(iter(run.failures(job, attempt)), None)
    if failure is None:
        cause = f"the processes ended with code {code} and left no word (killed, out of memory?)"
        state, exit_code = "FAILED", EXIT_CODES["FAILED"]
    else:
        cause = f"rank {failure['rank']} on {failure['host']}: {failure['cause']}"
        state, exit_code = failure["state"], failure["exit_code"]
    if not is_ours and Lease(run.path).holder()[1] and exit_code == EXIT_CODES["REFUSED"]:
        say(run, f"REFUSED: {cause}")  # the status belongs to the job that holds the run
        return exit_code
    return conclude(run, {**status, "job": job, "attempt": attempt}, state, exit_code, cause)


def conclude(run: RunFolder, status: dict[str, Any], state: str, code: int, cause: str) -> int:
    """Write the final state and say it: where, why, what is safe, what to do."""
    action = "mend the cause, then the same bash submit.sh goes on from there"
    run.set_status(
        state, job=status["job"], attempt=status["attempt"], exit_code=code, cause=cause,
        next_action=action,
    )  # fmt: skip
    run.add_event(state.lower(), job=status["job"], step=status.get("step"), cause=cause)
    kept = status.get("checkpoint") or "no checkpoint yet"
    say(run, f"{state} at step {status.get('step', 0):,}: {cause}")
    say(run, f"kept: {kept}; logs: {run.logs}/{status['job']}.*; {action}")
    return code


def say(run: RunFolder, text: str) -> None:
    print(f"{run.path.name}: {text}", file=sys.stderr, flush=True)


def is_stuck(run: RunFolder, job: str) -> bool:
    """Whether the last attempts of a job all ended without a newer checkpoint."""
    starts, best = 0, -1
    for event in run.events():
        if event["event"] == "start" and event.get("job") == job:
            starts += 1
        elif event["event"] == "checkpoint" and event["step"] > best:
            starts, best = 0, event["step"]
    return starts >= MAX_ATTEMPTS_WITHOUT_PROGRESS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
