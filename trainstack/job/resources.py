"""What the job asks of Slurm, read from train.slurm and the command line."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.errors import ConfigError

OPTIONS = (  # of sbatch
    ("--nodes", "-N"), ("--time", "-t"), ("--partition", "-p"), ("--gpus", "-G"),
    ("--gpus-per-node",), ("--gres",),
)  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What the job asks of Slurm; None if it is not said in a form that can be read here."""

    nodes: int | None
    gpus_per_node: int | None
    time: str
    partition: str
    processes_per_node: int | None  # NPROC_PER_NODE of train.slurm; 0 if it is empty there

    def __str__(self) -> str:
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes or '?'} nodes"
        gpus = f" x {self.gpus_per_node} GPUs" if self.gpus_per_node else ""
        return f"{nodes}{gpus}, {self.time}, {self.partition}"


def read_resources(train_slurm: Path, sbatch_options: list[str]) -> Resources:
    """Nodes, GPUs per node, time and partition; the command line wins over the #SBATCH lines."""
    script = train_slurm.read_text()
    lines = re.findall(r"(?m)^#SBATCH[ \t]+(.*?)[ \t]*(?:#.*)?$", script)
    edited = re.search(r'(?m)^NPROC_PER_NODE="?(?:\$\{NPROC_PER_NODE:-)?([^"}\s]*)', script)
    written = [word for line in lines for word in line.split()]
    asked = _options(written + sbatch_options)
    return Resources(
        nodes=_number(asked.nodes or "1"),
        gpus_per_node=_gpus_per_node(sbatch_options, written),
        time=asked.time or "the partition's time limit",
        partition=f"partition {asked.partition or '(default)'}",
        processes_per_node=_number(edited[1] or "0") if edited else None,
    )


def _options(words: list[str]) -> argparse.Namespace:
    """The last value of each option that is read here, in any of the spellings of sbatch."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in OPTIONS:
        parser.add_argument(*names, nargs="?", const="")
    return parser.parse_known_args(words)[0]


def _gpus_per_node(*sources: list[str]) -> int | None:
    """GPUs per node by the first source that says; None if it gives only a total."""
    for asked in map(_options, sources):
        gres = re.fullmatch(r"gpu:(.*)", asked.gres or "")
        if asked.gpus_per_node or gres:
            return _number(asked.gpus_per_node or gres[1])
        if asked.gpus is not None:
            return None
    return 0


def _number(text: str) -> int | None:
    """4, or the 8 of h100:8; None for ranges and lists such as 2-4."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else None


def check_batch(config: Config, resources: Resources, processes: str) -> None:
    """ConfigError if the global batch cannot be spread over the job's processes.

    ``processes``: NPROC_PER_NODE of the environment, as text; empty if it is not set.
    """
    if processes and not (processes.isdigit() and int(processes)):
        raise ConfigError(
            f"NPROC_PER_NODE={processes} is not a number of processes; write 2, or leave it empty"
        )
    per_node = int(processes) if processes else resources.processes_per_node
    if per_node == 0 and resources.gpus_per_node is not None:
        per_node = resources.gpus_per_node or 2
    if resources.nodes is None or not per_node:
        return  # train.py checks it as well, when it knows
    config.batch_plan(resources.nodes * per_node)
