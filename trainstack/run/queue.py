"""Jobs as Slurm knows them, from lines of the shell.

``job|id|state|left|reason|nodes|limit|starts``: times as Slurm writes them.
"""

from dataclasses import dataclass
from datetime import datetime

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
STARTED = {"RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "STOPPED", "STAGE_OUT", "RESIZING",
           "SIGNALING"}  # fmt: skip
HELD = "held by you: scontrol release JOB"
MEANINGS = {  # how a reason of Slurm begins -> what it means, and what to do; the first that fits
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of higher priority wait before it",
    "Resources": "it is next, and waits for nodes",
    "DependencyNeverSatisfied": "it never starts: the job that it was to follow has failed",
    "Dependency": "it waits for the job before it",
    "BeginTime": "it asked for that, or was requeued: that takes some two minutes",
    "JobHeldUser": HELD,
    "JobHeldAdmin": "held by an administrator, or after a failed start; ask them",
    "job_requeued_in_held_state": HELD,
    "launch_failed_requeued_held": "a node could not start it, and it is " + HELD,
    "PartitionTimeLimit": "it never starts: #SBATCH --time is more than the partition allows",
    "PartitionNodeLimit": "it never starts: #SBATCH --nodes is more than the partition allows",
    "PartitionConfig": "it never starts: the partition does not allow what it asks for",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is not active",
    "BadConstraints": "it never starts: no node has what it asks for",
    "NodeDown": "a node that it names is down",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved, for maintenance perhaps",
    "Reservation": "it waits for its reservation",
    "Licenses": "it waits for a license",
    "InvalidAccount": "it never starts: this account may not run here",
    "InvalidQOS": "it never starts: this QOS may not run here",
    "AssocMaxJobs": "your account runs as many jobs as it may",
    "QOSMaxJobs": "you run as many jobs as the QOS allows",
    "QOSMax": "it asks for more than the QOS allows in one job or for one user",
    "QOSMin": "it asks for less than the QOS wants",
    "QOSGrp": "all jobs of the QOS together have what they may",
    "AssocGrp": "all jobs of your account together have what they may; see sshare, or ask",
    "AssocMax": "it asks for more than your account may have",
    "MaxSubmit": "you have queued as many jobs as you may",
    "NodeFail": "a node failed",
}


@dataclass(frozen=True)
class Job:
    """One line; ``nodes`` in Slurm's short form, ``starts``: when it did, or is expected to."""

    state: str = ""
    left: str = ""
    reason: str = ""
    nodes: str = ""
    limit: str = ""
    starts: str = ""

    @property
    def starts_at(self) -> float:
        """When it did or is expected to start, in seconds since 1970; 0 if that is not known."""
        try:
            return datetime.fromisoformat(self.starts).timestamp()
        except ValueError:  # N/A
            return 0.0

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_started(self) -> bool:
        """Whether its processes may be there."""
        return self.state in STARTED

    @property
    def is_live(self) -> bool:
        """Whether it works on its run, or will."""
        return self.is_waiting or self.is_started

    @property
    def is_held(self) -> bool:
        return self.is_waiting and "held" in self.reason.lower()

    @property
    def never_starts(self) -> bool:
        return self.is_waiting and "it never starts" in meaning(self.reason, "")


NO_JOB = Job()


def read_queue(text: str) -> dict[str, Job]:
    """Jobs by id; other lines are left out. A job may have several lines: the live one counts."""
    found: dict[str, Job] = {}
    for line in text.splitlines():
        words = line.split("|")
        if words[0] == "job" and len(words) >= 6:
            job = Job(*words[2:8])
            if job.is_live or words[1] not in found:
                found[words[1]] = job
    return found


def meaning(reason: str, job: str) -> str:
    """Slurm's reason, and what it means for ``job``; the reason alone where that is not known."""
    reason = reason.strip("()").replace(" ", "_")
    told = next((text for start, text in MEANINGS.items() if reason.startswith(start)), "")
    return f"{reason}: {told.replace('JOB', job)}" if told else reason
