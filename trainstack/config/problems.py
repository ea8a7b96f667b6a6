"""What is wrong with a setting, in one line: its location, its value, and the fix."""

import contextlib
import difflib
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

from trainstack.config.names import NOTHING, SEVERAL, SEVERAL_SPLITS
from trainstack.config.other_names import FIRST_KEYS, OTHER_NAMES, OTHER_VALUES
from trainstack.config.schedules import settings_of
from trainstack.config.schema import Config
from trainstack.errors import shown

YES, NO = ("yes", "on", "y", "1", "true"), ("no", "off", "n", "0", "false")


def describe(detail: dict, values: dict, locations: dict[str, str], path: Path) -> str:
    """One of pydantic's findings as one line: location, key=value, what is wrong, the fix.

    ``locations``: ``file:line``, or the override, of each dotted key; ``path``: the file.
    """
    dotted = known_prefix(detail["loc"], values)
    kind, limits = detail["type"], detail.get("ctx", {})
    location = location_of(dotted, locations, path)
    if kind in ("missing", "extra_forbidden") and detail["loc"][1:-1] == ("lr_scheduler_kwargs",):
        return f"{location}: {schedule_problem(values['optim'], detail['loc'][-1])}"
    if kind == "missing" and "[" in dotted:
        return f"{location}: {dotted}: missing; each data set of a mixture has its own"
    if kind == "missing":
        return f"{location}: {dotted}: missing; copy its line from the shipped config.yaml"
    if kind == "value_error":  # raised by a section's own check, which names its keys
        return f"{location}: {limits['error']}"
    value = detail["input"]
    # An override shows key and value itself, if it is about that key alone.
    is_override = "(command line)" in location and dotted in location
    if kind == "extra_forbidden" and "." in str(detail["loc"][0]):
        section, _, key = str(detail["loc"][0]).partition(".")
        return f"{location}: {shown(dotted)}: a file has sections; write {section}: {{{key}: ...}}"
    if kind == "extra_forbidden":
        key = location if is_override else f"{location}: {shown(dotted)}"
        return f"{key}: no such key; {suggestion(dotted)}"
    setting = location if is_override else f"{location}: {dotted}={shown(value)}"
    if kind in ("string_type", "string_too_short"):
        fix = text_meant(value, location if is_override else "")
        one = re.fullmatch(r"data\.(?:.*\.)?(name|split|eval_split|subset)", dotted)
        if one and isinstance(value, list | dict):
            fix = SEVERAL if one[1] == "name" else SEVERAL_SPLITS
        return f"{setting}: not a text; {fix}"
    if is_word_for_nothing(value) and is_optional(dotted):
        return f"{setting}: write null if you mean none"
    return f"{setting}: {expectation(kind, limits, value, dotted)}"


def known_prefix(keys: tuple, values: dict) -> str:
    """The dotted key of pydantic's path of keys, without the union branches that it appends."""
    dotted, depth = "", 0
    for key in keys:
        if isinstance(values, list) and isinstance(key, int):
            dotted, values = f"{dotted}[{key}]", values[key]
            continue
        if not isinstance(values, dict) or (key not in values and depth > 1 and "[" not in dotted):
            break
        dotted, depth = f"{dotted}.{key}" if dotted else str(key), depth + 1
        values = values.get(key)
    return dotted


def location_of(dotted: str, locations: dict[str, str], path: Path) -> str:
    """The location of a key, else of the section around it, else the file."""
    while dotted and dotted not in locations:
        dotted = re.sub(r"\.?[^.\[]*$|\[\d+\]$", "", dotted, count=1)
    return locations.get(dotted, path.name)


