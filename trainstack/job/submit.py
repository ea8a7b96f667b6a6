"""The Python half of submit.sh: every check that a login node can make, then the run folder.

Prints two lines for the shell: ``complete`` or ``ready``, then the run folder. What is wrong is one
line on stderr. Imports neither torch nor transformers: it answers in about a second.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainstack.config.load import Config, batch_plan, check_identity, load, steps_for
from trainstack.data import store
from trainstack.errors import ConfigError, Refused
from trainstack.resilience import faults
from trainstack.run.environment import describe_environment
from trainstack.run.folder import QUEUED, STARTING, Lease, RunFolder, is_dead, is_known_here
from trainstack.storage import files, layout

SPEAKER = "submit.sh"
SMALL_FILE = (
    64 << 20
)  # bytes; larger files are verified by size here, by content when they are read
BYTES_PER_PARAMETER = 12  # fp32 weights and two AdamW moments
SNAPSHOT = ("train.py", "train.slurm", "requirements.txt")
LIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "STOPPED"}


class Failed(ConfigError):
    """Something else than the person's input is in the way."""

    code = 1


@dataclass(frozen=True)
class Resources:
    """What the job asks of Slurm; None where it is not said in a form that can be read here."""

    nodes: int | None
    gpus_per_node: int | None
    time: str
    partition: str
    processes_per_node: int | None  # as NPROC_PER_NODE stands in train.slurm; 0 where it is empty

    def __str__(self) -> str:
        nodes = f"{self.nodes or '?'} node{'s'[: self.nodes != 1]}"
        gpus = f" x {self.gpus_per_node} GPUs" if self.gpus_per_node else ""
        return f"{nodes}{gpus}, {self.time}, {self.partition}"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        config = load(options.config, options.overrides)
        state, run = check(options, config)
    except ConfigError as error:
        print(error.report(SPEAKER, ", nothing was submitted"), file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"{SPEAKER}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(state)
    print(run.path)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainstack.job.submit", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--queue", action="store_true", help="stdin has squeue's ids, states")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, settings = parser.parse_known_args(arguments[:split])
    options.overrides, options.sbatch = settings, arguments[split + 1 :]
    options.queue = sys.stdin.read() if options.queue else ""
    return options


def check(options: argparse.Namespace, config: Config) -> tuple[str, RunFolder]:
    """All checks in the order of their cost; then, unless it is a dry run, the run folder."""
    run = RunFolder(layout.run_folder(options.home, config.run.name))
    resources = read_resources(options.repository / "train.slurm", options.sbatch)
    check_batch(config, resources, options.local)
    wanted = os.environ.get("TRAINSTACK_FAULT", "")
    if faults.parse(wanted):
        say(f"TRAINSTACK_FAULT is set, this run breaks on purpose: {wanted}")
    check_folder(run.path)
    check_owner(run, options.queue)
    if options.local:
        prepare_demo(options, config)
    corpus = check_inputs(options, config)
    max_steps = steps_for(config, corpus.train.num_samples)
    if check_progress(run, config, corpus) >= max_steps and run.status().get("state") == "DONE":
        _, newest = layout.newest_checkpoint(run.checkpoints)
        say(f"run {config.run.name} is complete: {max_steps:,} steps, {newest}")
        say("to go further raise train.max_steps; for a new run choose another run.name")
        return "complete", run
    space = check_space(options.home, config)
    say(f"{options.config.name} ok | model and tokens present and verified | {space}")
    if not options.dry_run:
        make_run_folder(options, config, run)
    if options.local:
        say(f"run {config.run.name} -> {run.path}")
    else:
        say(f"{resources} | code and config kept in {run.path}/code")
    return "ready", run


def say(text: str) -> None:
    print(f"{SPEAKER}: {text}", file=sys.stderr)


def read_resources(train_slurm: Path, sbatch_options: list[str]) -> Resources:
    """Nodes, GPUs per node, time and partition; the command line wins over the #SBATCH lines."""
    script = train_slurm.read_text()
    lines = re.findall(r"(?m)^#SBATCH[ \t]+(.*?)[ \t]*(?:#.*)?$", script)
    edited = re.search(r'(?m)^NPROC_PER_NODE="?(?:\$\{NPROC_PER_NODE:-)?([^"}\s]*)', script)
    written = [word for line in lines for word in line.split()]
    words = written + sbatch_options
    return Resources(
        nodes=_number(_last(words, "--nodes", "-N") or "1"),
        gpus_per_node=_gpus_per_node(sbatch_options, written),
        time=_last(words, "--time", "-t") or "the partition's time limit",
        partition=f"partition {_last(words, '--partition', '-p') or '(default)'}",
        processes_per_node=_number(edited[1] or "0") if edited else None,
    )


