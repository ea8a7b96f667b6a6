"""What a rank leaves when it fails: a line for people, a report for the job's shell, a code."""

import logging
import re
import sys
import textwrap
import time
import traceback

from trainstack import distributed
from trainstack.checkpoint import names
from trainstack.errors import ConfigError
from trainstack.resilience.guard import Diverged
from trainstack.run.folder import RunFolder
from trainstack.run.states import EXIT_CODES
from trainstack.waits import PEER_LOST_SECONDS

log = logging.getLogger("trainstack")
BRACKET = re.compile(r"^\[[^]]*\] *")  # where in torch's sources it was raised
NO_MEMORY = "can't allocate memory"  # torch, of the host's
# A GPU without memory, in the words of CUDA, cuBLAS and NCCL.
NO_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
                 "Cuda failure 2 'out of memory'")  # fmt: skip
CONSTANT = (ImportError, NameError, AttributeError, NotImplementedError)  # they come again
STATES = {code: state for state, code in EXIT_CODES.items()}


def explain(error: BaseException, run: RunFolder | None, job: str | None, attempt: int) -> int:
    """Say what went wrong, leave this rank's failure report, and return the exit code."""
    rank = distributed.rank()
    is_main = rank == 0
    state, code, facts = "FAILED", EXIT_CODES["FAILED"], {}
    if isinstance(error, ConfigError):  # all ranks raise it; one of them tells
        state, code = STATES.get(error.code, "FAILED"), error.code
        cause, is_victim = " ".join(error.problems), not is_main
        if is_main:
            print(error.report("train.py"), file=sys.stderr, flush=True)
    elif isinstance(error, Diverged):  # likewise
        state, code = "DIVERGED", EXIT_CODES["DIVERGED"]
        cause, is_victim = str(error), not is_main
        facts = {"is_rollback": error.is_rollback}
        if is_main and error.is_rollback:
            cause = roll_back(run, error)
        if is_main:
            log.error("DIVERGED at %s", cause)
    else:
        lines = traceback.format_exception(error)
        what = str(error).splitlines()[0] if str(error) else ""
        is_victim = distributed.is_peer_lost(error)
        if is_victim:  # its traceback would only hide the one that matters
            log.error("lost a peer (%s)", textwrap.shorten(BRACKET.sub("", what), 160))
        else:
            log.error("%s", "".join(lines))
        cause = memory_cause(error) or f"{type(error).__name__}: {what}"
        facts = {"traceback": "".join(lines[-3:]).splitlines()[-8:]}
        facts |= {"is_final": True} if isinstance(error, CONSTANT) else {}
    if run is not None and run.path.is_dir():
        run.add_failure(job, attempt, rank, state, code, cause, is_victim, **facts)
    if is_victim:
        time.sleep(PEER_LOST_SECONDS)  # the first to end is taken for the cause
    return code


def memory_cause(error: BaseException) -> str:
    """In words, if memory ran out, of a GPU or of the host; else empty."""
    fix = "lower train.micro_batch_size, or set train.activation_checkpointing=true"
    while error is not None:  # a compiler raises its own error from that of the GPU
        what = str(error).splitlines()[0] if str(error) else ""
        is_of_gpu = any(words in str(error) for words in NO_GPU_MEMORY)
        if is_of_gpu or type(error).__name__ == "OutOfMemoryError":
            return f"out of GPU memory: {what}; {fix}"
        if NO_MEMORY in what or isinstance(error, MemoryError):
            return f"out of memory: {what}; {fix}"
        error = error.__cause__ or error.__context__
    return ""


def roll_back(run: RunFolder, error: Diverged) -> str:
    """Record that what led to a divergence is left out from the newest checkpoint on."""
    newest, _ = names.newest_checkpoint(run.checkpoints)
    run.leave_out(newest, error.step)
    run.add_event("rollback", step=error.step, to=newest, cause=str(error))
    return (
        f"{error}; back to step {newest:,}: the data of steps {newest + 1:,} to {error.step:,} is "
        "left out"
    )
