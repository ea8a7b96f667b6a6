"""What the job asks of Slurm, and whether its partition can ever give it."""

import argparse
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from trainstack.errors import ConfigError
from trainstack.run.nodes import NodeKind, number_in
from trainstack.units import counted

OPTIONS = (  # of sbatch
    ("--nodes", "-N"), ("--time", "-t"), ("--partition", "-p"), ("--qos", "-q"),
    ("--gpus", "-G"), ("--gpus-per-node",), ("--gpus-per-task",), ("--gres",),
    ("--ntasks", "-n"), ("--ntasks-per-node",), ("--cpus-per-task", "-c"), ("--cpus-per-gpu",),
    ("--mem",), ("--mem-per-cpu",), ("--mem-per-gpu",), ("--exclusive",), ("--gpus-per-socket",),
)  # fmt: skip
FORMS = {  # of their values, and one to write
    "nodes": (r"(?i)\d+[km]?(-\d+[km]?)?(:\d+)?(,\d+(-\d+)?(:\d+)?)*", "2"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task"),
                    (r"(?!-)[\w.+-]+(:\d+)?(,[\w.+-]+(:\d+)?)*", "2")),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "cpus-per-task", "cpus-per-gpu"),
                    (r"(?i)\d+[km]?", "2")),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"),
                    (r"(?i)\d+(\.\d+)?[kmgt]?b?", "16G")),
    "time": (r"(?i)unlimited|infinite|(\d+-)?\d+(:\d+){0,2}", "2:00:00"),
    **dict.fromkeys(("partition", "qos", "gres"), (".+", "NAME")),
}  # fmt: skip
WARNING = "B:USR1@240"
LEAST_SECONDS = 60  # of a job before it is warned of its end
MEGABYTES = {"k": 1 / 1024, "m": 1, "": 1, "g": 1024, "t": 1024**2}  # in a unit of --mem


@dataclass(frozen=True)
class Resources:
    """What the job asks of Slurm; None if it is not said in a form that can be read here."""

    nodes: int | None
    gpus_per_node: int | None
    gpu_type: str
    cpus_per_node: int | None
    megabytes_per_node: float | None
    time: str  # as sbatch takes it; empty for the partition's own limit
    partitions: list[str]  # any of them will do; empty for the default one
    has_qos: bool  # a QOS may lift the limits of a partition
    processes_per_node: int | None  # NPROC_PER_NODE of train.slurm; 0 if it is empty there
    options: dict[str, str] = field(default_factory=dict)  # as they were written, by long name

    def __str__(self) -> str:
        nodes = counted(self.nodes, "node") if self.nodes else f"{self.options['nodes']} nodes"
        gpus = f" x {counted(self.gpus_per_node, 'GPU')}" if self.gpus_per_node else ""
        time = self.time or "the partition's time limit"
        return f"{nodes}{gpus}, {time}, partition {','.join(self.partitions) or '(default)'}"


def read_resources(train_slurm: Path, sbatch_options: list[str]) -> Resources:
    """What the #SBATCH lines ask for, and the command line, which wins.

    ``train_slurm``: without the lines that an option of the command line replaces.
    """
    script = train_slurm.read_text()
    lines = re.findall(r"(?m)^#SBATCH[ \t]+(.*?)[ \t]*(?:#.*)?$", script)
    edited = re.search(r'(?m)^NPROC_PER_NODE="?(?:\$\{NPROC_PER_NODE:-)?([^"}\s]*)', script)
    words = [word for line in lines for word in _words(line)] + sbatch_options
    asked = _options(words)
    check_forms(asked)
    check_warning(asked.get("time", ""), words)
    nodes = number_in(asked.get("nodes", "1"))
    tasks = _tasks_per_node(asked, nodes)
    gpus = _gpus_per_node(asked, nodes, tasks)
    cpus = _cpus_per_node(asked, tasks, gpus)
    return Resources(
        nodes=nodes,
        gpus_per_node=gpus,
        gpu_type=_gpu_type(asked),
        cpus_per_node=cpus,
        megabytes_per_node=_megabytes_per_node(asked, cpus, gpus),
        time=asked.get("time", ""),
        partitions=[name for name in asked.get("partition", "").split(",") if name],
        has_qos="qos" in asked,
        processes_per_node=number_in(edited[1] or "0") if edited else None,
        options=asked,
    )


def check_warning(time: str, options: list[str]) -> None:
    """ConfigError if the job would be over when Slurm warns it of its end, as train.slurm asks."""
    signals = [word.partition("=")[2] for word in options if word.startswith("--signal=")]
    signals += [word for before, word in pairwise(options) if before == "--signal"]
    signal = signals[-1] if signals else WARNING
    warning = re.fullmatch(r"(?i)R?B:(?:(?:SIG)?USR1|10)(?:@(\d+))?", signal)
    if not warning:
        raise ConfigError(
            f"--signal={signals[-1]} does not reach what saves the run before the job ends; leave "
            f"it out, or write --signal={WARNING}"
        )
    seconds, minutes = int(warning[1] or 60) if signals else 0, minutes_in(time)
    if seconds > 1 and minutes and minutes * 60 <= seconds + LEAST_SECONDS:
        least = seconds // 60 + 2
        raise ConfigError(
            f"--time={time} is too short: --signal asks for a warning {seconds} s before the "
            f"end, at which the job saves and stops; write --time={least} or more"
        )


