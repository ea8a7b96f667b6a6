"""One record of a data set becomes one document: a text to tokenise, and which of it is learned.

Of a ``text`` all tokens carry loss, of the other formats only what the model has to say: the
assistant's turns, the completion.
"""

import json
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from typing import Any

from trainstack.chat.checks import check_roles
from trainstack.chat.messages import KNOWN_ROLES, messages_of, tools_of, turns_in
from trainstack.chat.template import Chat, Ranges, says_something
from trainstack.config.schema import SourceSection
from trainstack.errors import DataError
from trainstack.records.chunks import Part
from trainstack.records.columns import CHAT_COLUMNS, has, other_format, renamed

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
FIXED_COLUMNS = {"prompt", "completion", "instruction", "input", "output", "system"}


@dataclass(frozen=True)
class Document:
    """One text, tokenised as one; ``location``: file and line of its record.

    ``learned``: the ranges of characters that carry loss; None: all. ``written``: the ranges that a
    person wrote, in which a special token is text; None: all. ``is_rendered``: a chat template
    wrote it, with its own beginning and ends; else the tokenizer's own beginning comes before it,
    and the end token, which is learned, behind it. ``is_begun``, ``is_continued``: it is a
    piece of a document, whose beginning, or end, is in another piece. ``before``, ``after``: some
    text of the pieces around it, which its tokens depend on.
    """

    location: str
    text: str
    learned: Ranges | None
    written: Ranges | None
    is_rendered: bool
    is_begun: bool = False
    is_continued: bool = False
    before: str = ""
    after: str = ""
    remarks: dict[str, int] = field(default_factory=dict)  # as a Rendered has them
    unread: Set[str] = frozenset()  # keys of its turns that nothing reads

    @property
    def of_people(self) -> Ranges:
        """The ranges of characters that a person wrote."""
        return [(0, len(self.text))] if self.written is None else self.written


def to_documents(
    location: str, record: Any, name: str, section: SourceSection, chat: Chat,
    part: Part | None = None,
) -> list[Document]:  # fmt: skip
    """The documents of a record in the format ``name``; none if it is empty. Raises DataError.

    One, or with data.each_turn one for each turn that is learned. ``part``: which piece of a long
    text it is; none of them is empty.
    """
    if not isinstance(record, dict):
        raise DataError(f"{location}: {has(record)}, not an object; write one with the columns")
    record = renamed(record, section)
    if name == "text":
        text = _text(location, record, section.text_field, section)
        documents = [Document(location, text, None, None, is_rendered=False)]
        if part:
            place = {"is_begun": part.start > 0, "is_continued": part.is_continued}
            return [replace(documents[0], **place, before=part.before, after=part.after)]
    else:
        documents = BUILDERS[name](location, record, section, chat)
    documents = [document for document in documents if document.text.strip()]
    for document in documents:
        check_text(location, document.text)
        if document.is_rendered and not document.learned:
            raise DataError(f"{location}: {NOTHING_LEARNED}")
    return documents


def _text(
    location: str, record: dict, column: str, section: SourceSection, is_optional: bool = False
) -> str:
    value = record.get(column)
    if value is None and is_optional:
        return ""
    if isinstance(value, bytes):  # parquet of tools that do not say that a column is text
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{location}: {column} is not UTF-8 at byte {error.start}") from None
    if isinstance(value, str):
        return value
    setting = column if column in FIXED_COLUMNS else f"data.text_field={column}"
    problem, fix = f"no text in {setting}", other_format(record, section)
    if column in record:
        kind = "null" if value is None else type(value).__name__
        problem = f"no string in {setting} but {kind}"
        fix = "write a string there, or leave the record out"
    if isinstance(value, list):
        fix = "write a record for each of its texts"
    if isinstance(value, dict):
        fix = "write a record for each of its values (pandas: to_json with orient='records')"
    raise DataError(f"{location}: {problem}; {has(record)}; {fix}")


