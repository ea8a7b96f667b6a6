"""Which columns of a record make it one of a format, under the names that data.columns gives."""

import difflib
import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

from trainstack.chat.messages import KNOWN_ROLES, MARKS, THOUGHTS
from trainstack.config.schema import SourceSection
from trainstack.errors import ConfigError, DataError

COLUMNS = {  # what makes a record one of a format; text is recognised by data.text_field
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
CHAT_COLUMNS = ("messages", "conversations", "conversation")  # each with turns of either shape
MORE_COLUMNS = {  # that a format reads where they are there
    "messages": (*CHAT_COLUMNS, "system", "tools", "functions"),
    "sharegpt": (*CHAT_COLUMNS, "system", "tools", "functions"),
    "prompt_completion": ("system", "tools", "functions"),
    "alpaca": ("input", "system", "history"),
}
# What others call our columns, for advice; of each list the first that is there.
ALIKE = {
    "messages": ("dialogue", "dialog", "turns", "chat"),
    "prompt": ("question", "query", "input", "source"),
    "completion": ("answer", "response", "output", "target", "reply", "chosen"),
    "output": ("response", "answer", "completion"),
    "text": ("content", "body", "document", "article"),
}
MOST_NAMES = 20  # that a line shows
IN_TURNS = ("role", "from", "content", "value", "tool_calls", "tool_call_id", "name")


def renamed(record: Any, section: SourceSection) -> Any:
    """A record with its columns under our names, as data.columns says."""
    if not section.columns or not isinstance(record, dict):
        return record
    taken = {*section.columns.values()}
    rest = {key: value for key, value in record.items() if key not in taken}
    return rest | {ours: record[own] for ours, own in section.columns.items() if own in record}


def check_columns(section: SourceSection) -> None:
    """ConfigError if data.columns maps what no format reads."""
    known = {*our_columns("auto", section), *IN_TURNS, *MARKS, *THOUGHTS, *KNOWN_ROLES}
    if odd := sorted(section.columns.keys() - known):
        ours, own = odd[0], section.columns[odd[0]]
        near = difflib.get_close_matches(ours, known, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        swapped = f"write {mapping({own: ours})} in its place"
        fix = swapped if own in known else "write our name first"
        raise ConfigError(f"{mapping({ours: own})}: no format has {ours}{hint}; {fix}")


def mapping(names: dict[str, str]) -> str:
    """Settings of data.columns for a command line: each adds one to those that are there."""
    quoted = {k: v if re.fullmatch(r"[\w-]+", v) else json.dumps(v) for k, v in names.items()}
    return " ".join(shlex.quote(f"data.columns.{ours}={own}") for ours, own in quoted.items())


def recognise(location: str, record: Any, section: SourceSection) -> str:
    """The format of a record by its columns. DataError if none or several fit."""
    fitting = fitting_formats(renamed(record, section), section)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(fitting)
        raise DataError(f"{location}: fits {names}; say which: data.format={fitting[-1]}")
    for ours, own in section.columns.items() if isinstance(record, dict) else ():
        if own not in record and ours in our_columns("auto", section) - {*KNOWN_ROLES}:
            wrong = f"{mapping({ours: own})}, but {has(record)}"
            raise DataError(f"{location}: {wrong}; name one of these")
    known = ", ".join("+".join(needed) for needed in COLUMNS.values())
    raise DataError(
        f"{location}: no text in data.text_field={section.text_field}, nor any of {known}; "
        f"{has(record)}; {_odd_shape(record) or advice(record)}"
    )


def fitting_formats(record: Any, section: SourceSection) -> list[str]:
    """The formats whose columns a record has, under our names."""
    columns = record.keys() if isinstance(record, dict) else ()
    fitting = [name for name, needed in COLUMNS.items() if {*needed} <= {*columns}]
    if "conversation" in columns and not fitting:
        fitting.append("sharegpt")
    return ["text", *fitting] if section.text_field in columns else fitting


def other_format(record: dict, section: SourceSection) -> str:
    """What to write for a record that is not of the format of its data set."""
    fitting = fitting_formats(record, section)
    if fitting and section.format == "auto":
        return f"this is {fitting[0]}, the first record is not; a data set has one format"
    return f"write data.format={fitting[0]}" if fitting else advice(record)


def advice(names: Iterable[str]) -> str:
    """What to write for columns of which none has a name of ours, as far as they tell."""
    plain = {str(name).strip().lower(): name for name in names}
    if "input_ids" in plain:
        return "tokens are made here, with the tokenizer of model.name: bring the texts"
    for needed in (*COLUMNS.values(), ("text",)):
        names = ((ours, *ALIKE.get(ours, ())) for ours in needed)
        alike = [next((plain[n] for n in either if n in plain), None) for either in names]
        if None in alike:
            continue
        found = dict(zip(needed, alike, strict=True))
        if needed == ("text",):
            return f"write {shlex.quote('data.text_field=' + found['text'])}"
        if "output" in needed and "context" in plain:
            found["input"] = plain["context"]
        others = {ours: own for ours, own in found.items() if ours != own}
        return f"write {mapping(others)}" if others else "see data.format, it is another one"
    if len(plain) == 1:
        (name,) = plain.values()
        setting = shlex.quote(f"data.text_field={name}")
        others = [c for needed in COLUMNS.values() if name in needed for c in needed if c != name]
        if others:
            setting = f"its {others[0]} too, or for texts alone {setting} data.format=text"
        return f"write {setting}"
    return f"name its column as data.text_field, or map it: {mapping({'messages': 'ITS_NAME'})}"


def _odd_shape(record: Any) -> str:
    """What to do with a record that is not as its columns' names say; empty if it may be."""
    if isinstance(record, list):
        keys = {key for turn in record if isinstance(turn, dict) for key in turn}
        if keys and not {"role", "from"} & keys:
            return "if the file is an array of records, end its name with .json"
        if keys:
            return 'write an object with its turns: {"conversations": [...]}'
    if not isinstance(record, dict):
        return 'write objects: {"text": ...}'
    if len(record) > 1 and all(isinstance(value, dict) for value in record.values()):
        return "if its values are the records, write them as an array, or one a line"
    if len(record) == 1:
        [(name, value)] = record.items()
        if re.search("[;\t]", name):
            return "columns of a .csv are separated by commas; write it again with commas"
        if " " in name.strip():
            return "a .csv has the names of its columns in its first row; write them there"
        if isinstance(value, dict):
            return f"write what is in {name} as columns of the record"
    lists = [key for key, value in record.items() if isinstance(value, list) and len(value) > 1]
    whole = next((key for key in lists if all(isinstance(v, dict) for v in record[key])), None)
    if not whole:
        return ""
    columns = record[whole][0].keys()
    if {"role", "from"} & columns:
        return f"say where its turns are: {mapping({'messages': whole})}"
    if any({*needed} <= columns for needed in (("text",), *COLUMNS.values())):
        return f"write the list {whole} alone, an array of records"
    turns = mapping({"messages": whole, "role": "ITS_KEY", "content": "ITS_KEY"})
    keys = ", ".join([*map(str, columns)][:MOST_NAMES])
    return (
        f"if {whole} holds turns, which have {keys}, write {turns}; if records, write that list "
        "alone"
    )


def our_columns(name: str, section: SourceSection) -> set[str]:
    """The columns that the format ``name``, or auto, may read, under our names."""
    names = COLUMNS if name == "auto" else {name} - {"text"}
    read = {column for n in names for column in (*COLUMNS[n], *MORE_COLUMNS[n])}
    return read | ({section.text_field} if name in ("auto", "text") else set())


def columns_read(name: str, section: SourceSection) -> set[str]:
    """The columns of a record that the format ``name``, or auto, may read; no other one matters."""
    return {section.columns.get(column, column) for column in our_columns(name, section)}


def text_column(record: Any, section: SourceSection) -> str:
    """The column that holds the text of a plain document; in a .txt data.columns finds no other."""
    own = section.columns.get(section.text_field)
    return own if isinstance(record, dict) and own in record else section.text_field


def has(record: Any) -> str:
    if isinstance(record, dict):
        names = [name if str(name).split() == [name] else repr(name) for name in record]
        more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        return f"the record has: {', '.join(names[:MOST_NAMES])}{more}"
    return f"the record is a {type(record).__name__}"
