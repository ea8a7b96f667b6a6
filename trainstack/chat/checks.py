"""What was said is in the rendering, whole, and in the turn of whoever said it."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from trainstack.chat.marks import ANOTHER, CALL, REASONING, TEXT, Marked, Piece, Rendering
from trainstack.chat.messages import KNOWN_ROLES
from trainstack.chat.turns import Turn
from trainstack.errors import DataError, shown

CLOSING, AT_END = re.compile(r"</(\w+)>"), re.compile(r"</\w+>\s*$")


class Dropped(DataError):
    """The template leaves out what was said: told before what else a template does not take."""


def check_roles(location: str, messages: list[dict], template: str) -> None:
    """DataError for roles that are none of ours, and that the template does not name."""
    odd = {}
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in KNOWN_ROLES and not re.search(f"['\"]{re.escape(role)}['\"]", template):
            odd.setdefault(role, f"message {number} is from {shown(role)}")
    if odd:
        ours = "assistant" if any(m["role"] == "user" for m in messages) else "user"
        example = f"data.columns.{ours}={shlex.quote(next(iter(odd)))}"
        raise DataError(
            f"{location}: {', '.join(odd.values())}, which the chat template does not know; say "
            f"who each is, such as {example} (or .user, .assistant, .system, .tool)"
        )


def check_shape(messages: list[dict], text: str) -> None:
    """DataError if the template writes an object as Python shows it: it expects a text there."""
    for message in messages:
        functions = (call.get("function", {}) for call in message.get("tool_calls") or ())
        for found in (message.get("content"), *(f.get("arguments") for f in functions)):
            if found and isinstance(found, dict | list) and str(found) in text:
                raise DataError("the chat template does not take contents or arguments as objects")


def check_pieces(marked: Marked, whole: Rendering) -> int:
    """How many turns' thoughts are left out on purpose; DataError if anything else is.

    On purpose: those before the last question, which most templates of reasoning models drop.
    """
    asked = [n for n, m in enumerate(marked.messages) if m.get("role") == "user"]
    dropped = set()
    for number, piece in enumerate(marked.pieces):
        if is_whole(piece, number, whole):
            continue
        if piece.kind == REASONING and asked and piece.message < asked[-1]:
            dropped.add(piece.message)
            continue
        what = {REASONING: "thoughts", CALL: "a tool call's argument"}.get(piece.kind, "text")
        raise Dropped(
            f"the chat template drops {what} of message {piece.message + 1} "
            f"({shown(piece.text)}); take it out of the data, or {ANOTHER}"
        )
    return len(dropped)


def is_whole(piece: Piece, number: int, whole: Rendering) -> bool:
    """Whether the rendering has a piece, as it is or as JSON writes it."""
    forms = forms_of(piece.text)
    places = whole.places.get(number, ())
    if piece.kind == CALL and not places:
        return any(form in whole.text for form in forms)
    return any(whole.text[first:last] in forms for first, last in places)


def check_turn(marked: Marked, whole: Rendering, number: int, turn: Turn) -> None:
    """DataError unless the turn has all that the assistant says, and nothing of anybody else."""
    text = whole.text[turn.first : turn.last] + turn.more
    said = 0  # characters of the turn up to its last text
    for n, piece in enumerate(marked.pieces):
        places = whole.places.get(n, ())
        inside = [b for a, b in places if a >= turn.first and b <= turn.last]
        if bool(inside) != (piece.message == number) and (inside or places):
            raise DataError(
                f"the chat template does not show where turn {number + 1} begins and ends; put "
                "{% generation %} around the assistant's part in the template"
            )
        said = max([said, *(b - turn.first for b in inside)])
    for call in marked.messages[number].get("tool_calls") or ():
        function = call.get("function", call)
        for forms in arguments_in(function.get("arguments")):
            if not any(form in text for form in forms):
                call = f"{shown(forms[0])} of a tool call of message {number + 1}"
                raise Dropped(f"the chat template drops {call}; {ANOTHER}")
    if not text[said:].strip():
        raise DataError(f"the chat template does not show what ends turn {number + 1}; {ANOTHER}")


def unnamed(functions: Iterable[dict], text: str) -> int:
    """How many tools, or calls of them, stand in the text without their function's name."""
    return sum(str((f.get("function") or f).get("name")) not in text for f in functions)


def arguments_in(arguments: Any) -> Iterator[list[str]]:
    """The forms of each argument's name, at any depth, and of values that are no texts (pieces)."""
    if isinstance(arguments, dict):
        yield from map(forms_of, arguments)
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        for value in arguments:
            yield from arguments_in(value)
    elif isinstance(arguments, int | float):
        yield [str(arguments), json.dumps(arguments)]


def forms_of(text: str) -> list[str]:
    """A text as it is, and as JSON writes it, also within JSON."""
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    return [text, as_json, json.dumps(text)[1:-1], json.dumps(as_json)[1:-1]]


def uneven(marked: Marked, whole: Rendering, turns: list[tuple[int, Turn]]) -> int:
    """How many turns without thoughts begin otherwise than the last of them, if they are asked."""
    begins = []  # of turns that say something, and of those that only call tools
    for number, turn in turns:
        own = [n for n, piece in enumerate(marked.pieces) if piece.message == number]
        places = [first for n in own for first, _ in whole.places.get(n, ())]
        if turn.is_asked and places and (kind := marked.pieces[own[0]].kind) != REASONING:
            begin = whole.text[turn.first : min(places)].strip()  # space may be a person's
            begins.append((kind, begin))
    last = next((begin for kind, begin in reversed(begins) if kind == TEXT), "")
    return sum(not b.startswith(last) or (kind == TEXT and b != last) for kind, b in begins)


def is_stray(marked: Marked, whole: Rendering, turn: Turn, template: str) -> bool:
    """Whether a turn has more closing tags of a kind that the template writes than opening ones."""
    text = whole.text[max(0, turn.first - len(marked.invitation)) : turn.last]
    text = AT_END.sub("", text)  # what ends the turn, such as </s>, closes nothing
    names = {name for name in CLOSING.findall(text) if f"</{name}>" in template}
    return any(text.count(f"</{name}>") > text.count(f"<{name}>") for name in names)
