"""A conversation as the tokenizer's chat template writes it, and what of it the assistant says."""

import contextlib
import datetime
import hashlib
import re
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from trainstack.chat import checks
from trainstack.chat.marks import Marked, Rendering, invitation, tags_within
from trainstack.chat.messages import KNOWN_KEYS
from trainstack.chat.turns import Turn, find_turn
from trainstack.chat.ways import variants
from trainstack.config.schema import DataSection
from trainstack.errors import ConfigError, DataError, first_line

Ranges = list[tuple[int, int]]  # of characters: the first, and the one after the last
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMARKS = {
    "dropped_thoughts": "earlier turns whose thoughts the template leaves out; "
    "data.each_turn=true keeps them",
    "ignored_tools": "tools that the template does not tell the model of",
    "unnamed_calls": "tool calls that the template writes without their name",
    "stray_ends": "turns close with a tag such as </think> what nothing opens, for the template "
    "does not take thoughts out of the text; write them as reasoning_content",
    "unasked_turns": "turns without the generation prompt of inference before them; "
    "data.each_turn=true writes it",
    "moved_turns": "turns stand behind another text than when the model is asked, as where tools "
    "or a system turn go to the last question; data.each_turn=true learns each as it is asked",
    "uneven_turns": "turns begin in their conversation otherwise than when the model is asked, "
    "such as without an empty thought; data.each_turn=true learns each as it is asked",
}
COPIED = re.compile(r"%\}\\n|\\\"")  # escapes of JSON
AS_JSON = (
    'it looks like JSON, such as "chat_template" of a tokenizer_config.json: write what that text '
    "means, with line breaks for \\n"
)
NO_TEMPLATE = "write data.chat_template=FILE, or choose an instruct model"


class Rendered(NamedTuple):
    """A conversation as text.

    ``learned``: what the model has to say. ``written``: what the people and tools of the record
    said, in which a special token is text. ``remarks``: what the template does not do as it does
    at inference, counted under a name of REMARKS.
    """

    text: str
    learned: Ranges
    written: Ranges
    remarks: dict[str, int]


