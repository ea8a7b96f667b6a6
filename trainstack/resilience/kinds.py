"""Whose a failure is, and whether another attempt can help: by the words that tell its cause.

The two questions are those of the taxonomy of NVIDIA's nvidia-resiliency-ext.
"""

import re
from typing import NamedTuple

WORKLOAD = "the workload (model, data, settings)"
INFRASTRUCTURE = "the infrastructure (nodes, network, disks)"
EITHER = "the workload or the infrastructure; the records do not tell which"
SITE, SETTING = "Slurm or whoever asked", "a setting or a command of yours"
YES, NO, ELSEWHERE = "may help", "ends in the same way", "helps on other nodes only"  # another try
EXCLUDE = "if it comes again on the same node, leave it out: -- --exclude=NODE"
MORE = ", or ask for more: #SBATCH --mem in train.slurm"
MEMORY = f"lower train.micro_batch_size{MORE}"


class Kind(NamedTuple):
    """What follows from words like these; ``advice`` is empty if they name their own fix."""

    words: str  # a regular expression
    whose: str
    helps: str
    advice: str = ""


UNKNOWN = Kind("", "what is not known", YES, "read the logs")
MISTAKE = Kind("", SETTING, NO)
KINDS = (  # the first that fits
    # Asked for what cannot be, or by two at once.
    Kind("cannot continue with|another experiment", SETTING, NO),
    Kind("took over", INFRASTRUCTURE, YES, "nothing: Slurm had lost the node of that attempt"),
    Kind(r"works in .+; wait|in the hands of|has job \d+|just submitted", SETTING, NO,
         "one job at a time works on a run"),
    Kind("sbatch refuse|sbatch: error", SITE, NO),
    # Files.
    Kind("no checkpoint verifies|has lost its checkpoints", INFRASTRUCTURE, NO),
    Kind("No space left|quota", INFRASTRUCTURE, YES,
         'make space; "$TRAINSTACK_PYTHON" -m trainstack clean lists what may go'),
    Kind("Input/output error|Stale file handle|Read-only file system", INFRASTRUCTURE, YES,
         "tell your admin that path"),
    # Memory.
    Kind("out of GPU memory|out of memory: ", WORKLOAD, NO),
    Kind("killed by the kernel|OUT_OF_MEMORY", WORKLOAD, YES, f"if it comes again, {MEMORY}"),
    # Numbers.
    Kind("lower optim.learning_rate", WORKLOAD, NO),
    Kind("not finite|spike", WORKLOAD, YES,
         "if it comes often, lower optim.learning_rate, or look at the data"),
    # Nodes, and what is between them.
    Kind("cannot find|for itself|cannot reach|no sight of|not visible from|the clock of",
         INFRASTRUCTURE, ELSEWHERE, "until then leave the node out: -- --exclude=NODE"),
    Kind("uncorrectable|ECC error|Xid|NVLink|hardware|launch failure", INFRASTRUCTURE, ELSEWHERE,
         "leave the node out: -- --exclude=NODE"),
    Kind("device-side assert", WORKLOAD, NO, "an index is out of range: look at the data"),
    Kind("disappeared without|Rendezvous|node lost|NODE_FAIL|node failed|BOOT_FAIL|srun fails",
         INFRASTRUCTURE, YES, EXCLUDE),
    Kind("while connecting|NCCL|onnection (reset|closed)", INFRASTRUCTURE, YES,
         "if it comes again, the network: NCCL_SOCKET_IFNAME in train.slurm, or a firewall"),
    # Hangs.
    Kind(r"no progress .*\bsamples", INFRASTRUCTURE, YES,
         "if it comes again, the file system is slow: ask your admin, or raise guard.hang_seconds"),
    Kind("no progress for|stopped answering|lock held", EITHER, YES,
         f"{EXCLUDE}; if steps are only slow, raise guard.hang_seconds"),
    Kind("^SLOW", EITHER, YES, EXCLUDE),
    # Signals, and words of Slurm.
    Kind("killed by SIGKILL", EITHER, YES, f"if it comes again, look at memory: {MEMORY}"),
    Kind("killed by SIG", EITHER, YES, f"{EXCLUDE}; a library may crash: see its log"),
    Kind("TIMEOUT", SITE, YES, "ask for more: #SBATCH --time in train.slurm"),
    Kind("needed the nodes|PREEMPTED|end of the job|SIG(TERM|INT|HUP|USR1)|asked to|CANCELLED",
         SITE, YES),
    # Python.
    Kind("(Import|ModuleNotFound|Name|Attribute|NotImplemented)Error", WORKLOAD, NO),
    Kind(r"\w(Error|Exception)\b", WORKLOAD, YES, "if it comes again, look at code and data"),
)  # fmt: skip


def kind_of(text: str, otherwise: Kind = UNKNOWN) -> Kind:
    """The kind of what a cause, or a word of Slurm, says."""
    return next((kind for kind in KINDS if re.search(kind.words, text)), otherwise)
