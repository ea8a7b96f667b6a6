"""YAML as people mean it: 2e-5 is a number, yes is a text, no tags, no repeated key.

The line of every key is kept, for the messages. Source: the core schema of YAML 1.2.2, section
10.3; PyYAML's own loaders follow YAML 1.1, to which ``2e-5`` is a text and ``yes`` is true.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from trainstack.errors import ConfigError, shown


def read_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """Nested values and, for each dotted key, its location ``file:line``.

    Tags are refused, so nothing can be constructed but plain values. ConfigError if the file cannot
    be read, is not YAML or has a repeated key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check its path") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file of settings") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(syntax_problem(path, text, error)) from None
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else f"a {root.id}"
        raise ConfigError(
            f"{path}: holds {found} instead of sections; start from the shipped config.yaml"
        )
    locations: dict[str, str] = {}
    problems: list[str] = []
    values = to_values(root, "", path.name, locations, problems)
    if problems:
        raise ConfigError(*problems)
    return values, locations


def syntax_problem(path: Path, text: str, error: yaml.YAMLError) -> str:
    """One line for text that is not YAML, with ``file:line:column`` if the parser knows it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not YAML: {' '.join(str(error).split())}; fix or remove that character"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        what = "a tab at the start of the line; indent with spaces"
    else:
        problem = getattr(error, "problem", None) or "not YAML"
        what = f"{problem}; fix the line {line.strip()[:60]!r}"
    return f"{path.name}:{mark.line + 1}:{mark.column + 1}: {what}"


def to_values(node: yaml.Node, key: str, file: str, locations: dict, problems: list) -> Any:
    """Plain values of a YAML node; adds to ``locations`` and ``problems`` what it finds below."""
    location = f"{file}:{node.start_mark.line + 1}"
    if node.tag.split(":")[-1] not in ("str", "seq", "map"):
        tag = shown(node.tag)
        problems.append(f"{location}: {key}: the tag {tag} is not allowed; write a plain value")
        return None
    if isinstance(node, yaml.ScalarNode):
        end = node.end_mark
        rest = end.buffer[end.index :].partition("\n")[0].strip(" \r\0")
        if not node.value and node.style is None and rest.startswith("#"):
            fix = "quote it if # is part of the value, else write null"
            problems.append(f"{location}: {key}: no value but a comment, {shown(rest)}; {fix}")
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [to_values(item, key, file, locations, problems) for item in node.value]
    values = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
        dotted = f"{key}.{name}" if key else name
        location = f"{file}:{key_node.start_mark.line + 1}"
        if name in values:
            first = locations[dotted].rpartition(":")[2]
            repeated = f"is repeated, first on line {first}; remove one"
            problems.append(f"{location}: {shown(dotted)}: {repeated}")
        locations[dotted] = location
        values[name] = to_values(value_node, dotted, file, locations, problems)
    return values


def scalar(text: str) -> Any:
    """The value of an unquoted scalar: the core schema of YAML 1.2, and ``1_000`` for integers."""
    if len(text) > 400:
        return text  # int() raises beyond 4300 digits
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]{3})*)", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return text if re.match(r"[-+]?0[0-9]", text) else float(text)  # 08 is a text, 0.8 is not
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.lower().replace(".", ""))
    return text


class Dumper(yaml.SafeDumper):
    """Quotes the texts that this module would read back as something else, such as a name 1e3."""


def _represent_text(dumper: yaml.Dumper, text: str) -> yaml.Node:
    style = None if isinstance(scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
