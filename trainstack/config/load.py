"""Reads a Config: a YAML file, then ``key=value`` overrides, then every check at once."""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from trainstack.config.problems import describe, known_prefix, suggestion
from trainstack.config.schema import Config, SourceSection
from trainstack.config.strict_yaml import read_yaml, to_values
from trainstack.errors import ConfigError, shown
from trainstack.storage.layout import CODE

SHIPPED = CODE / "config.yaml"
OWN_OF_A_SOURCE = {"revision": "main", "subset": None}  # not as the first data set's

RETIRED = {  # name of a setting in earlier versions -> its name now, and its value then as one now
    "eval.sample_prompt": ("eval.prompts", lambda prompt: [] if prompt is None else [prompt]),
}


def load(path: Path, overrides: list[str]) -> Config:
    """Read a file, apply ``key=value`` overrides, validate; ConfigError lists every problem."""
    try:
        values, locations = read_yaml(path)
        rename_retired(values, locations)
        add_shipped(values, locations, path)
        problems = apply_overrides(values, locations, overrides)
        rename_retired(values, locations)
        complete_mixture(values)
    except RecursionError:  # an alias of itself, say
        raise ConfigError(f"{path}: nested without end; write sections with plain keys") from None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = {}  # by key and value: of a union each branch refuses, told once
        for detail in error.errors():
            value = known_prefix(detail["loc"], values), repr(detail["input"])
            found.setdefault(value, describe(detail, values, locations, path))
        raise ConfigError(*without_echoes([*problems, *found.values()])) from None
    if problems:
        raise ConfigError(*problems)
    return config


def rename_retired(values: dict, locations: dict[str, str]) -> None:
    """Take settings by the names that earlier versions had for them, as a run of then has them."""
    for old, (new, as_now) in RETIRED.items():
        section, _, key = old.partition(".")
        own = values.get(section)
        if isinstance(own, dict) and key in own:
            places = locations[old], locations.get(new, "")
            if len({"(command line)" in place for place in places}) == 1 and places[1]:
                raise ConfigError(f"{places[0]}: {old} is named {new} now, and both are set")
            own[new.partition(".")[2]] = as_now(own.pop(key))
            locations[new] = locations.pop(old)


def add_shipped(values: dict, locations: dict[str, str], path: Path) -> None:
    """Give the settings of another file what the shipped one has and it does not.

    The copy of the code that a run keeps has no such file, for its own is whole.
    """
    if not SHIPPED.exists() or path.resolve() == SHIPPED:
        return
    shipped, shipped_locations = read_yaml(SHIPPED)
    for key, location in shipped_locations.items():
        locations.setdefault(key, location)
    for section, settings in shipped.items():
        own = values.setdefault(section, {})
        if isinstance(own, dict) and isinstance(settings, dict):
            values[section] = settings | own


def apply_overrides(values: dict, locations: dict[str, str], overrides: list[str]) -> list[str]:
    """Set ``section.key=value`` pairs into ``values``; returns problems instead of raising."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        location = f"{shown(override)} (command line)"
        if not equals or not dotted.strip() or override.startswith("-"):
            problems.append(f"{location}: not a setting; write section.key=value, without spaces")
            continue
        section, *parents, last = dotted.split(".") if "." in dotted else ("", dotted)
        target, above = values.get(section), section
        for parent in parents:
            above = f"{above}.{parent}"
            locations.setdefault(above, location)
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            problems.append(f"{location}: no such key; {suggestion(dotted, text)}")
            continue
        node = whole_node(text)
        value = to_values(node, dotted, "command line", {}, problems) if node else text or None
        target[last] = value
        for replaced in [key for key in locations if key.startswith(f"{dotted}.")]:
            del locations[replaced]
        locations[dotted] = location
    return problems


def whole_node(text: str) -> yaml.Node | None:
    """The value that YAML reads in a text; None if it takes a part of it for something else.

    Such as a comment (###), a document's beginning (---), an anchor (&a), a block (|).
    """
    text = text.strip()
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:  # "a: b: c", say
        return None
    if node is None or (node.start_mark.index, node.end_mark.index) != (0, len(text)):
        return None
    if isinstance(node, yaml.ScalarNode):
        is_whole = node.value == text if node.style is None else node.style in "'\""
    else:
        is_whole = node.flow_style
    return node if is_whole else None


def complete_mixture(values: dict) -> None:
    """Give each entry of data.mixture what it does not set: the value that ``data`` has.

    Its revision and its subset are its own: another data set has others.
    """
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


def without_echoes(problems: list[str]) -> list[str]:
    """Each problem once; a key that another problem suggests is not reported as missing too."""
    suggested = re.findall(r"did you mean ([\w.]+)\?", " ".join(problems))
    echoes = [f": {key}: missing; " for key in suggested]
    return [p for p in dict.fromkeys(problems) if not any(echo in p for echo in echoes)]