def _words(line: str) -> list[str]:
    """Of an #SBATCH line, as sbatch reads it: quotes hold a word together."""
    try:
        return shlex.split(line)
    except ValueError:  # one that is not closed
        return line.split()


def check_forms(asked: dict[str, str]) -> None:
    """ConfigError for values that sbatch would not take, or take for something else."""
    problems = [
        f"--{name}={value} is no value that Slurm reads; write for example --{name}={example}"
        for name, (form, example) in FORMS.items()
        for value in [asked.get(name)]
        if value is not None and not re.fullmatch(form, value)
    ]
    least, _, most = asked.get("nodes", "").partition("-")
    if least.isdigit() and most.isdigit() and int(least) > int(most):
        problems.append(f"--nodes={least}-{most}: the least comes first; write {most}-{least}")
    if "gpus-per-socket" in asked:
        problems.append("--gpus-per-socket is not passed on to srun; write --gpus-per-node=N")
    if problems:
        raise ConfigError(*problems)


def _options(words: list[str]) -> dict[str, str]:
    """The last value of each option that is read here, in any of the spellings of sbatch."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in OPTIONS:
        parser.add_argument(*names, nargs="?", const="", dest=names[0].removeprefix("--"))
    found = vars(parser.parse_known_args(words)[0])
    return {name: value for name, value in found.items() if value is not None}


def _tasks_per_node(asked: dict[str, str], nodes: int | None) -> int | None:
    if "ntasks-per-node" in asked:
        return number_in(asked["ntasks-per-node"])
    tasks = number_in(asked.get("ntasks", "1"))
    return -(-tasks // nodes) if tasks and nodes else None


def _gpus_per_node(asked: dict[str, str], nodes: int | None, tasks: int | None) -> int | None:
    """ConfigError if a total is said that the nodes cannot share evenly."""
    gres = _gres_of_gpus(asked)
    if "gpus-per-node" in asked or gres:
        return number_in(asked.get("gpus-per-node") or gres[0].partition(":")[2] or "1")
    if "gpus-per-task" in asked:
        per_task = number_in(asked["gpus-per-task"])
        return per_task * tasks if per_task is not None and tasks else None
    total = number_in(asked.get("gpus", "0"))
    if total and nodes and total % nodes:
        raise ConfigError(
            f"--gpus={asked['gpus']} cannot be the same on each of {nodes} nodes; write "
            f"--gpus-per-node=N, or --gpus={total // nodes * nodes + nodes}"
        )
    return total // nodes if total is not None and nodes and total % nodes == 0 else None


def _gpu_type(asked: dict[str, str]) -> str:
    """``h100``, of h100:8 or gpu:h100:8; empty if any will do."""
    written = [asked.get(name, "") for name in ("gpus-per-node", "gpus", "gpus-per-task")]
    written += [gres.partition(":")[2] for gres in _gres_of_gpus(asked)]
    return next((text.partition(":")[0] for text in written if ":" in text), "")


def _gres_of_gpus(asked: dict[str, str]) -> list[str]:
    """The parts of --gres that are GPUs: gpu:h100:8 of lscratch:10,gpu:h100:8."""
    return [part for part in asked.get("gres", "").split(",") if part.split(":")[0] == "gpu"]


def _cpus_per_node(asked: dict[str, str], tasks: int | None, gpus: int | None) -> int | None:
    if "cpus-per-gpu" in asked:
        each, count = number_in(asked["cpus-per-gpu"]), gpus
    else:
        each, count = number_in(asked.get("cpus-per-task", "1")), tasks
    return each * count if each and count else None


def _megabytes_per_node(asked: dict[str, str], cpus: int | None, gpus: int | None) -> float | None:
    """0 if all of a node is asked for."""
    for name, count in (("mem", 1), ("mem-per-cpu", cpus), ("mem-per-gpu", gpus)):
        if name in asked:
            size = _size(asked[name])
            return size * count if size is not None and count else None
    return None


def partitions_of(asked: Resources, kinds: list[NodeKind]) -> list[str]:
    """Those that the job may run in: those that it names, else Slurm's default."""
    return asked.partitions or [kind.partition for kind in kinds if kind.is_default][:1]


def check_partition(asked: Resources, kinds: list[NodeKind], is_accepted: bool) -> list[str]:
    """Lines on what a QOS would have to lift; ConfigError for what no partition can ever give.

    ``kinds``: empty if Slurm did not tell; a partition that is not there is left to sbatch.
    ``is_accepted``: Slurm has tried the job, which says nothing of its limits.
    """
    problems = []
    for partition in partitions_of(asked, kinds):
        within = [kind for kind in kinds if kind.partition == partition]
        found = list(_excesses_of_limits(asked, partition, within)) if within else []
        found += _excesses(asked, partition, within) if within and not is_accepted else []
        if all(excess.may_be_lifted for excess in found) and (asked.has_qos or not found):
            return [f"{excess.text}; the QOS would have to lift that" for excess in found]
        problems += [f"{excess.text}; {excess.fix}" for excess in found]
    if problems:
        raise ConfigError(*problems)
    return []


