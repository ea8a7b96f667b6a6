"""What a run is: config.yaml read strictly, with every problem reported at once.

Command line: ``python -m trainstack config [--config FILE] [--world-size N] [key=value ...]``
prints the resolved configuration and the batch arithmetic. Imports neither torch nor transformers,
so that a check on a login node takes a blink.
"""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from trainstack.config.problems import describe, known_prefix, suggestion
from trainstack.config.schema import Config, SourceSection
from trainstack.config.strict_yaml import read_yaml, to_values
from trainstack.errors import ConfigError, shown
from trainstack.storage.layout import absolute

OWN_OF_A_SOURCE = {"revision": "main", "subset": None}  # not as the first data set's


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