def _gpus_per_node(*sources: list[str]) -> int | None:
    """GPUs per node by the first source that says; None where it gives only a total."""
    for words in sources:
        value = _last(words, "--gpus-per-node") or _last(words, "--gres", "", r"gpu:(.*)")
        if value is not None:
            return _number(value)
        if _last(words, "--gpus", "-G") is not None:
            return None
    return 0


def _last(words: list[str], long: str, short: str = "", pattern: str = "(.*)") -> str | None:
    """The last value of an option, in any of the spellings that sbatch takes."""
    value = None
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word.startswith(f"{long}="):
            value = word.partition("=")[2]
        elif word == long or (short and word == short):
            value = following
        elif short and word.startswith(short) and not word.startswith("--"):
            value = word[len(short) :]
    match = re.fullmatch(pattern, value) if value is not None else None
    return match[1] if match else None


def _number(text: str) -> int | None:
    """4, or the 8 of h100:8; None for ranges and lists such as 2-4."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else None


def check_batch(config: Config, resources: Resources, is_local: bool) -> None:
    """ConfigError where the global batch cannot be spread over the job's processes."""
    processes = os.environ.get("NPROC_PER_NODE", "")
    if processes and not (processes.isdigit() and int(processes)):
        raise ConfigError(f"NPROC_PER_NODE={processes} is no number of processes; write 2, or none")
    per_node = int(processes) if processes else resources.processes_per_node
    if is_local or None in (resources.nodes, resources.gpus_per_node, per_node):
        return  # train.py checks it as well, when it knows
    per_node = per_node or resources.gpus_per_node or 2
    batch_plan(config, resources.nodes * per_node)


def check_folder(path: Path) -> None:
    """Failed where the run folder is no folder or cannot be written."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise Failed(f"{path} is not a folder; move it away, or choose another run.name")
    parent = path if path.exists() else path.parent
    if parent.exists() and not os.access(parent, os.W_OK):
        raise Failed(f"{parent} cannot be written; ask its owner, or choose another SHARED_DIR")


def check_owner(run: RunFolder, queue: str) -> None:
    """Refused where a job that lives or waits already works on this run."""
    states = dict(line.split()[:2] for line in queue.splitlines() if len(line.split()) >= 2)
    submitted = [e["job"] for e in run.events() if e["event"] == "submitted"]
    live = [job for job in dict.fromkeys(submitted) if job in states]  # of a chain, several
    if live:
        named = ", ".join(f"{job} ({states[job]})" for job in live)
        raise Refused(
            f"run {run.path.name} has job {named} already; wait for it, or end it: "
            f"scancel {' '.join(live)}"
        )
    _, holder = Lease(run.path).holder()
    if not holder or holder.get("released"):
        return
    is_alive = is_known_here(holder) and not is_dead(holder)
    if is_alive or states.get(holder["job"]) in LIVE:
        raise Refused(f"run {run.path.name} is in the hands of job {holder['job']}; wait for it")


def prepare_demo(options: argparse.Namespace, config: Config) -> None:
    """Build the built-in demo where the configuration names it and it is not there."""
    names = {config.model.name, *(section.name for section in config.data.sources)}
    is_demo = names == {layout.DEMO}
    if not is_demo or not input_problem(options, config):
        return
    command = [sys.executable, "-m", "trainstack.prepare.prepare", "--home", options.home]
    command += ["--config", options.config, *options.overrides]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise Failed("the demo could not be prepared; the line above says why")


def download_command(options: argparse.Namespace) -> str:
    """What fetches the inputs of this run: with its config file and its choice of inputs."""
    command = ["bash", "download_data_model.sh"]
    if options.config != options.repository / "config.yaml":
        command.append(str(options.config))
    command += [word for word in options.overrides if word.startswith(("model.", "data."))]
    return shlex.join(command)


def input_problem(options: argparse.Namespace, config: Config) -> str | None:
    """What is missing or damaged of model, data sets and tokens, and the command that mends it."""
    home = options.home
    fix = f"run: {download_command(options)}"
    model = layout.model_folder(home, config.model.name)
    model_label = f"model {config.model.name}"
    wanted = [(model_label, model, config.model.revision)]
    for section in config.data.sources:
        folder = layout.dataset_folder(home, section.name, section.subset)
        wanted.append((f"data set {section.name}", folder, section.revision))
    for name, folder, revision in wanted:
        problem = asset_problem(name, folder, revision)
        if problem:
            return f"{problem}; {fix}"
    for section in config.data.sources:
        folder = store.store_folder(home, config.model.name, section)
        problem = next(files.damage(folder, SMALL_FILE), None)
        if problem:
            return f"the tokens of {section.name} are not ready ({problem}); {fix}"
    if config.model.init == "pretrained" and not any(model.glob("*.safetensors")):
        return f"{model_label} was fetched without weights; {fix}, or set model.init=scratch"
    return None


def asset_problem(name: str, folder: Path, revision: str) -> str | None:
    """Why a model or a data set that lies here does not do."""
    if not (folder / files.MANIFEST).exists():
        return f"{name} is not here yet"
    problem = next(files.damage(folder, SMALL_FILE), None)
    if problem:
        return f"{name} is damaged ({folder}: {problem})"
    manifest = files.read_manifest(folder)
    fetched = manifest.get("revision")
    if fetched is not None and revision not in (fetched, manifest.get("commit")):
        return f"{name} is here in revision {fetched}, not {revision}"
    return None


def check_inputs(options: argparse.Namespace, config: Config) -> store.Corpus:
    """What the run learns from, once model, data and tokens are known to be there and whole."""
    problem = input_problem(options, config)
    if problem:
        raise Failed(problem)
    corpus = store.open_corpus(options.home, config)
    store.enough_samples(config, corpus)
    return corpus


def check_progress(run: RunFolder, config: Config, corpus: store.Corpus) -> int:
    """The step that the run has reached; Refused where it was another experiment's."""
    step, saved = layout.newest_identity(run.checkpoints)
    if saved:
        check_identity(saved, store.identity(config, corpus.key), config.run.name)
    return step


