"""Nodes as Slurm knows them, from lines of the shell; see list_nodes in slurm.sh."""

import re
from dataclasses import dataclass

AWAY = re.compile(
    r"down|dn|drain|drng|fail|maint|resv|reserved|unk|inval|boot|block|futr|npc|[*@^%]"
)  # states


@dataclass(frozen=True)
class NodeKind:
    """One line of sinfo, ``node|partition|partition*|nodes|CPUs|MB|gres|time|size|up|state``."""

    partition: str
    is_default: bool
    count: int
    cpus: int
    megabytes: int
    gpus: dict[str, int]  # by type
    time: str
    most_nodes: int | None  # of one job; None: as many as there are
    state: str

    @property
    def is_away(self) -> bool:
        """Whether no job can start there now, whatever it asks for."""
        return AWAY.search(self.state) is not None

    def gpus_of(self, gpu_type: str) -> int:
        return self.gpus.get(gpu_type, 0) if gpu_type else sum(self.gpus.values())


def read_nodes(text: str) -> list[NodeKind]:
    """The kinds of nodes that Slurm told; other lines are left out."""
    found = []
    for line in text.splitlines():
        words = line.split("|")
        if words[0] != "node" or len(words) != 11:
            continue
        _, partition, marked, count, cpus, memory, gres, time, size, _, state = words
        counts = [number_in(each.rstrip("+")) for each in (count, cpus, memory)]
        if all(counts[:2]) and counts[2] is not None:  # of powered-down nodes Slurm may say 0
            is_default = marked.endswith("*") and not partition.endswith("*")
            most_nodes = number_in(size.rpartition("-")[2])
            kind = (partition, is_default, *counts, _gpus_of(gres), time, most_nodes, state)
            found.append(NodeKind(*kind))
    return found


def gpu_types(kinds: list[NodeKind], partitions: list[str]) -> set[str]:
    """All types of GPUs that nodes of some partitions have."""
    return {name for kind in kinds if kind.partition in partitions for name in kind.gpus}


def _gpus_of(gres: str) -> dict[str, int]:
    """``{"h100": 8}`` of ``gpu:h100:8(S:0-1),nvme:1``; without a type its name is empty."""
    found: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = part.split(":")
        count = number_in(words[-1]) if len(words) > 1 else 1
        if words[0] == "gpu" and count is not None:
            gpu_type = words[1] if len(words) > 2 else ""
            found[gpu_type] = found.get(gpu_type, 0) + count
    return found


def number_in(text: str) -> int | None:
    """4, or the 8 of h100:8; None for ranges and lists such as 2-4."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else None
