"""What is wrong with a setting, in one line: where it is, its value, and the fix."""

import difflib
import re
from pathlib import Path
from typing import Any

from trainstack.config.other_names import FOREIGN_NAMES
from trainstack.config.schema import Config
from trainstack.errors import shown


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
