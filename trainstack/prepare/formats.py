"""One record of a data set becomes one document: texts to tokenise, and which of it is learned.

A document's tokens either all carry loss (``text``), or only what the model has to say does: the
assistant's turns, the completion.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainstack.errors import DataError

Ranges = list[tuple[int, int]]  # of characters: the first, and the one after the last
COLUMNS = {  # what makes a record one of a format; text is recognised by data.text_field
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
# The prompt of Stanford Alpaca's train.py (Taori and others, 2023).
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{more}### Response:\n"
)
NOTHING_LEARNED = (
    "no token of it carries loss, for no assistant says anything; mend it, or leave it out"
)
STRINGS = {"prompt", "completion", "instruction", "input", "output", "system", "value"}
LONG_TEXT = 1 << 18  # characters
CUT_WINDOW, CUT_TRIES = 200, 50  # characters on each side that are compared; places tried
ALPACA_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Segment:
    """A text that is tokenised by itself; ``learned``: ranges of characters, None for all."""

    text: str
    learned: Ranges | None

    @property
    def is_long(self) -> bool:
        """Whether it is tokenised in parts, which ranges of characters do not allow."""
        return len(self.text) > LONG_TEXT and not self.learned


@dataclass(frozen=True)
class Document:
    """Segments, joined as tokens; ``is_ended``: the end token follows, and is learned."""

    place: str
    segments: tuple[Segment, ...]
    is_ended: bool

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def recognise(place: str, record: Any, text_field: str) -> str:
    """The format of a record by its columns. Raises DataError where none or several fit."""
    columns = record.keys() if isinstance(record, dict) else ()
    fitting = ["text"] * (text_field in columns)
    fitting += [name for name, needed in COLUMNS.items() if {*needed} <= {*columns}]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(fitting)
        raise DataError(f"{place}: fits {names}; say which: data.format={fitting[-1]}")
    known = ", ".join("+".join(needed) for needed in COLUMNS.values())
    raise DataError(
        f"{place}: no text in data.text_field={text_field}, nor any of {known}; "
        f"{_has(record)}; name its column as data.text_field"
    )


def _has(record: Any) -> str:
    if isinstance(record, dict):
        return f"the record has: {', '.join(map(str, record))}"
    return f"the record is a {type(record).__name__}"


def to_document(place: str, record: Any, name: str, text_field: str, chat) -> Document | None:
    """The document of a record in the format ``name``; None where it is empty. Raises DataError.

    ``chat``: the tokenizer's chat template, see chat.py.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: {_has(record)}, not an object; write one with the columns")
    if name == "text":
        segments, is_ended = [Segment(_text(place, record, text_field), None)], True
    else:
        segments, is_ended = BUILDERS[name](place, record, chat)
    if not any(segment.text.strip() for segment in segments):
        return None
    for segment in segments:
        check_text(place, segment.text)
    if not is_ended and not any(segment.learned for segment in segments):
        raise DataError(f"{place}: {NOTHING_LEARNED}")
    return Document(place, tuple(segments), is_ended)


def _text(place: str, record: dict, column: str, is_optional: bool = False) -> str:
    value = record.get(column)
    if value is None and is_optional:
        return ""
    if isinstance(value, str):
        return value
    what = "no string" if column in record else "no text"
    found = "null" if value is None else type(value).__name__
    found = f" but {found}" if column in record else ""
    setting = f"data.text_field={column}" if column not in STRINGS else column
    raise DataError(f"{place}: {what} in {setting}{found}; {_has(record)}")


def check_text(place: str, text: str) -> None:
    """DataError where a text holds what no text has: NUL characters, halves of surrogate pairs."""
    if "\0" in text:
        at = text.index("\0")
        raise DataError(f"{place}: NUL character at {at:,}; is it binary? remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{place}: half a character ({code}) at {error.start:,}; mend it") from None


def _messages(place: str, record: dict, chat) -> tuple[list[Segment], bool]:
    messages = _message_list(place, record, "messages")
    if not messages:
        return [], False
    return [Segment(*chat.render(place, messages, _tools(place, record)))], False