class Chat:
    """The chat template of a model folder's tokenizer; loads transformers (4 s) when it is used.

    ``file``: a template that takes the place of the tokenizer's. ``date``: the day, as
    2026-01-31, that a template is told that asks for today's; None: today.
    """

    def __init__(self, model_folder: Path, file: Path | None = None, date: str | None = None):
        self.model_folder, self.file, self.date = model_folder, file, date
        self._tokenizer = None
        self._of_templates: dict[tuple[str, bool], tuple[set[str], str]] = {}

    @classmethod
    def of(cls, model_folder: Path, section: DataSection) -> "Chat":
        """The one that a data set is written by."""
        file = Path(section.chat_template) if section.chat_template else None
        return cls(model_folder, file, section.chat_date)

    def load(self) -> None:
        """Load tokenizer and template now, not on first use. ConfigError if one cannot be."""
        from jinja2.exceptions import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._tokenizer = load_tokenizer(self.model_folder)
        if self.file:
            try:
                self._tokenizer.chat_template = self.file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                name, fix = f"data.chat_template={self.file}", "name a file of a Jinja template"
                raise ConfigError(f"{name}: cannot be read ({error}); {fix}") from None
        template = self.template
        try:
            _compile_jinja_template(template or "")
        except TemplateSyntaxError as error:
            name = f"data.chat_template={self.file}" if self.file else "the model's chat template"
            fix = AS_JSON if COPIED.search(template) else "correct it"
            problem = f"line {error.lineno} is no Jinja ({error.message})"
            raise ConfigError(f"{name}: {problem}; {fix}") from None

    @property
    def template(self) -> str | None:
        """That of a conversation without tools; None if there is none. Raises as ``load``."""
        return self.template_for(None)

    def template_for(self, tools: list | None) -> str | None:
        """The template that the tokenizer uses with these tools, as at inference."""
        if self._tokenizer is None:
            self.load()
        templates = self._tokenizer.chat_template
        if not isinstance(templates, dict):
            return templates or None
        if tools and "tool_use" in templates:
            return templates["tool_use"]
        return templates.get("default") or next(iter(templates.values()), None)

    @property
    def template_hash(self) -> str | None:
        """SHA-256 of the template; None if it was not used, or there is none."""
        template = self.template if self._tokenizer else None
        return hashlib.sha256(template.encode()).hexdigest() if template else None

    def generation_prompt(self) -> str:
        """What the template adds to a question to invite the assistant; empty if it does not."""
        template = self.template
        ways = (partial(self._written, template, tools) for tools in (None, []))
        return next(filter(None, map(invitation, ways)), "")

    def _written(
        self, template: str, tools: list | None, messages: list[dict], invites: bool
    ) -> str:
        return self._write(template, messages, tools, invites)[0]

    def render(
        self, location: str, messages: list[dict], tools: list | None,
        learned: Sequence[int] | None = None, is_asked: bool = False,
    ) -> Rendered:  # fmt: skip
        """The conversation as the template writes it, and which of it the assistant says.

        ``learned``: the numbers of the messages whose text is learned, from 0; None: all of the
        assistant. ``is_asked``: only the last of them, behind what the model is given at inference
        before it. DataError if the template cannot write the conversation, changes or leaves out
        something that was said, or does not show where an answer begins and ends.
        """
        template = self.template_for(tools)
        if template is None:
            raise DataError(
                f"{location}: a conversation, but the tokenizer of {self.model_folder.name} has no "
                f"chat template; {NO_TEMPLATE}"
            )
        if learned is None:
            learned = [n for n, message in enumerate(messages) if says_something(message)]
        if is_asked:
            messages, learned = messages[: learned[-1] + 1], learned[-1:]
        problem = None
        for way in variants(messages, tools, template):  # in order: no record decides for another
            try:
                return self._render(template, *way, learned, is_asked)
            except DataError as error:
                if not isinstance(problem, checks.Dropped):
                    problem = error if isinstance(error, checks.Dropped) else problem or error
        if isinstance(problem, checks.Dropped) and not is_asked:
            with contextlib.suppress(DataError):
                for number in learned:
                    self.render(location, messages, tools, [number], True)
                problem = f"{problem}; or learn each as it is asked: data.each_turn=true"
        raise DataError(f"{location}: {problem}")

    def _render(
        self, template: str, messages: list[dict], tools: list | None, learned: Sequence[int],
        is_asked: bool,
    ) -> Rendered:  # fmt: skip
        """As ``render``, in one way to hand it over; a DataError does not name the record."""
        write = partial(self._written, template, tools)
        key = template, tools is None  # some fail without a list of tools
        if key not in self._of_templates:
            self._of_templates[key] = tags_within(template, write), invitation(write)
        marked = Marked(messages, write, *self._of_templates[key])
        whole = marked.whole
        checks.check_shape(messages, whole.text)
        dropped = 0 if is_asked else checks.check_pieces(marked, whole)
        ignored = self._ignored(template, messages, tools, whole.text)
        turns = [find_turn(marked, whole, number) for number in learned]
        numbered = list(zip(learned, turns, strict=True))
        for number, turn in numbered:
            checks.check_turn(marked, whole, number, turn)
        ranges = [(turn.first, turn.last) for turn in turns]
        if GENERATION_TAG.search(template):
            ranges = common(ranges, self._write(template, messages, tools, False, True)[1])
        if is_asked:
            whole, ranges = behind_prompt(whole, turns[0], ranges)
            dropped = checks.check_pieces(marked, whole)
        text = whole.text + "".join(turn.more for turn in turns)
        calls = [c for m in messages for c in m.get("tool_calls") or ()]
        remarks = {
            "dropped_thoughts": dropped,
            "ignored_tools": ignored,
            "unnamed_calls": checks.unnamed(calls, text),
            "uneven_turns": checks.uneven(marked, whole, numbered),
            "stray_ends": sum(checks.is_stray(marked, whole, t, template) for t in turns),
            "moved_turns": 0 if is_asked else sum(turn.is_moved for turn in turns),
            "unasked_turns": 0 if is_asked else sum(not turn.is_asked for turn in turns),
        }
        places = sorted(place for places in whole.places.values() for place in places)
        return Rendered(text, ranges, merged(places), {k: v for k, v in remarks.items() if v})

    def unread(self, messages: list[dict], tools: list | None) -> set[str]:
        """The keys of turns without which the template writes the same text, as turn.KEY."""
        template, found = self.template_for(tools), set()
        keys = {key for message in messages for key in message.keys() - KNOWN_KEYS}
        for way, given in variants(messages, tools, template) if keys else ():
            with contextlib.suppress(DataError):  # another way is right
                text = self._written(template, given, way, False)
                for key in keys:
                    without = [{k: v for k, v in m.items() if k != key} for m in way]
                    if self._written(template, given, without, False) == text:
                        found.add(f"turn.{key}")
                break
        return found

    def _ignored(self, template: str, messages: list[dict], tools: list | None, text: str) -> int:
        """How many tools the model is not told of; one that a call names may still be such."""
        number = checks.unnamed(tools or (), text)
        if tools and not number:
            with contextlib.suppress(DataError):  # it needs tools, so it reads them
                number = len(tools) * (self._written(template, None, messages, False) == text)
        return number

    def _write(
        self, template: str, messages: list[dict], tools: list | None, invites: bool,
        is_tagged: bool = False,
    ) -> tuple[str, Ranges]:  # fmt: skip
        """Text, and the ranges in {% generation %}; what a template refuses is a DataError."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import (
            _compile_jinja_template,
            render_jinja_template,
        )

        try:
            if self.date:  # else the same data would be another text tomorrow
                day = datetime.date.fromisoformat(self.date)
                midnight = datetime.datetime.combine(day, datetime.time())
                _compile_jinja_template(template).globals["strftime_now"] = midnight.strftime
            texts, ranges = render_jinja_template(
                [messages], tools=tools, chat_template=template,
                return_assistant_tokens_mask=is_tagged, add_generation_prompt=invites,
                **self._tokenizer.special_tokens_map,
            )  # fmt: skip
        except (
            TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError,
        ) as error:  # fmt: skip
            calls = (call for message in messages for call in message.get("tool_calls") or ())
            where = "roles and contents of its messages"
            if any(not isinstance(call["function"]["arguments"], dict) for call in calls):
                where = "arguments of its tool calls, which are no objects"
            problem = f"the chat template does not take it ({first_line(error)})"
            raise DataError(f"{problem}; look at the {where}") from None
        return texts[0], ranges[0] if is_tagged else []


def load_tokenizer(model_folder: Path) -> Any:
    """The tokenizer of a model folder as transformers makes it. ConfigError if it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library tokenizers raises nothing more special
        reason = " ".join(str(error).split())[:200]
        fix = "choose a model with a tokenizer.json"
        if "custom code" in reason:
            reason = "it is Python code of its own, which is never run here"
            fix = "take auto_map out of its tokenizer_config.json if it has a tokenizer.json"
        if not (model_folder / "tokenizer.json").exists() and not find_spec("sentencepiece"):
            reason, fix = "it needs the package sentencepiece", "run: bash setup.sh"
        problem = f"transformers cannot load its tokenizer ({reason})"
        raise ConfigError(f"{model_folder}: {problem}; {fix}") from None