@dataclass(frozen=True)
class Excess:
    """Something of which a partition has less than the job asks for."""

    text: str
    fix: str
    may_be_lifted: bool = False


def _excesses(asked: Resources, partition: str, kinds: list[NodeKind]) -> Iterator[Excess]:
    """What the job asks for and no node of the partition has, or not so many nodes."""
    amounts = (  # what, how much of it, how much each kind has, the options that ask for it
        ("CPU", asked.cpus_per_node, [k.cpus for k in kinds], ("cpus-per-task", "cpus-per-gpu")),
        ("MB of memory", asked.megabytes_per_node, [k.megabytes for k in kinds],
         ("mem", "mem-per-cpu", "mem-per-gpu")),
        ("GPU", asked.gpus_per_node, [k.gpus_of(asked.gpu_type) for k in kinds],
         ("gpus-per-node", "gres", "gpus-per-task", "gpus")),
    )  # fmt: skip
    is_each_enough = True
    for what, amount, have, names in amounts:
        if amount is None or amount <= max(have):
            continue
        is_each_enough = False
        written = asked.options
        name = next((name for name in names if name in written), names[0])
        factor = amount / (_size(written.get(name, "1")) or 1)
        yield Excess(
            f"{_as_written(name, written)} is {_counted(amount, what, asked)} per node, but no "
            f"node of partition {partition} has more than {max(have):,}",
            _write(name, max(have), factor, _gpu_prefix(name, written)),
        )
    fitting = sum(
        kind.count
        for row, kind in enumerate(kinds)
        if all(amount is None or amount <= have[row] for _, amount, have, _ in amounts)
    )
    least = number_in(asked.options.get("nodes", "1").partition("-")[0])  # of a range
    if is_each_enough and least and least > fitting:
        yield Excess(
            f"{_as_written('nodes', asked.options)}, but partition {partition} has {fitting:,} "
            "with all that the job asks for",
            _write("nodes", fitting) if fitting else "ask for less on each node",
        )


def _excesses_of_limits(
    asked: Resources, partition: str, kinds: list[NodeKind]
) -> Iterator[Excess]:
    """Nodes of one job and its time, of which a partition gives only so much."""
    most = kinds[0].most_nodes
    if asked.nodes and most is not None and asked.nodes > most:
        yield Excess(
            f"{_as_written('nodes', asked.options)} is more than partition {partition} gives to "
            f"one job, {most:,}",
            _write("nodes", most),
            may_be_lifted=True,
        )
    minutes, limits = minutes_in(asked.time), [minutes_in(kind.time) for kind in kinds]
    if minutes is not None and None not in limits and minutes > max(limits):
        yield Excess(
            f"{_as_written('time', asked.options)} is more than partition {partition} allows, "
            f"{kinds[0].time}",
            _write("time", kinds[0].time),
            may_be_lifted=True,
        )


def _counted(amount: float, what: str, asked: Resources) -> str:
    of_type = f" of type {asked.gpu_type}" if what == "GPU" and asked.gpu_type else ""
    return (counted(amount, what) if len(what) == 3 else f"{amount:,.0f} {what}") + of_type


def _as_written(name: str, options: dict[str, str]) -> str:
    return f"--{name}={options.get(name, '1')}"


def _gpu_prefix(name: str, options: dict[str, str]) -> str:
    """What stands before the number of GPUs: ``gpu:h100:`` of gpu:h100:8."""
    return options.get(name, "").rpartition(":")[0] + ":" * (":" in options.get(name, ""))


def _write(name: str, most: float | str, factor: float = 1, prefix: str = "") -> str:
    if prefix and not most:
        return "name a type that is there, or none: sinfo -o %G lists them"
    if not isinstance(most, str) and most // factor < 1 and not name.startswith("gpus-per-node"):
        return "ask for less on each node: fewer tasks or GPUs there, or more --nodes"
    value = most if isinstance(most, str) else f"{prefix}{int(most // factor)}"
    unit = "M" if name.startswith("mem") else ""
    option = f"--{name}={value}{unit}"
    return f"write #SBATCH {option} into train.slurm, or, for this job alone: -- {option}"


def _size(text: str) -> float | None:
    """The number in an option's value, memory in MB."""
    size = re.fullmatch(r"(?:.*:)?(\d+)([kmgt]?)b?", text.lower())
    return int(size[1]) * MEGABYTES[size[2]] if size else None


def minutes_in(text: str) -> float | None:
    """Of a time as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or no limit."""
    if text.lower() in ("0", "unlimited", "infinite"):
        return math.inf
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # hours first
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