def expectation(kind: str, limits: dict, value: Any, dotted: str) -> str:
    """What would have been right, with an example to copy."""
    if kind in ("greater_than_equal", "greater_than", "less_than", "less_than_equal"):
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        bounds = [f"{word} {limits[key]:,}" for key, word in words.items() if key in limits]
        nothing = ", or null" if is_optional(dotted) else ""
        return f"out of range; write a number {' and '.join(bounds)}{nothing}"
    if kind == "finite_number":
        return "not a finite number; write for example 2e-5"
    if kind.startswith(("int", "float")):
        return number_expected(kind[:3] == "int", value, dotted)
    if kind.startswith("bool"):
        word = str(value).strip().lower()
        meant = "true" if word in YES else "false" if word in NO else "one of the two"
        return f"neither true nor false; write {meant}"
    if kind == "list_type":
        return f"not a list; {other_value(dotted, value) or f'write {list_meant(dotted, value)}'}"
    if kind == "dict_type":
        return "no keys with values; write {key: value, other: value}, or {} for none"
    if kind == "literal_error":
        options = limits["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), re.split(r", | or ", options), 1)
        hint = f"did you mean {near[0]}?" if near else "choose one"
        if dotted == "adapter.target_modules" and not near:
            names = ", ".join(re.findall(r"[\w.]+", str(value)))
            hint = f"write a list: [{names}]"
        return f"not one of {options}; {other_value(dotted, value) or hint}"
    if kind == "string_pattern_mismatch":
        return "not a plain name; use letters, digits, dot, dash and underscore, at most 100"
    if kind == "nothing":
        return "would be taken as a text; write null if you mean none"
    if kind == "name":
        return limits["fix"]
    if kind in ("model_type", "model_attributes_type"):
        return f"not a section; {section_meant(dotted, value)}"
    return f"wrong type ({kind.replace('_', ' ')}); see the shipped config.yaml for an example"


def other_value(dotted: str, value: Any) -> str | None:
    """The fix for a value that other trainers take."""
    return OTHER_VALUES.get(f"{dotted.partition('[')[0]}={value}")


def number_expected(is_whole: bool, value: Any, dotted: str) -> str:
    """What is wrong with what is no number, with the one that was meant or an example."""
    example, noun = ("8", "whole number") if is_whole else ("2e-5", "number")
    meant = number_meant(str(value), noun)
    if is_whole and isinstance(value, float) and 0 < value < 1:
        is_warmup = dotted == "optim.warmup_steps"
        fix = f"optim.warmup_ratio={value:g}" if is_warmup else f"for example {example}"
        return f"not a whole number: it counts, and is no share; write {fix}"
    if meant == value:
        return f"in quotes it is a text; write {meant} without them"
    words = words_of(dotted)
    near = difflib.get_close_matches(str(value), words, 1)
    fix = f"did you mean {near[0]}?" if near else f"write {meant or f'for example {example}'}"
    kinds = " or ".join([", ".join([noun, *words[:-1]]), *words[-1:]])
    return f"not a {kinds}; {other_value(dotted, value) or fix}"


def list_meant(dotted: str, value: Any) -> str:
    """The list that was meant by what is none."""
    if dotted == "log.report_to" and value not in words_of(dotted):
        return "[tensorboard], or [] for metrics.jsonl alone"
    item = "" if value is None else shown(value)
    if dotted == "eval.prompts" and isinstance(value, str):  # a question mark wants quotes in YAML
        return f"'[{json.dumps(value.strip('[]'))}]'"
    return f"[{{name: {item}, weight: null}}]" if dotted == "data.mixture" and item else f"[{item}]"


def section_meant(dotted: str, value: Any) -> str:
    """What was meant by a value where a section is wanted."""
    if isinstance(value, str) and (pair := re.fullmatch(r"(\w+):(\S.*)", value)):
        return f"a blank is missing, write {pair[1]}: {pair[2]}"
    if isinstance(value, str) and dotted in FIRST_KEYS:
        return f"write {dotted}: {{{FIRST_KEYS[dotted]}: {shown(value)}}}"
    if isinstance(value, str) and dotted in OTHER_NAMES:
        return OTHER_NAMES[dotted]
    return f"put its keys below {dotted}:, indented by two spaces"


def number_meant(text: str, noun: str) -> str:
    """The number that was written in another way, as we read it; empty if there is none."""
    plain = re.sub(r"[,_](?=\d{3}\b)", "", text.strip()).lower()
    factors = {"%": 0.01, "k": 1e3, "m": 1e6}
    factor = factors.get(plain[-1:], 1)
    with contextlib.suppress(ValueError):
        number = float(plain[:-1] if factor != 1 else plain) * factor
        if noun == "number" and math.isfinite(number):
            return f"{number:g}"
        if number.is_integer():
            return f"{int(number)}"
    return ""


def text_meant(value: Any, override: str) -> str:
    """The fix for what YAML takes for no text; the shell takes quotes away from an override."""
    key, _, text = override.removesuffix(" (command line)").partition("=")
    if isinstance(value, (int, float)) and text:
        return f"write it in quotes: {key}='\"{text}\"'"
    return 'write it in quotes, for example "name"'


def is_word_for_nothing(value: Any) -> bool:
    return value is False or str(value).strip().lower() in (*NOTHING, "off", "never", "no")


def types_of(dotted: str) -> tuple:
    """The types that a setting may have, if they are several."""
    section, _, key = dotted.partition(".")
    field = Config.model_fields[section].annotation.model_fields.get(key)
    return typing.get_args(field.annotation) if field else ()


def is_optional(dotted: str) -> bool:
    """Whether a setting may be null."""
    return type(None) in types_of(dotted)


def words_of(dotted: str) -> list[str]:
    """The words that a setting takes beside other types."""
    types = (each for each in types_of(dotted) if typing.get_origin(each) is typing.Literal)
    return [word for each in types for word in typing.get_args(each)]


def schedule_problem(optim: dict, key: str) -> str:
    """A setting that the schedule does not take, or lacks; with the fix."""
    name, given = optim["lr_scheduler_type"], optim["lr_scheduler_kwargs"]
    taken = settings_of(name).model_fields
    whole = "optim.lr_scheduler_kwargs"
    if key in taken:
        return f"{whole}: {name} needs {key}; write for example {whole}={{{key}: 100}}"
    kept = ", ".join(f"{k}: {shown(value)}" for k, value in given.items() if k in taken)
    known = ", ".join(taken) or "no settings"
    return f"{whole}: {name} takes {known}, and not {shown(key)}; write {whole}={{{kept}}}"


def suggestion(dotted: str, value: str = "") -> str:
    """The fix for an unknown key: the nearest of ours, also for the names of other trainers.

    ``value``: what was written for a section, where its keys are.
    """
    dotted = re.sub(r"\.mixture\[\d+\]", "", dotted)
    name = dotted.rpartition(".")[2]
    if dotted in Config.model_fields:
        is_value = value not in ("", "null")
        if is_value and dotted in OTHER_NAMES:
            return f"{dotted} is a section; {OTHER_NAMES[dotted]}"
        pair = f"{FIRST_KEYS[dotted]}={shown(value)}" if is_value and dotted in FIRST_KEYS else ""
        return f"{dotted} is a section: write {dotted}.{pair or 'key=value'}"
    keys = all_keys()
    section = difflib.get_close_matches(dotted, Config.model_fields, 1, 0.6)
    if section and "." not in dotted and dotted not in OTHER_NAMES:
        return f"did you mean {section[0]}?"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    exact = next((k for k in keys if k.endswith(f".{name}")), None)
    near = [exact] if exact else difflib.get_close_matches(dotted, keys, 1, 0.6)
    if not near:  # perhaps in a wrong section: by the last part alone
        by_name = {key.rpartition(".")[2]: key for key in keys}
        near = [by_name[n] for n in difflib.get_close_matches(name, list(by_name), 1, 0.6)]
    return f"did you mean {near[0]}?" if near else "remove it; config.yaml lists every key"


def all_keys() -> list[str]:
    """Every dotted key that config.yaml has."""
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields
    ]
