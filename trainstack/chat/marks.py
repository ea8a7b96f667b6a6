"""Which part of a rendering is whose text: marks around the texts show where a template puts them.

Texts are found by marks, not by looking for them: a short answer such as "4" stands in many places.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from trainstack.errors import DataError, shown

# Letters (CJK extension G) that no ordinary text has: printable, so that repr() leaves them alone.
FIRST_MARK, MOST_MARKS = 0x30000, 4096
MARK = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + MOST_MARKS - 1)}]")
TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")  # <think>, <|channel|>, [/THINK]
THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
QUESTION = "and then?"
ANOTHER = "use another template: data.chat_template"
TEXT, REASONING, CALL = "text", "reasoning", "call"  # kinds of a piece


@dataclass(frozen=True)
class Piece:
    """A text of a message without the white space around it; ``message``: its number, from 0."""

    message: int
    kind: str
    text: str


@dataclass
class Rendering:
    """A text with its pieces: for each number of one where it stands, [first, last + 1]."""

    text: str
    places: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


Write = Callable[[list[dict], bool], str]  # messages, whether the assistant is invited to answer


class Marked:
    """The messages of a conversation with marks around their pieces.

    ``write`` renders messages; ``tags``: as ``tags_within``, the tags that it may look for;
    ``invitation``: what it adds to a question to invite the assistant.
    A message that the template writes otherwise with marks in it (it compares the text, say) has
    none, and is looked for.
    """

    def __init__(self, messages: list[dict], write: Write, tags: set[str], invitation: str):
        self.messages, self.write, self.tags = messages, write, tags
        self.invitation = invitation
        self.pieces: list[Piece] = []
        self.sought: set[int] = set()  # numbers of pieces that have no marks
        self.marked = [self._mark(number, message) for number, message in enumerate(messages)]
        text, every = write(messages, False), set(range(len(messages)))
        self.has_signs = bool(MARK.search(text))  # somebody wrote what marks are made of
        found = None
        if not self.has_signs and 2 * len(self.pieces) <= MOST_MARKS:
            found = self._try(text, set()) or self._try(
                text, {n for n in every if not self._try(text, every - {n})}
            )
        self.unmarked, written = found or (every, text)  # numbers of messages
        self.chosen = self._choose(self.unmarked)
        self.whole = self._read(written)

    def _try(self, text: str, unmarked: set[int]) -> tuple[set[int], str] | None:
        """``unmarked``, and the text with marks in the others; None if marks change it."""
        try:
            written = self.write(self._choose(unmarked), False)
        except DataError:
            return None
        return (unmarked, written) if MARK.sub("", written) == text else None

    def _choose(self, unmarked: set[int]) -> list[dict]:
        pairs = enumerate(zip(self.messages, self.marked, strict=True))
        return [plain if n in unmarked else marked for n, (plain, marked) in pairs]

    def render(
        self, stop: int | None = None, invites: bool = False, more: Iterable[dict] = (),
        in_place: dict[int, dict] | None = None,
    ) -> Rendering:  # fmt: skip
        """The messages before ``stop``, and ``more`` behind them. Raises as ``write``.

        ``in_place``: other messages for some of them, by number.
        """
        handed = [(in_place or {}).get(n, message) for n, message in enumerate(self.chosen)]
        return self._read(self.write([*handed[:stop], *more], invites), stop)

    def _read(self, written: str, stop: int | None = None) -> Rendering:
        """The text and its pieces; of those without marks, if they can be found."""
        found = Rendering(written) if self.has_signs else read_marks(written)
        self._look_for(found, stop)
        return found

    def _look_for(self, found: Rendering, stop: int | None) -> None:
        """Places of pieces without marks, in their order; DataError if one could be in several."""
        at = 0
        for number, piece in enumerate(self.pieces):
            if stop is not None and piece.message >= stop:
                break
            if number in self.sought or piece.message in self.unmarked:
                later = [p[0][0] for n, p in found.places.items() if n > number and p[0][0] >= at]
                first, window = found.text.find(piece.text, at), min(later, default=None)
                if number not in self.sought and found.text[at:window].count(piece.text) > 1:
                    raise DataError(
                        f"the chat template looks at the text of message {piece.message + 1} "
                        f"({shown(piece.text)}), which stands there more than once; {ANOTHER}"
                    )
                if first >= 0:
                    found.places[number] = [(first, first + len(piece.text))]
            at = max(at, *(last for _, last in found.places.get(number, [(0, 0)])))

    def _mark(self, number: int, message: dict) -> dict:
        marked, role = dict(message), message.get("role")
        thoughts, content = message.get("reasoning_content"), message.get("content")
        if isinstance(thoughts, str):
            marked["reasoning_content"] = self._piece(number, REASONING, thoughts)
        if isinstance(content, str):
            marked["content"] = self._content(number, role, content)
        elif isinstance(content, list):
            marked["content"] = [
                {**part, "text": self._content(number, role, part["text"])} for part in content
            ]
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [self._call(number, call) for call in message["tool_calls"]]
        return marked

    def _content(self, number: int, role: str | None, text: str) -> str:
        """Each stretch between two tags that the template knows is a piece of its own."""
        tags = [tag for tag in TAG.finditer(text) if tag[0].replace("/", "") in self.tags]
        made, at, before = "", 0, ""
        for tag in [*tags, None]:
            stretch, name = text[at : tag.start() if tag else None], tag[0] if tag else ""
            opens = THOUGHT.search(before) and "/" not in before
            closes = THOUGHT.search(name) and "/" in name
            kind = REASONING if role == "assistant" and (opens or closes) else TEXT
            made += self._piece(number, kind, stretch) + name
            at, before = tag.end() if tag else at, name
        return made

    def _call(self, number: int, call: dict) -> dict:
        """A tool call with marks around the texts in its arguments."""
        function = call.get("function")
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        known = len(self.pieces)
        arguments = self._values(number, function["arguments"])
        if len(self.pieces) == known:  # no text in them: the call is where its name is
            self.sought.add(known)
            self.pieces.append(Piece(number, CALL, str(function.get("name"))))
        return {**call, "function": {**function, "arguments": arguments}}

    def _values(self, number: int, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._values(number, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(number, item) for item in value]
        return self._piece(number, CALL, value) if isinstance(value, str) else value

    def _piece(self, number: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        first = FIRST_MARK + 2 * len(self.pieces)
        self.pieces.append(Piece(number, kind, core))
        if first + 1 >= FIRST_MARK + MOST_MARKS:
            return text  # too many for marks: none will be used
        before, _, after = text.partition(core)
        return f"{before}{chr(first)}{core}{chr(first + 1)}{after}"


def read_marks(text: str) -> Rendering:
    """The rendering without its marks, and where they stood."""
    found, parts, length, at = Rendering(""), [], 0, 0
    begun: dict[int, int] = {}
    for mark in MARK.finditer(text):
        parts.append(text[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        number, is_end = divmod(ord(mark[0]) - FIRST_MARK, 2)
        if not is_end:
            begun[number] = length
        elif number in begun:
            found.places.setdefault(number, []).append((begun.pop(number), length))
    found.text = "".join([*parts, text[at:]])
    return found


def tags_within(template: str, write: Write) -> set[str]:
    """The tags, without a slash, that a template may look for in a text, such as <think>.

    Not those that it writes around every text: somebody who writes <|im_end|> ends nothing.
    """
    turns = [{"role": role, "content": QUESTION} for role in ("user", "assistant")]
    around = ""
    for asked, invites in ((turns, False), (turns[:1], True)):
        with contextlib.suppress(DataError):
            around += write(asked, invites)
    frame = {tag for tag in TAG.findall(around) if not THOUGHT.search(tag)}
    # A template may name only </think>.
    return {tag.replace("/", "") for tag in {*TAG.findall(template)} - frame}


def invitation(write: Write) -> str:
    """What a template adds to a question to invite the assistant; empty if it adds nothing.

    Some invite whether they are asked to or not: what stands behind a question and before an answer
    alike is then that, without what ends the question, which one more question shows.
    """
    ask, answer = ({"role": role, "content": QUESTION} for role in ("user", "assistant"))
    try:
        before, invited = write([ask], False), write([ask], True)
        if before != invited:
            return invited[len(os.path.commonprefix([before, invited])) :]
        answered, twice = write([ask, answer], False), write([ask, ask], False)
    except DataError:
        return ""
    if answered[: answered.rfind(QUESTION)].rstrip() != before.rstrip():
        return ""
    head, _, tail = before.partition(QUESTION)
    between = twice.split(QUESTION)[1]
    header = os.path.commonprefix([head[::-1], between[::-1]])
    end = between[: len(between) - len(header)]
    return tail.removeprefix(end) if header and tail.startswith(end) else ""
