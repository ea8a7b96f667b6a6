"""The Python half of submit.sh: every check that a login node can make, then the run folder.

Prints two lines for the shell: ``complete`` or ``ready``, then the run folder. What is wrong is one
line on stderr. Imports neither torch nor transformers: it answers in about a second, but for a
model that it tries for the first time (model/proof.py).
"""

import argparse
import itertools
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from trainstack.checkpoint import names
from trainstack.config.load import load
from trainstack.config.schema import Config, OptimSection
from trainstack.data.corpus import epoch_lines, not_used
from trainstack.errors import ConfigError
from trainstack.job import inputs
from trainstack.job.freeze import make_run_folder
from trainstack.job.resources import (
    Resources,
    check_partition,
    minutes_in,
    partitions_of,
    read_resources,
)
from trainstack.model.proof import prove
from trainstack.optim.schedule import build_schedule, describe_schedule, odd_rate
from trainstack.plan.command import plan_lines
from trainstack.plan.facts import machines_of
from trainstack.plan.machine import find_gpu
from trainstack.processes import run_command
from trainstack.resilience import faults
from trainstack.run import branch, refusal
from trainstack.run.folder import RunFolder
from trainstack.run.nodes import gpu_types, read_nodes
from trainstack.run.owner import check_owner, claim
from trainstack.run.queue import read_queue
from trainstack.storage import layout
from trainstack.units import age

SPEAKER = "submit.sh"
LOG_BYTES = 1 << 20  # of metrics.jsonl: the steps since a checkpoint, and before
MOST_JUMP = 0.03  # of the learning rate, when a run is resumed, that is not worth a line
CERTAIN = re.compile(
    "(?i)invalid|not a valid|unrecogni|ambiguous|an argument|unable to open|dependency problem"
    "|mutually exclusive|account|qos|policy|limit"
)
NODE_LIST = re.compile(r"(^|\s)(-w|-F|--nodelist|--nodefile)")
LONG_WAIT_SECONDS = 900
NEVER_SECONDS = 30 * 86400  # what Slurm says of jobs before it that have no limit


@dataclass(frozen=True)
class Request:
    """What a person asks of submit.sh."""

    home: Path  # $SHARED_DIR/$PROJECT_NAME
    repository: Path  # the checkout
    config_file: Path
    overrides: list[str]  # key=value
    sbatch_options: list[str]
    is_local: bool
    is_dry_run: bool
    job_script: Path  # train.slurm with what the command line replaces
    shell: int  # process of submit.sh, which without Slurm becomes the job; 0: none
    asked_at: float  # when Slurm was asked, in seconds since 1970
    said: str  # by Slurm, of its jobs and nodes and of this job; empty if it was not asked


