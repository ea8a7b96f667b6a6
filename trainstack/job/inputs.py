"""What the run needs on disk: model, data, tokens, space."""

import contextlib
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

from trainstack.adapter.base import base_of
from trainstack.checkpoint.names import (
    BYTES_PER_PARAMETER,
    check_not_lost,
    kept_stores,
    newest_state,
)
from trainstack.config.schema import Config
from trainstack.data import store
from trainstack.data.corpus import Corpus, enough_samples, open_corpus
from trainstack.errors import ConfigError, Failed
from trainstack.hub.asset import Asset, named_assets, needed_assets
from trainstack.hub.fetch import CHANGED, NO_WEIGHTS, inspect
from trainstack.prepare import demo
from trainstack.run.folder import RunFolder
from trainstack.run.identity import changed_settings, check_identity, identity, identity_beside
from trainstack.storage import files, layout
from trainstack.storage.manifest import MANIFEST, TRUSTED_BY_SIZE, damage, read_manifest


def check_folder(path: Path) -> None:
    """Failed if the run folder is no folder or cannot be written."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise Failed(f"{path} is not a folder; move it away, or choose another run.name")
    parent = path if path.exists() else path.parent
    if parent.exists() and not os.access(parent, os.W_OK):
        raise Failed(f"{parent} cannot be written; ask its owner, or choose another SHARED_DIR")


def prepare_demo(
    home: Path, config_file: Path, overrides: list[str], config: Config, checkpoints: Path
) -> None:
    """Build the built-in demo if the configuration names it and the run's is not there."""
    names = {config.model.name, *(section.name for section in config.data.sources)}
    if names != {layout.DEMO} or not input_problem(home, config, "", checkpoints):
        return
    command = [sys.executable, "-m", "trainstack", "prepare", "--home", home]
    command += ["--config", config_file, *overrides]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise Failed("the demo could not be prepared; the line above says why")


def download_command(repository: Path, config_file: Path, overrides: list[str]) -> str:
    """What fetches the inputs of this run: with its config file and its choice of inputs."""
    command = ["bash", "download_data_model.sh"]
    if config_file != repository / "config.yaml":
        command += ["--config", str(config_file)]
    command += [word for word in overrides if word.startswith(("model.", "data."))]
    return shlex.join(command)


def check_inputs(home: Path, config: Config, command: str, checkpoints: Path) -> Corpus:
    """What the run learns from, once model, data and tokens are known to be there and whole.

    ``checkpoints``: of the run. Failed, with the ``command`` that fixes it, if something is not.
    """
    problem = input_problem(home, config, command, checkpoints)
    if problem:
        raise Failed(problem)
    corpus = open_corpus(home, config, checkpoints)
    enough_samples(config, corpus)
    return corpus


def input_problem(
    home: Path, config: Config, command: str, checkpoints: Path | None = None
) -> str | None:
    """What is missing or damaged of model, data sets and tokens, and what fixes it.

    A run that has a checkpoint needs its tokens, and nothing of what they were made from.
    """
    kept = kept_stores(checkpoints)
    for asset in needed_assets(config, home, bool(kept)):
        if problem := asset_problem(asset, command):
            return f"{asset} {problem}"
    stores = store.find_stores(home, config, kept)
    for section, folder in zip(config.data.sources, stores, strict=True):
        problem = next(damage(folder, TRUSTED_BY_SIZE), None)
        if problem:
            return f"the tokens of {section.name} are not ready ({problem}); run: {command}"
    return None


def not_needed(home: Path, config: Config, checkpoints: Path) -> list[str]:
    """What is gone or has changed of a run's start, and does not matter to it any more; lines."""
    if not kept_stores(checkpoints):
        return []
    found = []
    for asset in named_assets(config, home):
        if asset in needed_assets(config, home, has_checkpoint=True):
            continue
        original = Path(asset.name)
        is_gone = layout.is_local(asset.name) and not original.exists()
        if is_gone or not asset.folder.exists():
            where = "is gone" if is_gone else "is not in the project any more"
            found.append(f"{asset} {where}; not needed: the run has a checkpoint and its tokens")
        elif asset.kind == "model" and (problem := asset_problem(asset, "")):
            problem = problem.partition("; ")[0]
            found.append(f"{asset} {problem}; not used: the run has a checkpoint")
    return found


def model_source(home: Path, config: Config, checkpoints: Path) -> Path:
    """The folder of the model that a run starts from: its own checkpoint, where that model is gone.

    Called once a run without a checkpoint is known to have its model.
    """
    folder = layout.model_folder(home, config.model.name)
    is_there = (folder / "config.json").exists() and (folder / MANIFEST).exists()
    if is_there:
        return folder
    step, saved = newest_state(checkpoints)
    return checkpoints / f"checkpoint-{step}" if saved else folder


