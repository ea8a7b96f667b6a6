"""``python -m trainstack eval``: how good a checkpoint of a run is, or any model in a folder.

A run's checkpoint is evaluated as in the run: with its settings, on its held-out data; a folder of
a Hugging Face model on the held-out data of --config. data.name, data.subset or data.split on the
command line name other data: then all of that split is evaluated. Tokens that are not there are
made first. On several processes: -m torch.distributed.run --nproc-per-node=N -m trainstack eval ...
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainstack import distributed
from trainstack.adapter.base import check_base
from trainstack.checkpoint.snapshot import CONFIG
from trainstack.checkpoint.state import read_state
from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data.corpus import open_corpus
from trainstack.distributed import World
from trainstack.errors import ConfigError, Failed
from trainstack.evaluation.held_out import Evaluation, evaluate_all, overall
from trainstack.evaluation.samples import Prompts, Said, files_beside
from trainstack.hub.asset import named_assets
from trainstack.hub.fetch import provide
from trainstack.model.causal_lm import build_model, check_kind, read_config
from trainstack.model.loss import CausalLMLoss
from trainstack.options import parse, parser_of
from trainstack.run.folder import find_checkpoint
from trainstack.storage import layout, manifest

NAMES_DATA = {"data.name", "data.subset", "data.split"}
HOLDS_OUT = {"data.eval_split", "data.eval_fraction"}


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and by which settings."""

    folder: Path  # of the model
    config_file: Path
    overrides: list[str]
    checkpoints: Path | None  # of the run whose own data it is evaluated on
    is_whole: bool  # all of a split is held out

    @property
    def config(self) -> Config:
        return load(self.config_file, self.overrides)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    try:
        subject = find_subject(options.model, options.home, options.config, options.overrides)
        config = subject.config
        distributed.set_numerics(config.train.precision, config.train.deterministic)
        world = distributed.start(None)
        results, said = measure(subject, config, options.home, world)
    except ConfigError as error:
        if not distributed.rank():  # it tells for all
            print(error.report("eval"), file=sys.stderr, flush=True)
        os._exit(error.code)  # taking a process group apart may abort (gloo, 2.13)
    if world.is_main:
        show = print_json if options.json else print_lines
        show(subject, results, said)
    distributed.gather(None)  # all leave together
    sys.stdout.flush()
    os._exit(0)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("eval", __doc__)
    parser.add_argument("model", metavar="RUN[@STEP|@best] | FOLDER")
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: the run's")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parse(parser, arguments)


def find_subject(model: str, home: Path, file: Path | None, overrides: list[str]) -> Subject:
    """By a run's name or folder, or by a model's folder. ConfigError if it is neither."""
    named = {override.partition("=")[0] for override in overrides}
    is_other, is_whole = (
        bool(named & NAMES_DATA),
        bool(named & NAMES_DATA) and not named & HOLDS_OUT,
    )
    settings = []
    if is_other:
        settings += ["data.mixture=[]", "data.weight=null", "eval.eval_samples=null"]
    if "data.name" in named:  # the others are of the data set before
        settings += ["data.revision=main", "data.subset=null"]
    if is_whole:
        settings += ["data.eval_split=null", "data.eval_fraction=0"]
    given = Path(model).expanduser()
    try:
        run, folder = find_checkpoint(model, home)
    except ConfigError:
        if (given / layout.ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{model} is an adapter; name its run, or export it with --merge"
            ) from None
        if not (given / CONFIG).is_file():
            raise
        settings += [f"model.name={given.resolve()}", "model.init=pretrained"]
        settings += ["model.revision=main", "adapter.type=null"]
        file = file or layout.CODE / "config.yaml"
        return Subject(given.resolve(), file, [*settings, *overrides], None, is_whole)
    if problem := next(manifest.damage(folder, manifest.TRUSTED_BY_SIZE), None):
        raise ConfigError(f"{folder} is damaged ({problem}); name another step, as RUN@STEP")
    kept = None if is_other else run.checkpoints
    own = file or run.path / "config.yaml"
    return Subject(folder, own, [*settings, *overrides], kept, is_whole)


def measure(
    subject: Subject, config: Config, home: Path, world: World
) -> tuple[dict[str, Evaluation], list[Said]]:
    """Each data set, by its label, and what the model says to the prompts. Collective."""
    folder = subject.folder  # of an adapter, the model is elsewhere
    model_folder = layout.model_folder(home, config.model.name) if config.adapter.type else folder
    if config.adapter.type:  # once, for it reads every byte
        saved, name = read_state(folder).identity, config.model.name
        distributed.main_decides(world, lambda: check_base(saved, model_folder, name))
    check_kind(read_config(model_folder), "pretrained")
    distributed.main_decides(world, lambda: make_ready(subject, config, home))
    corpus = open_corpus(home, config, subject.checkpoints)
    for store in corpus.stores.values() if subject.is_whole else ():
        store.hold_out_all()
    if not any(store.eval.num_samples for store in corpus.stores.values()):
        raise ConfigError(
            f"nothing is held out of {' and '.join(corpus.stores)}; name other data, as data.split="
            "test or data.name=./texts.jsonl"
        )
    causal_lm = build_model(config, folder, model_folder)
    data = config.data
    train = config.train.model_copy(update={"torch_compile": False})  # it takes longer than a pass
    loss_model = CausalLMLoss(causal_lm, train, world.device, data.packing, data.seq_len)
    results = evaluate_all(corpus, config, loss_model, world, lambda: False)
    prompts = Prompts(config, corpus.is_chat, files_beside(causal_lm, folder, corpus))
    return results, prompts.ask(loss_model, world, lambda: False) or []


def make_ready(subject: Subject, config: Config, home: Path) -> None:
    """Make the tokens, if they are not there, of files that are here. Failed if it cannot be."""
    try:
        open_corpus(home, config, subject.checkpoints)
        return
    except ConfigError:
        pass
    what = ["--config", str(subject.config_file), *subject.overrides]
    for asset in named_assets(config, home):
        if asset.folder.exists() or asset.name == layout.DEMO:
            continue
        if not layout.is_local(asset.name):
            fetch = " ".join(["bash download_data_model.sh", *what])
            raise Failed(f"{asset} is not here; run: {fetch}")
        provide(asset, is_forced=False, retry_delay=0)
    paths = [str(layout.CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # Apart, since processes that tokenise cannot be forked from here.
    call = [sys.executable, "-m", "trainstack", "prepare", "--home", str(home), *what]
    if subprocess.run(call, env=variables, stdout=sys.stderr).returncode:
        raise Failed("the tokens could not be made, as was just told; correct that first")


def print_lines(subject: Subject, results: dict[str, Evaluation], said: list[Said]) -> None:
    """For people."""
    print(f"{subject.folder} on {', '.join(results)}\n{overall(results.values())}")
    for label, part in results.items() if len(results) > 1 else ():
        print(f"  {label}: {part}")
    for one in said:
        print(f"\n{one.text}\n  ({one.end})" if one.text else f"\n{one.prompt}: {one.problem}")


def print_json(subject: Subject, results: dict[str, Evaluation], said: list[Said]) -> None:
    """For programs: the names of metrics.jsonl."""
    sources = {label: part.record() for label, part in results.items()}
    whole = {"model": str(subject.folder), **overall(results.values()).record()}
    print(json.dumps({**whole, "sources": sources, "samples": [one._asdict() for one in said]}))