def main(arguments: list[str]) -> int:
    request = parse(arguments)
    try:
        config = load(request.config_file, request.overrides)
        state, run = check(request, config)
        refusal.forget(run)
    except ConfigError as error:
        said = error.report(SPEAKER, ", nothing was submitted")
        refusal.tell(said, request.home, request.config_file, request.overrides)
        return error.code
    except OSError as error:
        print(f"{SPEAKER}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(state, run.path, sep="\n")
    return 0


def parse(arguments: list[str]) -> Request:
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.submit", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True, dest="config_file")
    parser.add_argument("--local", action="store_true", dest="is_local")
    parser.add_argument("--dry-run", action="store_true", dest="is_dry_run")
    parser.add_argument("--queue", action="store_true", dest="said", help="Slurm's words on stdin")
    parser.add_argument("--job-script", type=Path)
    parser.add_argument("--shell", type=int, default=0, metavar="PID")
    parser.add_argument("--asked-at", type=float, default=0.0, metavar="SECONDS")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, overrides = parser.parse_known_args(arguments[:split])
    options.said = sys.stdin.read() if options.said else ""
    options.job_script = options.job_script or options.repository / "train.slurm"
    return Request(**vars(options), overrides=overrides, sbatch_options=arguments[split + 1 :])


def check(request: Request, config: Config) -> tuple[str, RunFolder]:
    """All checks in the order of their cost; then, unless it is a dry run, the run folder.

    Returns ``complete`` or ``ready``, and the run.
    """
    run = RunFolder(layout.run_folder(request.home, config.run.name))
    resources, remarks = check_resources(request)
    check_batch(config, resources, os.environ.get("NPROC_PER_NODE", ""))
    if faults.parse(wanted := os.environ.get("TRAINSTACK_FAULT", "")):
        say(f"TRAINSTACK_FAULT is set, this run breaks on purpose: {wanted}")
    inputs.check_folder(run.path)
    check_owner(run, read_queue(request.said))
    with branch.as_begun(run, config) as begun:
        return check_run(request, config, begun, resources, remarks)


def check_run(
    request: Request, config: Config, run: RunFolder, resources: Resources, remarks: list[str]
) -> tuple[str, RunFolder]:
    """The checks of what the run needs; of a branch that is not made yet, as it will be."""
    home, config_file, overrides = request.home, request.config_file, request.overrides
    inputs.check_settings(run, config)
    if request.is_local:
        inputs.prepare_demo(home, config_file, overrides, config, run.checkpoints)
    command = inputs.download_command(request.repository, config_file, overrides)
    corpus = inputs.check_inputs(home, config, command, run.checkpoints)
    max_steps = config.steps_for(corpus.train.num_samples)
    rates = describe_schedule(config.optim, max_steps)
    step, changes = inputs.check_progress(run, config, corpus)
    if further := inputs.way_further(run, config, step, max_steps):
        say_complete(run, step, further)
        return "complete", run
    inputs.check_further(run, config, step, max_steps)
    model = inputs.model_source(home, config, run.checkpoints)
    space = inputs.check_space(home, config, prove(home, config, model, say))
    labels = ", ".join(section.label for section in config.data.sources)
    verified = f"model {config.model.name}, tokens of {labels}: verified"
    say(f"{config_file.name} ok | {verified} | {space}")
    lines = [*inputs.not_needed(home, config, run.checkpoints), *rates, *odd_rate(config)]
    logs = branch.logged(run, config)
    lines += rate_jump(logs, config.optim, step, max_steps)
    lines += [*epoch_lines(config, corpus), *not_used(config, corpus), *remarks]
    lines += [f"the tokens of {name} stay, which earlier rules made" for name in corpus.earlier]
    lines += planned(request, config, resources, model, max_steps - step)
    for name in {*layout.TRACKERS} & {*config.log.report_to}:
        lines.append(
            f"{name} gets nothing while the job runs; bash monitor.sh {run.path.name} --sync"
        )
    if logs is not run:
        lines.append(f"run {run.path.name} begins as step {step:,} of run {logs.path.name}")
    if changes:
        lines.append(f"run {run.path.name} continues with other settings: {', '.join(changes)}")
    for line in lines:
        say(line)
    if not request.is_dry_run:
        begin(request, config, run)
    kept = "would be kept" if request.is_dry_run else "kept"
    whole = f"{resources} | code and config {kept} in {run.path}/code"
    say(f"run {run.path.name} -> {run.path}" if request.is_local else whole)
    return "ready", run


def begin(request: Request, config: Config, run: RunFolder) -> None:
    """Make the run folder, as the only one who does."""
    if request.shell:
        claim(run, request.shell, request.asked_at)
    branch.begin(run.path, config)
    make_run_folder(request.repository, config, run, request.is_local)


def check_resources(request: Request) -> tuple[Resources, list[str]]:
    """What the job asks for, and remarks on its start; ConfigError if it can never start."""
    resources = read_resources(request.job_script, request.sbatch_options)
    if request.is_local:
        return replace(resources, nodes=1, gpus_per_node=local_gpus()), []
    kinds = read_nodes(request.said)
    code, text = read_trial(request.said)
    if chosen := re.search(r" in partition (\S+)", text):  # by a plugin of the site, perhaps
        resources = replace(resources, partitions=[chosen[1]])
    remarks = check_partition(resources, kinds, is_accepted=code == "0")
    if "exclusive" in resources.options:  # all GPUs of the nodes then
        wanted = partitions_of(resources, kinds)
        counts = {kind.gpus_of("") for kind in kinds if kind.partition in wanted}
        resources = replace(resources, gpus_per_node=counts.pop() if len(counts) == 1 else None)
    if kinds and not resources.gpus_per_node and not any(kind.gpus for kind in kinds):
        resources = replace(resources, gpus_per_node=None)  # a site that does not count its GPUs
    return resources, [*remarks, *check_trial(code, without_nodes(text, resources, request))]


def without_nodes(text: str, resources: Resources, request: Request) -> str:
    """What Slurm said to the trial; where it found no nodes, why.

    ConfigError if all of the partition are there, so that none will ever be found. With a list of
    nodes the trial of Slurm 22.05 finds none that sbatch then takes.
    """
    options = " ".join(request.sbatch_options)
    asked = [*re.findall(r"(?m)^#SBATCH\s+(.*)$", request.job_script.read_text()), options]
    kinds = read_nodes(request.said)
    wanted = partitions_of(resources, kinds)
    kinds = [kind for kind in kinds if kind.partition in wanted]
    if "node configuration" not in text or not kinds or any(map(NODE_LIST.search, asked)):
        return text
    if any(kind.is_away for kind in kinds):
        return f"{text}; perhaps since some are down, drained or reserved now (sinfo -R)"
    raise ConfigError(
        f"no nodes of partition {','.join(wanted)} are as the job asks; look at "
        f"{f'-- {options}' if options else 'the #SBATCH lines'}, and what there is: "
        'sinfo -o "%P %D %c %m %G %f"'
    )


def check_batch(config: Config, resources: Resources, processes: str) -> None:
    """ConfigError if the global batch cannot be spread over the job's processes.

    ``processes``: NPROC_PER_NODE of the environment, as text; empty if it is not set.
    """
    if processes and not (processes.isdigit() and int(processes)):
        raise ConfigError(
            f"NPROC_PER_NODE={processes} is not a number of processes; write 2, or leave it empty"
        )
    per_node = processes_per_node(resources, processes)
    least, _, most = str(resources.nodes or resources.options["nodes"]).partition("-")
    if not per_node or not least.isdigit():
        return  # train.py checks it as well, when it knows
    for nodes in range(int(least), int(most if most.isdigit() else least) + 1):
        config.batch_plan(nodes * per_node)


def processes_per_node(resources: Resources, processes: str) -> int | None:
    """Of NPROC_PER_NODE, or one for each GPU, or two; None: only the job can know."""
    per_node = int(processes) if processes else resources.processes_per_node
    is_open = per_node == 0 and resources.gpus_per_node is not None
    return (resources.gpus_per_node or 2) if is_open else per_node


def planned(
    request: Request, config: Config, resources: Resources, model: Path, steps: int
) -> list[str]:
    """A line on memory and time, if the machine is known; ``model``: its folder."""
    per_node = processes_per_node(resources, os.environ.get("NPROC_PER_NODE", ""))
    kinds = read_nodes(request.said)
    types = gpu_types(kinds, partitions_of(resources, kinds))
    gpu = find_gpu(resources.gpu_type or (types.pop() if len(types) == 1 else ""))
    gpu = gpu if resources.gpus_per_node and not request.is_local else None
    is_known = gpu or (request.is_local and resources.gpus_per_node == 0)
    if not per_node or not resources.nodes or not is_known:
        return []
    where, limit = machines_of(resources.nodes, per_node, gpu), gpu and minutes_in(resources.time)
    return plan_lines(request.home, model, config, where, steps, limit, say)


def read_trial(said: str) -> tuple[str, str]:
    """The exit code of ``sbatch --test-only`` and what it said; empty if it was not asked."""
    trial = re.search(r"(?m)^try\|(\d+)\|(.*)$", said)
    return (trial[1], trial[2]) if trial else ("", "")


def check_trial(code: str, text: str) -> list[str]:
    """A line if the job starts late; ConfigError if sbatch refuses it for good.

    Nodes that are only down or drained are one more reason of the trial to refuse, and none to
    sbatch itself.
    """
    if code not in ("", "0"):
        if CERTAIN.search(text):
            raise ConfigError(f"sbatch refuses the job: {text}")
        return [f"Slurm, asked when the job could start: {text}"]
    start = re.search(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", text)
    wait = (datetime.fromisoformat(start[1]) - datetime.now()).total_seconds() if start else 0
    is_late = LONG_WAIT_SECONDS < wait < NEVER_SECONDS
    return [f"Slurm expects to start the job within {age(wait)}"] if is_late else []


def local_gpus() -> int | None:
    """GPUs of this machine that a job would use, as job.sh counts them; None: only it can know."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        each = visible.split(",")  # what follows -1 is not there
        return len(list(itertools.takewhile(lambda name: name and name[0] != "-", each)))
    return None if shutil.which("nvidia-smi") else 0


def say(text: str) -> None:
    print(f"{SPEAKER}: {text}", file=sys.stderr)


def say_complete(run: RunFolder, step: int, further: str) -> None:
    newest = names.newest_checkpoint(run.checkpoints)[1]
    say(f"run {run.path.name} is complete: {step:,} steps, {newest}")
    say(f"{further}; for a new run choose another run.name")


def rate_jump(run: RunFolder, section: OptimSection, step: int, max_steps: int) -> list[str]:
    """Where a run that is resumed after ``step`` does not go on at the rate that it had; a line.

    By what was logged, so whatever the reason is: another setting, or other code.
    """
    measured = run.measurements(LOG_BYTES)
    logged = [r for r in measured if "learning_rate" in r and r["step"] <= step]
    if not logged or step >= max_steps:
        return []
    rate_at, last = build_schedule(section, max_steps), logged[-1]
    before, now = last["learning_rate"], rate_at(last["step"])
    if abs(now - before) <= MOST_JUMP * max(now, before):
        return []
    return [
        f"the learning rate jumps: by these settings it is {now:.3g} at step {last['step']:,}, "
        f"which was trained at {before:.3g}; step {step + 1:,} will be at {rate_at(step + 1):.3g}"
    ]


if __name__ == "__main__":
    run_command(main)