def says_something(message: dict) -> bool:
    """Whether the assistant says anything in it: an empty turn has nothing to learn."""
    said = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    return message.get("role") == "assistant" and any(
        text.strip() if isinstance(text, str) else text for text in said
    )


def behind_prompt(whole: Rendering, turn: Turn, ranges: Ranges) -> tuple[Rendering, Ranges]:
    """A turn behind what the model is given before it at inference, and its learned ranges."""
    prompt = turn.prompt
    move = len(prompt.text) - turn.first
    places = {n: [*found] for n, found in prompt.places.items()}
    for n, found in whole.places.items():
        own = [(a + move, b + move) for a, b in found if a >= turn.first and b <= turn.last]
        places.setdefault(n, []).extend(own)
    text = prompt.text + whole.text[turn.first : turn.last]
    return Rendering(text, places), [(a + move, b + move) for a, b in ranges]


def merged(ranges: Ranges) -> Ranges:
    """Sorted ranges, those that overlap as one."""
    made: Ranges = []
    for first, last in ranges:
        if made and first < made[-1][1]:
            earlier = made.pop()
            first, last = earlier[0], max(last, earlier[1])
        made.append((first, last))
    return made


def common(ranges: Ranges, others: Ranges) -> Ranges:
    """The characters that are in both."""
    both = [(max(a, c), min(b, d)) for a, b in ranges for c, d in others]
    return sorted((first, last) for first, last in both if first < last)
