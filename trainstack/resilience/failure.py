"""What a rank leaves when it fails: a line for people, an account for the job's shell, a code."""

import contextlib
import logging
import sys
import time
import traceback

from trainstack import distributed
from trainstack.checkpoint import names
from trainstack.errors import ConfigError
from trainstack.resilience.guard import Diverged
from trainstack.run.folder import RunFolder
from trainstack.run.states import EXIT_CODES

log = logging.getLogger("trainstack")
STATES = {code: state for state, code in EXIT_CODES.items()}


def explain(error: BaseException, run: RunFolder | None, job: str | None, attempt: int) -> int:
    """Say what went wrong and leave this rank's account of it; the exit code."""
    is_main = distributed.rank_of_process() == 0
    if isinstance(error, ConfigError):
        if is_main:
            print(error.report("train.py"), file=sys.stderr, flush=True)
        state = STATES.get(error.code, "FAILED")
        text = " ".join(error.problems)
        record_failure(run, job, attempt, state, error.code, text, is_victim=not is_main)
        linger(is_main)
        return error.code
    if isinstance(error, Diverged):
        if is_main:
            text = roll_back(run, error) if error.is_rollback else str(error)
            log.error("DIVERGED at %s", text)
        record_failure(
            run, job, attempt, "DIVERGED", EXIT_CODES["DIVERGED"], text if is_main else str(error),
            is_victim=not is_main, is_rollback=error.is_rollback,
        )  # fmt: skip
        linger(is_main)
        return EXIT_CODES["DIVERGED"]
    lines = traceback.format_exception(error)
    what = str(error).splitlines()[0] if str(error) else ""
    is_victim = distributed.is_peer_lost(error)
    if is_victim:  # its traceback would only hide the one that matters
        log.error("lost a peer (%s)", what[:160])
    else:
        log.error("%s", "".join(lines))
    kind = type(error).__name__
    cause = f"{'out of GPU memory' if kind == 'OutOfMemoryError' else kind}: {what}"
    tail = "".join(lines[-3:]).splitlines()[-8:]
    code = EXIT_CODES["FAILED"]
    record_failure(run, job, attempt, "FAILED", code, cause, is_victim=is_victim, traceback=tail)
    linger(not is_victim)
    return code


def linger(is_first: bool) -> None:
    """Who is not the first to know leaves later: the first to end is taken for the cause."""
    if not is_first:
        time.sleep(distributed.PEER_LOST_SECONDS)


def roll_back(run: RunFolder, error: Diverged) -> str:
    """Record that what led to a divergence is left out from the newest checkpoint on."""
    newest, _ = names.newest_checkpoint(run.checkpoints)
    run.leave_out(newest, error.step)
    run.add_event("rollback", step=error.step, to=newest, cause=str(error))
    return (
        f"{error}; back to step {newest:,}: the data of steps {newest + 1:,} to {error.step:,} is "
        "left out"
    )


def record_failure(
    run: RunFolder | None, job: str | None, attempt: int, state: str, code: int, cause: str,
    is_victim: bool = False, **facts,
) -> None:  # fmt: skip
    """Leave this rank's account of the failure for the job's shell, which decides the blame."""
    if run is not None and run.path.is_dir():
        rank = distributed.rank_of_process()
        with contextlib.suppress(OSError):
            run.add_failure(job, attempt, rank, state, code, cause, is_victim, **facts)
