"""The states of a run and their exit codes; the phases of its loop."""

import enum

# State of a run -> exit code of its job. torchrun swallows codes: the truth is in status.json.
EXIT_CODES = {
    "DONE": 0,
    "FAILED": 1,
    "PAUSED": 75,
    "NO_PROGRESS": 76,
    "REFUSED": 78,
    "DIVERGED": 79,
    "HANG": 81,
}
QUEUED, STARTING, RUNNING = "QUEUED", "STARTING", "RUNNING"
RESTARTING = "RESTARTING"  # in place: the job's shell begins another attempt
NOT_SUBMITTED = "NOT_SUBMITTED"  # sbatch refused its first job


def is_local_job(job: str | None) -> bool:
    """Whether a job runs without Slurm: only its own host can tell if it is alive."""
    return (job or "").startswith("local")


def resume_command(run: str, job: str | None) -> str:
    """What a person types to continue a run whose last job was ``job``."""
    return f"bash submit.sh --resume {run}{' --local' * is_local_job(job)}"


def new_run_command(run: str, job: str | None) -> str:
    """What a person types to begin again what ``run``, whose last job was ``job``, was to do."""
    return f"bash submit.sh{' --local' * is_local_job(job)} run.name={run}-2"


class Phase(enum.Enum):
    """Where a rank is; within a step they follow in this order.

    Of the host: on a GPU it also waits in ``gradients`` for what it queued in the step before.
    """

    CONNECT = "connecting"  # to the other ranks
    VERIFY = "verifying the checkpoint"
    LOAD = "loading"
    WARM_UP = "warming up"  # compiles
    SAMPLES = "samples"
    GRADIENTS = "gradients"
    UPDATE = "update"
    EVALUATION = "evaluation"
    PROMPTS = "prompts"
    SAVE = "save"
    END = "the end"

    @property
    def number(self) -> int:
        """Its index in that order, as failure reports have it."""
        return list(Phase).index(self)

    @property
    def is_start(self) -> bool:
        """Whether no step was begun yet."""
        return self.number < Phase.SAMPLES.number