def check_text(location: str, text: str) -> None:
    """DataError if a text holds what no text has: NUL characters, halves of surrogate pairs."""
    if "\0" in text:
        at = text.index("\0")
        raise DataError(f"{location}: NUL character at {at:,}; is it binary? remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (U+{ord(text[error.start]):04X})"
        raise DataError(f"{location}: {half} at {error.start:,}; fix it") from None


def _answered(location: str, record: dict, prompt: str, answer: str) -> list[Document]:
    """Tokenised as one text, as it is when the model continues the prompt."""
    for name in ("system", "history", "tools", "functions"):
        if record.get(name) not in (None, "", [], "[]"):
            raise DataError(
                f"{location}: its {name} would be left out, for no chat template writes it; take "
                "it out, or write the record as messages"
            )
    whole = prompt + answer
    return [Document(location, whole, [(len(prompt), len(whole))], None, is_rendered=False)]


def _rendered(
    location: str, record: dict, messages: list[dict], marks: list[bool], section: SourceSection,
    chat: Chat,
) -> list[Document]:  # fmt: skip
    """The conversation by the chat template; ``marks``: which messages may be learned."""
    if not messages:
        return []
    system = _text(location, record, "system", section, is_optional=True)
    system = system if system.strip() else ""
    if system and messages[0]["role"] != "system":
        messages, marks = [{"role": "system", "content": system}, *messages], [False, *marks]
    if system and messages[0]["content"] != system:
        raise DataError(f"{location}: two texts of the system, one as a column; write one of them")
    tools = tools_of(location, record.get("tools") or record.get("functions"))
    check_roles(location, messages, chat.template_for(tools) or "")
    pairs = enumerate(zip(messages, marks, strict=True))
    learned = [n for n, (message, may_be) in pairs if may_be and says_something(message)]
    if section.learn == "last":
        learned = learned[-1:]
    if not learned:
        raise DataError(f"{location}: {NOTHING_LEARNED}")
    parts = [learned[: at + 1] for at in range(len(learned))] if section.each_turn else [learned]
    try:
        made = [chat.render(location, messages, tools, part, section.each_turn) for part in parts]
    except DataError:
        check_text(location, json.dumps(messages, ensure_ascii=False))  # which may be why
        raise
    if messages[-1]["role"] in ("user", "tool"):
        made[-1].remarks["unanswered"] = 1
    unread = chat.unread(messages, tools)
    return [
        Document(location, text, ranges, written, True, remarks=remarks, unread=unread)
        for text, ranges, written, remarks in made
    ]


def _conversation(
    location: str, record: dict, section: SourceSection, chat: Chat
) -> list[Document]:
    column = next((name for name in CHAT_COLUMNS if name in record), None)
    if column is None:
        missing, fix = ", ".join(CHAT_COLUMNS), other_format(record, section)
        raise DataError(f"{location}: no {missing}; {has(record)}; {fix}")
    turns = _with_columns(record[column], section)
    return _rendered(location, record, *messages_of(location, turns, column), section, chat)


def _with_columns(turns: Any, section: SourceSection) -> Any:
    """Turns with keys and roles under our names: data.columns may map role, content, user too."""
    turns = turns_in(turns)
    if not isinstance(turns, list) or not section.columns:
        return turns
    roles = {own: ours for ours, own in section.columns.items() if ours in KNOWN_ROLES}
    made = [renamed(turn, section) for turn in turns]
    for turn in (turn for turn in made if isinstance(turn, dict)):
        for key in ("role", "from"):
            if isinstance(turn.get(key), str):
                turn[key] = roles.get(turn[key], turn[key])
    return made


def _prompt_completion(
    location: str, record: dict, section: SourceSection, chat: Chat
) -> list[Document]:
    if isinstance(record.get("prompt"), list):
        said = record.get("completion")
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        asked, _ = messages_of(location, _with_columns(record["prompt"], section), "prompt")
        answer, marks = messages_of(location, _with_columns(said, section), "completion")
        if asked and answer and asked[-1]["role"] == answer[0]["role"] == "assistant":
            raise DataError(
                f"{location}: its completion would continue the assistant's turn that ends its "
                "prompt; write both as texts, or the whole turn as the completion"
            )
        marks = [*(False for _ in asked), *marks]
        return _rendered(location, record, [*asked, *answer], marks, section, chat)
    prompt = _text(location, record, "prompt", section)
    completion = _text(location, record, "completion", section)
    if not completion.strip():
        raise DataError(f"{location}: its completion is empty; fix it, or leave it out")
    return _answered(location, record, prompt, completion)


def _alpaca(location: str, record: dict, section: SourceSection, chat: Chat) -> list[Document]:
    instruction = _text(location, record, "instruction", section)
    answer = _text(location, record, "output", section)
    given = _text(location, record, "input", section, is_optional=True)
    if not answer.strip():
        raise DataError(f"{location}: its output is empty; fix it, or leave it out")
    if chat.template is None:
        prompt = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        prompt = prompt.format(instruction=instruction, given=given)
        return _answered(location, record, prompt, answer)
    messages = []
    for pair in record.get("history") or ():  # LLaMA-Factory's
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{location}: its history is no list of pairs of texts; fix it")
        messages += _turns(*pair)
    messages += _turns(f"{instruction}\n\n{given}" if given else instruction, answer)
    return _rendered(location, record, messages, [True] * len(messages), section, chat)


def _turns(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


Builder = Callable[[str, dict, SourceSection, Chat], list[Document]]
BUILDERS: dict[str, Builder] = {
    "messages": _conversation,
    "sharegpt": _conversation,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}