def _message_list(place: str, record: dict, column: str) -> list[dict]:
    messages = record.get(column)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{place}: no list of messages in {column}; {_has(record)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise DataError(f"{place}: message {number} of {column} has no role; {_has(message)}")
        if not isinstance(message.get("content"), str | list | None):
            kind = type(message["content"]).__name__
            raise DataError(f"{place}: content of message {number} is a {kind}; write a text")
    return messages


def _tools(place: str, record: dict) -> list | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: tools is no JSON ({error.msg}); mend it") from None
    return tools or None


def _prompt_completion(place: str, record: dict, chat) -> tuple[list[Segment], bool]:
    """The prompt is tokenised by itself, as it will be when the model is asked."""
    if isinstance(record.get("prompt"), list):
        parts = [_message_list(place, record, column) for column in ("prompt", "completion")]
        return [Segment(*chat.render_completion(place, *parts, _tools(place, record)))], False
    prompt, completion = (_text(place, record, column) for column in ("prompt", "completion"))
    if not completion.strip():
        raise DataError(f"{place}: its completion is empty; mend it, or leave it out")
    return [Segment(prompt, []), Segment(completion, None)], True


def _alpaca(place: str, record: dict, chat) -> tuple[list[Segment], bool]:
    instruction, answer = (_text(place, record, column) for column in ("instruction", "output"))
    given, system = (_text(place, record, column, True) for column in ("input", "system"))
    if not answer.strip():
        raise DataError(f"{place}: its output is empty; mend it, or leave it out")
    if chat.template is None:
        more = f"### Input:\n{given}\n\n" if given else ""
        prompt = ALPACA_PROMPT.format(
            paired=ALPACA_PAIRED * bool(given), instruction=instruction, more=more
        )
        return [Segment(prompt, []), Segment(answer, None)], True
    messages = [{"role": "system", "content": system}] * bool(system)
    for pair in record.get("history") or ():  # LLaMA-Factory's
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{place}: its history is no list of pairs of texts; mend it")
        messages += _turns(*pair)
    question = f"{instruction}\n\n{given}" if given else instruction
    return [Segment(*chat.render(place, [*messages, *_turns(question, answer)], None))], False


def _turns(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _sharegpt(place: str, record: dict, chat) -> tuple[list[Segment], bool]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{place}: no list of turns in conversations; {_has(record)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        who = turn.get("from")
        role = SHAREGPT_ROLES.get(who) if isinstance(who, str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise DataError(f"{place}: turn {number} is from {who!r}; write one of {known}")
        messages.append({"role": role, "content": _text(place, turn, "value")})
    if not messages:
        return [], False
    system = _text(place, record, "system", True)
    first = [{"role": "system", "content": system}] * bool(system)
    return [Segment(*chat.render(place, [*first, *messages], _tools(place, record)))], False


BUILDERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}


def encode(
    tokenizer, end_id: int, documents: Sequence[Document]
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document with its token ids and, per token, whether it carries loss; None: all do.

    Encoded together, over all cores. ``tokenizer``: of the library tokenizers. A document of which
    no token is a target comes with flags that are all False.
    """
    segments = [segment for document in documents for segment in document.segments]
    needs_offsets = any(segment.learned for segment in segments)  # costs a quarter of the speed
    encode_batch = tokenizer.encode_batch if needs_offsets else tokenizer.encode_batch_fast
    texts = [segment.text for segment in segments if not segment.is_long]
    encoded = iter(encode_batch(texts, add_special_tokens=False))
    for document in documents:
        ids, flags = [], []
        for segment in document.segments:
            if segment.is_long:
                ids.append(long_ids(tokenizer, segment.text))
                flags.append(np.full(len(ids[-1]), segment.learned is None))
            else:
                encoding = next(encoded)
                ids.append(encoding.ids)
                flags.append(learned_tokens(encoding, segment.learned))
        if document.is_ended:
            ids.append([end_id])
            flags.append(np.ones(1, bool))
        is_all = all(segment.learned is None for segment in document.segments)
        yield document, np.concatenate(ids), None if is_all else np.concatenate(flags)


def long_ids(tokenizer, text: str) -> np.ndarray:
    """The ids of a long text, tokenised in parts: at once it would take 120 bytes a character.

    Cut only where the tokens around the cut are those of the uncut text; whole, if that is nowhere.
    """
    found, start = [], 0
    while start < len(text):
        stop = len(text)
        if stop - start > LONG_TEXT:
            stop = safe_cut(tokenizer, text, start, start + LONG_TEXT) or len(text)
        part = tokenizer.encode_batch_fast([text[start:stop]], add_special_tokens=False)[0]
        found.append(np.array(part.ids, np.int64))
        start = stop
    return np.concatenate(found)


def safe_cut(tokenizer, text: str, start: int, stop: int) -> int | None:
    """Where a text can be cut before ``stop``: at the end of a line, else before a space."""
    for sign, skipped in (("\n", 1), (" ", 0)):
        at = stop
        for _ in range(CUT_TRIES):
            at = text.rfind(sign, start + 1, at)
            if at < 0:
                break
            cut = at + skipped
            window = text[max(start, cut - CUT_WINDOW) : cut], text[cut : cut + CUT_WINDOW]
            left, right, whole = (
                tokenizer.encode(part, add_special_tokens=False).ids
                for part in (*window, "".join(window))
            )
            if left + right == whole:
                return cut
    return None


def learned_tokens(encoding, learned: Ranges | None) -> np.ndarray:
    """Per token, whether it lies, at least in part, in one of the ranges of characters."""
    if not learned:
        return np.full(len(encoding.ids), learned is None)
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    flags = np.zeros(len(offsets), bool)
    for first, last in learned:
        begin = np.searchsorted(offsets[:, 1], first, "right")
        flags[begin : np.searchsorted(offsets[:, 0], last, "left")] = True
    return flags