def check_space(home: Path, config: Config) -> str:
    """Failed where two checkpoints would not fit."""
    parameters = count_parameters(layout.model_folder(home, config.model.name))
    free = files.free_bytes(home)
    if parameters is None:
        return f"{free / 1e9:,.0f} GB free (the size of a checkpoint is not known)"
    need = 2 * parameters * BYTES_PER_PARAMETER
    if need > free:
        raise Failed(
            f"{home} has {free / 1e9:,.1f} GB free, two checkpoints of {config.model.name} need "
            f"{need / 1e9:,.1f} GB; free some space, or choose another SHARED_DIR"
        )
    return f"{free / 1e9:,.0f} GB free, 2 checkpoints need {need / 1e9:,.2f} GB"


def count_parameters(model_folder: Path) -> int | None:
    """From the manifest; else by the shape of a decoder-only model; None where that is not told."""
    known = files.read_manifest(model_folder).get("parameters")
    if known:
        return known
    config = json.loads((model_folder / "config.json").read_bytes())
    try:
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return embeddings + layers * hidden * (4 * hidden + 3 * config["intermediate_size"])
    except (KeyError, TypeError):
        return None


def make_run_folder(options: argparse.Namespace, config: Config, run: RunFolder) -> None:
    """Keep code, settings and environment, so that the job runs what was submitted."""
    run.create()
    snapshot = run.path / f".code.{os.getpid()}.tmp"
    shutil.rmtree(snapshot, ignore_errors=True)
    snapshot.mkdir()
    for name in SNAPSHOT:
        shutil.copy2(options.repository / name, snapshot / name)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(options.repository / "trainstack", snapshot / "trainstack", ignore=skipped)
    before = run.path / ".code.before"
    shutil.rmtree(before, ignore_errors=True)
    if (run.path / "code").exists():
        os.rename(run.path / "code", before)
    os.rename(snapshot, run.path / "code")
    shutil.rmtree(before, ignore_errors=True)
    files.replace_file(run.path / "config.yaml", config.to_yaml().encode())
    described = json.dumps(describe_environment(options.repository), indent=1)
    files.replace_file(run.path / "environment.json", described.encode())
    if not options.local:
        before_status = run.status()
        files.replace_file(run.path / ".status.before", json.dumps(before_status).encode())
    # Also here: a DONE of before would tell the job that there is nothing to do.
    state = STARTING if options.local else QUEUED
    run.set_status(state, job=None, attempt=None, exit_code=None, cause=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