def asset_problem(asset: Asset, command: str) -> str | None:
    """Why a model or a data set in its folder cannot be used, and what fixes it."""
    if not asset.folder.exists():
        if layout.is_local(asset.name) and not Path(asset.name).exists():
            return "is not there: no such file or folder; check its path"
        return f"is not in the project's folder yet; run: {command}"
    try:
        _, problem = inspect(asset)
    except ConfigError as error:
        return f"cannot be used: {error}"
    if problem.startswith(CHANGED):
        return f"{problem}; if that is meant, run: FORCE_REFRESH=1 {command}"
    if problem == NO_WEIGHTS and asset.name == layout.DEMO:
        return "has no weights; set model.init=scratch"
    if not problem and asset.name == layout.DEMO and not demo.is_current(asset.folder):
        problem = "was made by another version of this code"
    scratch = ", or set model.init=scratch" if problem == NO_WEIGHTS else ""
    return problem and f"{problem}; run: {command}{scratch}"


def check_settings(run: RunFolder, config: Config) -> None:
    """Refused if another experiment made the run, as far as its settings tell, without its data.

    ConfigError if a tracker that it names is not installed.
    """
    for name in {*layout.TRACKERS} & {*config.log.report_to}:
        if layout.tracker_packages(run.path.parents[1], name) is None:
            raise ConfigError(
                f"log.report_to: {name} is not installed; run: TRACKERS={name} bash setup.sh, or "
                "leave it out"
            )
    _, saved = newest_state(run.checkpoints)
    if saved:
        wanted = identity_beside(config, saved.identity)
        check_identity(saved.identity, wanted, config.run.name)


def check_progress(run: RunFolder, config: Config, corpus: Corpus) -> tuple[int, list[str]]:
    """The step that the run has reached, and the settings that it continues with and had not.

    Refused if another experiment made it.
    """
    step, saved = newest_state(run.checkpoints)
    if saved is None:
        check_not_lost(run.checkpoints, run.events())
        return step, []
    wanted = identity(config, corpus.key, base_of(run.path.parents[1], config))
    check_identity(saved.identity, wanted, config.run.name)
    changes = changed_settings(saved.settings, config.model_dump())
    begun = next((event["at"] for event in run.events()), "")
    brought = {}
    with contextlib.suppress(OSError, ValueError):  # it is gone
        brought = read_manifest(layout.model_folder(run.path.parents[1], config.model.name))
    if begun and brought.get("fetched_at", "") > begun:  # both in UTC, as text
        changes.append("model.name was brought again since, which changes nothing in this run")
    return step, changes


def check_further(run: RunFolder, config: Config, step: int, max_steps: int) -> None:
    """ConfigError if a run has made more steps than it is asked for, or a branch has none left."""
    key = "num_train_epochs" if config.train.max_steps is None else "max_steps"
    has_begun = config.run.parent is None or config.run.parent[1] < step
    if step > max_steps or (step == max_steps and not has_begun):
        raise ConfigError(
            f"train.{key} asks for {max_steps:,} steps, and run {run.path.name} has made {step:,}; "
            "ask for more, or choose another run.name"
        )


def way_further(run: RunFolder, config: Config, step: int, max_steps: int) -> str:
    """What would let a run that is DONE make more steps; empty if it has some to make."""
    if run.status().get("state") != "DONE":
        return ""
    key = "num_train_epochs" if config.train.max_steps is None else "max_steps"
    if step >= max_steps:
        fewer = f"train.{key} asks for fewer steps, {max_steps:,}"
        return fewer if step > max_steps else f"to go further raise train.{key}"
    stops = [event for event in run.events() if event["event"] == "early_stop"]
    is_here = bool(stops) and stops[-1]["step"] == step
    if is_here and stops[-1]["evaluations"] >= (config.eval.patience or math.inf):
        why = stops[-1]["cause"]
        return f"it stopped early: {why}; to go further raise eval.patience, or set it null"
    return ""


def check_space(home: Path, config: Config, parameters: int) -> str:
    """How much space there is, and is needed; Failed if two checkpoints would not fit."""
    need = 2 * parameters * BYTES_PER_PARAMETER
    free = files.check_space(home, need, f"two checkpoints of {config.model.name} need")
    return f"{free / 1e9:,.0f} GB free, 2 checkpoints need {need / 1e9:,.2f} GB"
