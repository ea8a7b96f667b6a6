"""What a run is: config.yaml read strictly, with every problem reported at once.

Command line: ``python -m trainstack config [--config FILE] [--world-size N] [key=value ...]``
prints the resolved configuration and the batch arithmetic. Imports neither torch nor transformers,
so that a check on a login node takes a blink.
"""

import argparse
import difflib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainstack.config.other_names import FOREIGN_NAMES
from trainstack.config.schema import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GuardSection,
    LogSection,
    ModelSection,
    OptimSection,
    RunSection,
    Section,
    SourceSection,
    TrainSection,
    batch_problem,
)
from trainstack.config.strict_yaml import Dumper, read_yaml, to_values
from trainstack.errors import USAGE_ERROR, ConfigError, Refused, shown
from trainstack.storage.layout import absolute

OWN_OF_A_SOURCE = {"revision": "main", "subset": None}  # not as the first data set's
IGNORED_LABEL = -100  # "no loss here", for data and model alike; torch's and transformers' value


class Config(Section):
    """The whole of config.yaml; every value is there, none has a second default here."""

    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optim: OptimSection
    checkpoint: CheckpointSection
    eval: EvalSection
    guard: GuardSection
    log: LogSection

    def to_yaml(self) -> str:
        """The resolved configuration, as it is kept in the run folder."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """The settings that may not change when a run goes on: they decide what is learned from."""
        data = {f"data.{key}": value for key, value in self.data.model_dump().items()}
        if not self.data.mixture:
            del data["data.mixture"], data["data.weight"]
        model = {f"model.{key}": getattr(self.model, key) for key in ("name", "revision", "init")}
        return {
            "run.seed": self.run.seed,
            "train.global_batch_size": self.train.global_batch_size,
            **model,
            **data,
        }


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], run_name: str) -> None:
    """Refused, showing each setting that may not change between lives of one run."""
    different = [
        f"{key}={wanted.get(key)} (the run has {saved.get(key)})"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if different:
        raise Refused(
            f"run {run_name} cannot go on with {', '.join(different)}; "
            "put it back, or choose another run.name"
        )


@dataclass(frozen=True)
class BatchPlan:
    """How a step of ``global_batch_size`` sequences is spread over processes and micro steps."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    seq_len: int

    def __post_init__(self):
        if self.world_size < 1:
            raise ConfigError(f"{self.world_size} processes cannot train; ask for at least 1")
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise ConfigError(
                batch_problem(self.global_batch_size, self.micro_batch_size, self.world_size)
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} sequences = {self.world_size} processes"
            f" x {self.micro_batch_size} x {self.gradient_accumulation_steps} micro steps"
            f" = {self.tokens_per_step:,} tokens per step"
        )


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """The plan for ``world_size`` processes; ConfigError with the arithmetic where none exists."""
    train = config.train
    return BatchPlan(
        train.global_batch_size, train.micro_batch_size, world_size, config.data.seq_len
    )


def load(path: Path, overrides: list[str]) -> Config:
    """Read a file, apply ``key=value`` overrides, validate; ConfigError lists every problem."""
    try:
        values, places = read_yaml(path)
        problems = apply_overrides(values, places, overrides)
        complete_mixture(values)
    except RecursionError:  # an alias of itself, say
        raise ConfigError(f"{path}: nested without end; write sections with plain keys") from None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        described = {}
        for detail in error.errors():  # one per value: a union complains once per branch
            value = known_prefix(detail["loc"], values), repr(detail["input"])
            described.setdefault(value, describe(detail, values, places, path))
        found = list(dict.fromkeys([*problems, *described.values()]))
        meant = set(re.findall(r"did you mean ([\w.]+)\?", " ".join(found)))  # a typo, told once
        missing = (re.search(r": ([\w.]+): missing; ", problem) for problem in found)
        told = zip(found, missing, strict=True)
        raise ConfigError(*(p for p, key in told if not (key and key[1] in meant))) from None
    if problems:
        raise ConfigError(*problems)
    model = config.model.model_copy(update={"name": absolute(config.model.name)})
    return config.model_copy(update={"model": model})


