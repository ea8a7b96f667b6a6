"""YAML read as people mean it: 2e-5 is a number, yes is a text, no tags, no key twice.

Every value knows the line it stands on, for the messages.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from trainstack.errors import ConfigError, shown


def read_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """Nested values and, for each dotted key, the place ``file:line`` where it stands.

    Scalars follow YAML 1.2's core schema plus ``1_000`` for integers: ``2e-5`` is a number,
    ``yes`` and ``1:30`` are text. Tags are refused, so nothing can be constructed but plain values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with --config FILE") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another with --config FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(syntax_problem(path, text, error)) from None
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else f"a {root.id}"
        raise ConfigError(
            f"{path}: holds {found} where sections are expected; start from the shipped config.yaml"
        )
    places: dict[str, str] = {}
    problems: list[str] = []
    values = to_values(root, "", path.name, places, problems)
    if problems:
        raise ConfigError(*problems)
    return values, places


def syntax_problem(path: Path, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not YAML: {' '.join(str(error).split())}; mend or remove that character"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        what = "a tab at the start of the line; indent with spaces"
    else:
        problem = getattr(error, "problem", None) or "not YAML"
        what = f"{problem}; mend the line {line.strip()[:60]!r}"
    return f"{path.name}:{mark.line + 1}:{mark.column + 1}: {what}"


def to_values(node: yaml.Node, key: str, file: str, places: dict, problems: list) -> Any:
    """Plain values of a YAML node; fills ``places`` and ``problems`` on the way."""
    place = f"{file}:{node.start_mark.line + 1}"
    if node.tag.split(":")[-1] not in ("str", "seq", "map"):
        tag = shown(node.tag)
        problems.append(f"{place}: {key}: the tag {tag} is not allowed; write a plain value")
        return None
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [to_values(item, key, file, places, problems) for item in node.value]
    values = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
        dotted = f"{key}.{name}" if key else name
        place = f"{file}:{key_node.start_mark.line + 1}"
        if name in values:
            first = places[dotted].rpartition(":")[2]
            twice = f"stands twice, first on line {first}; remove one"
            problems.append(f"{place}: {shown(dotted)}: {twice}")
        places[dotted] = place
        values[name] = to_values(value_node, dotted, file, places, problems)
    return values


def scalar(text: str) -> Any:
    """A plain YAML scalar by the core schema of YAML 1.2."""
    if len(text) > 400:
        return text  # int() raises beyond 4300 digits
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]{3})*)", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return text if re.match(r"[-+]?0[0-9]", text) else float(text)
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.lower().replace(".", ""))
    return text


class Dumper(yaml.SafeDumper):
    """Quotes the texts that this module would read back as something else, such as a name 1e3."""


def _represent_text(dumper: yaml.Dumper, text: str) -> yaml.Node:
    style = None if isinstance(scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
