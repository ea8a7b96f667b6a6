"""One record of a data set becomes one document: texts to tokenise, and which of it is learned.

Of a ``text`` all tokens carry loss, of the other formats only what the model has to say: the
assistant's turns, the completion.
"""

import json
from dataclasses import dataclass
from typing import Any

from trainstack.errors import DataError
from trainstack.prepare.chat import Chat, Ranges

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
# The prompts of Stanford Alpaca's train.py (Taori and others, 2023), with an input and without.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
NOTHING_LEARNED = (
    "no token of it carries loss, for no assistant says anything; fix it, or leave it out"
)
# Named by a format itself; any other column that is read is data.text_field.
FIXED_COLUMNS = {"prompt", "completion", "instruction", "input", "output", "system", "value"}


@dataclass(frozen=True)
class Segment:
    """A text that is tokenised by itself; ``learned``: ranges of characters, None for all."""

    text: str
    learned: Ranges | None


@dataclass(frozen=True)
class Document:
    """Segments, whose tokens are joined.

    ``location``: file and line of its record. ``is_ended``: whether the end token follows, and is
    learned; a chat template writes its own ends of turns, so a conversation is not ended.
    """

    location: str
    segments: tuple[Segment, ...]
    is_ended: bool

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def recognise(location: str, record: Any, text_field: str) -> str:
    """The format of a record by its columns. DataError if none or several fit."""
    columns = record.keys() if isinstance(record, dict) else ()
    fitting = [name for name, needed in COLUMNS.items() if {*needed} <= {*columns}]
    if text_field in columns:
        fitting.insert(0, "text")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(fitting)
        raise DataError(f"{location}: fits {names}; say which: data.format={fitting[-1]}")
    known = ", ".join("+".join(needed) for needed in COLUMNS.values())
    raise DataError(
        f"{location}: no text in data.text_field={text_field}, nor any of {known}; "
        f"{_has(record)}; name its column as data.text_field"
    )


def _has(record: Any) -> str:
    if isinstance(record, dict):
        return f"the record has: {', '.join(map(str, record))}"
    return f"the record is a {type(record).__name__}"


def to_document(
    location: str, record: Any, name: str, text_field: str, chat: Chat
) -> Document | None:
    """The document of a record in the format ``name``; None if it is empty. Raises DataError."""
    if not isinstance(record, dict):
        raise DataError(f"{location}: {_has(record)}, not an object; write one with the columns")
    if name == "text":
        text = _text(location, record, text_field)
        document = Document(location, (Segment(text, None),), is_ended=True)
    else:
        document = BUILDERS[name](location, record, chat)
    if not any(segment.text.strip() for segment in document.segments):
        return None
    for segment in document.segments:
        check_text(location, segment.text)
    if not document.is_ended and not any(segment.learned for segment in document.segments):
        raise DataError(f"{location}: {NOTHING_LEARNED}")
    return document


def _text(location: str, record: dict, column: str, is_optional: bool = False) -> str:
    value = record.get(column)
    if value is None and is_optional:
        return ""
    if isinstance(value, str):
        return value
    what, found = "no text", ""
    if column in record:
        kind = "null" if value is None else type(value).__name__
        what, found = "no string", f" but {kind}"
    setting = column if column in FIXED_COLUMNS else f"data.text_field={column}"
    raise DataError(f"{location}: {what} in {setting}{found}; {_has(record)}")


def check_text(location: str, text: str) -> None:
    """DataError if a text holds what no text has: NUL characters, halves of surrogate pairs."""
    if "\0" in text:
        at = text.index("\0")
        raise DataError(f"{location}: NUL character at {at:,}; is it binary? remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"{location}: half a character ({code}) at {error.start:,}; fix it"
        ) from None


def _conversation(location: str, text: str, learned: Ranges) -> Document:
    return Document(location, (Segment(text, learned),), is_ended=False)


def _answered(location: str, prompt: str, answer: str) -> Document:
    """The prompt is tokenised by itself, as it will be when the model is asked."""
    return Document(location, (Segment(prompt, []), Segment(answer, None)), is_ended=True)


def _no_document(location: str) -> Document:
    return Document(location, (), is_ended=False)


def _messages(location: str, record: dict, chat: Chat) -> Document:
    messages = _message_list(location, record, "messages")
    if not messages:
        return _no_document(location)
    return _conversation(location, *chat.render(location, messages, _tools(location, record)))


def _message_list(location: str, record: dict, column: str) -> list[dict]:
    messages = record.get(column)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{location}: no list of messages in {column}; {_has(record)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{location}: message {number} of {column} has no role; {_has(message)}"
            )
        if not isinstance(message.get("content"), str | list | None):
            kind = type(message["content"]).__name__
            raise DataError(f"{location}: content of message {number} is a {kind}; write a text")
    return messages


def _tools(location: str, record: dict) -> list | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{location}: tools is no JSON ({error.msg}); fix it") from None
    return tools or None


def _prompt_completion(location: str, record: dict, chat: Chat) -> Document:
    if isinstance(record.get("prompt"), list):
        prompt = _message_list(location, record, "prompt")
        completion = _message_list(location, record, "completion")
        tools = _tools(location, record)
        rendered = chat.render_completion(location, prompt, completion, tools)
        return _conversation(location, *rendered)
    prompt = _text(location, record, "prompt")
    completion = _text(location, record, "completion")
    if not completion.strip():
        raise DataError(f"{location}: its completion is empty; fix it, or leave it out")
    return _answered(location, prompt, completion)


def _alpaca(location: str, record: dict, chat: Chat) -> Document:
    instruction = _text(location, record, "instruction")
    answer = _text(location, record, "output")
    given = _text(location, record, "input", is_optional=True)
    system = _text(location, record, "system", is_optional=True)
    if not answer.strip():
        raise DataError(f"{location}: its output is empty; fix it, or leave it out")
    if chat.template is None:
        prompt = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        return _answered(location, prompt.format(instruction=instruction, given=given), answer)
    messages = _system_message(system)
    for pair in record.get("history") or ():  # LLaMA-Factory's
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{location}: its history is no list of pairs of texts; fix it")
        messages += _turns(*pair)
    question = f"{instruction}\n\n{given}" if given else instruction
    messages += _turns(question, answer)
    return _conversation(location, *chat.render(location, messages, None))


def _turns(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _system_message(text: str) -> list[dict]:
    return [{"role": "system", "content": text}] if text else []


def _sharegpt(location: str, record: dict, chat: Chat) -> Document:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{location}: no list of turns in conversations; {_has(record)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        who = turn.get("from")
        role = SHAREGPT_ROLES.get(who) if isinstance(who, str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise DataError(f"{location}: turn {number} is from {who!r}; write one of {known}")
        messages.append({"role": role, "content": _text(location, turn, "value")})
    if not messages:
        return _no_document(location)
    system = _system_message(_text(location, record, "system", is_optional=True))
    tools = _tools(location, record)
    return _conversation(location, *chat.render(location, [*system, *messages], tools))


BUILDERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}