def apply_overrides(values: dict, places: dict[str, str], overrides: list[str]) -> list[str]:
    """Set ``section.key=value`` pairs into ``values``; returns problems instead of raising."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        place = f"{shown(override)} (command line)"
        if not equals or override.startswith("-"):
            problems.append(f"{place}: not a setting; write section.key=value")
            continue
        section, *parents, last = dotted.split(".") if "." in dotted else ("", dotted)
        target, path = values.get(section), section
        for parent in parents:
            path = f"{path}.{parent}"
            places.setdefault(path, place)
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            problems.append(f"{place}: no such key; {suggestion(dotted)}")
            continue
        try:
            node = yaml.compose(text, Loader=yaml.BaseLoader)
            value = to_values(node, dotted, "command line", {}, problems) if node else None
        except yaml.YAMLError:  # a text such as "a: b: c"
            value = text
        target[last] = value
        for replaced in [key for key in places if key.startswith(f"{dotted}.")]:
            del places[replaced]
        places[dotted] = place
    return problems


def complete_mixture(values: dict) -> None:
    """What an entry of data.mixture leaves out is as in data; but its revision, its subset."""
    data = values.get("data")
    entries = data.get("mixture") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        return
    keys = SourceSection.model_fields.keys() - {"name", "weight"}
    shared = {key: data[key] for key in keys if key in data}
    data["mixture"] = [
        {**shared, **OWN_OF_A_SOURCE, **entry} if isinstance(entry, dict) else entry
        for entry in entries
    ]


def place_of(dotted: str, places: dict[str, str], path: Path) -> str:
    """Where a key stands, else the section around it, else the file."""
    while dotted and dotted not in places:
        dotted = re.sub(r"\.?[^.\[]*$|\[\d+\]$", "", dotted, count=1)
    return places.get(dotted, path.name)


def describe(detail: dict, values: dict, places: dict[str, str], path: Path) -> str:
    """One line of pydantic's findings in our words: place, key=value, what is wrong, the fix."""
    dotted = known_prefix(detail["loc"], values)
    kind, wanted = detail["type"], detail.get("ctx", {})
    place = place_of(dotted, places, path)
    if kind == "missing" and "[" in dotted:
        return f"{place}: {dotted}: missing; each data set of a mixture has its own"
    if kind == "missing":
        return f"{place}: {dotted}: missing; copy its line from the shipped config.yaml"
    if kind == "value_error":
        return f"{place}: {wanted['error']}"
    value = detail["input"]
    where = place if "(command line)" in place else f"{place}: {dotted}={shown(value)}"
    if kind == "extra_forbidden":
        where = place if "(command line)" in place else f"{place}: {shown(dotted)}"
        return f"{where}: no such key; {suggestion(dotted)}"
    return f"{where}: {expectation(kind, wanted, value, dotted)}"


def known_prefix(location: tuple, values: dict) -> str:
    """The dotted key of pydantic's location, without the union branches it appends."""
    dotted, depth = "", 0
    for part in location:
        if isinstance(values, list) and isinstance(part, int):
            dotted, values = f"{dotted}[{part}]", values[part]
            continue
        if not isinstance(values, dict) or (part not in values and depth > 1 and "[" not in dotted):
            break
        dotted, depth = f"{dotted}.{part}" if dotted else str(part), depth + 1
        values = values.get(part)
    return dotted


def expectation(kind: str, wanted: dict, value: Any, dotted: str) -> str:
    """What would have been right, with an example to copy."""
    if kind in ("greater_than_equal", "greater_than", "less_than", "less_than_equal"):
        sign = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        limits = [f"{words} {wanted[key]:g}" for key, words in sign.items() if key in wanted]
        return f"out of range; write a number {' and '.join(limits)}"
    if kind == "finite_number":
        return "not a finite number; write for example 2e-5"
    if kind.startswith(("int", "float")):
        example, noun = ("8", "whole number") if kind.startswith("int") else ("2e-5", "number")
        return f"not a {noun}; write for example {example}"
    if kind.startswith("bool"):
        return "neither true nor false; write one of the two"
    if kind == "literal_error":
        options = wanted["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), re.split(r", | or ", options), 1)
        return f"not one of {options}" + (f"; did you mean {near[0]}?" if near else "; choose one")
    if kind == "string_pattern_mismatch":
        return "not a plain name; use letters, digits, dot, dash and underscore, at most 100"
    if kind in ("string_type", "string_too_short"):
        return 'not a text; write it in quotes, for example "name"'
    if kind in ("model_type", "model_attributes_type"):
        return f"not a section; put its keys below {dotted}:, indented by two spaces"
    return f"wrong type ({kind.replace('_', ' ')}); see the shipped config.yaml for an example"


def all_keys() -> list[str]:
    """Every dotted key that config.yaml has."""
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields
    ]


def suggestion(dotted: str) -> str:
    """The fix for an unknown key: the nearest of ours, also for the names of other trainers."""
    dotted = re.sub(r"\.mixture\[\d+\]", "", dotted)
    name = dotted.rpartition(".")[2]
    keys = all_keys()
    if name in FOREIGN_NAMES and FOREIGN_NAMES[name] is None:
        return "it is derived from the batch sizes and the number of processes; remove it"
    exact = FOREIGN_NAMES.get(name) or next((k for k in keys if k.endswith(f".{name}")), None)
    near = [exact] if exact else difflib.get_close_matches(dotted, keys, 1, 0.6)
    if not near:
        last = {key.rpartition(".")[2]: key for key in keys}
        near = [last[n] for n in difflib.get_close_matches(name, list(last), 1, 0.6)]
    return f"did you mean {near[0]}?" if near else "remove it; config.yaml lists every key"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack config", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--world-size", type=int, default=1, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config, options.overrides)
        plan = batch_plan(config, options.world_size)
    except ConfigError as error:
        print(error.report("config"), file=sys.stderr)
        return USAGE_ERROR
    print(config.to_yaml())
    print(f"# {plan}")
    if config.train.max_steps:
        tokens = config.train.max_steps * plan.tokens_per_step
        print(f"# {config.train.max_steps:,} steps = {tokens:,} tokens")
        print("# train.num_train_epochs is not used: train.max_steps decides")
    return 0


def steps_for(config: Config, num_samples: int) -> int:
    """Steps of the run: max_steps, else those that cover num_train_epochs of ``num_samples``."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return math.ceil(config.train.num_train_epochs * num_samples / config.train.global_batch_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
