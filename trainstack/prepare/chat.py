"""A conversation as the tokenizer's chat template writes it, and what of it the assistant says."""

import hashlib
import re
from pathlib import Path

from trainstack.errors import ConfigError, DataError

Ranges = list[tuple[int, int]]  # of characters: the first, and the one after the last
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """The chat template of a model folder's tokenizer; loads transformers (4 s) when it is used."""

    def __init__(self, model_folder: Path):
        self.model_folder = model_folder
        self._tokenizer = None

    def load(self) -> None:
        """Load the tokenizer now, else the first use does. ConfigError if that cannot be."""
        from transformers import AutoTokenizer

        folder = self.model_folder
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{folder}: transformers cannot load its tokenizer ({reason}); choose another "
                "model.name"
            ) from None

    @property
    def template(self) -> str | None:
        """The template; None if there is none. Raises as ``load``."""
        if self._tokenizer is None:
            self.load()
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def template_hash(self) -> str | None:
        """SHA-256 of the template; None if it was not used, or there is none."""
        template = self.template if self._tokenizer else None
        return hashlib.sha256(template.encode()).hexdigest() if template else None

    def render(self, location: str, messages: list[dict], tools: list | None) -> tuple[str, Ranges]:
        """The conversation as the template writes it, and which of it the assistant says.

        If the template does not mark that with {% generation %}, a turn of the assistant is what
        it adds to the conversation before it with the invitation to answer. DataError if the
        template cannot write the conversation, or an answer cannot be told apart.
        """
        if self.template is None:
            raise DataError(
                f"{location}: a conversation, but the tokenizer of {self.model_folder.name} has no "
                "chat template; choose an instruct model, or add a chat_template.jinja"
            )
        if GENERATION_TAG.search(self.template):
            text, learned = self._render(location, messages, tools, is_marked=True)
            return text, [(first, last) for first, last in learned if first < last]
        text, _ = self._render(location, messages, tools)
        learned = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                before, after = messages[:i], messages[: i + 1]
                learned.append(self._difference(location, before, after, tools, text))
        return text, learned

    def render_completion(
        self, location: str, prompt: list[dict], completion: list[dict], tools: list | None
    ) -> tuple[str, Ranges]:
        """Both as one conversation, and the range that follows the prompt. Raises as ``render``."""
        messages = [*prompt, *completion]
        text, _ = self._render(location, messages, tools)
        return text, [self._difference(location, prompt, messages, tools, text)]

    def _difference(
        self, location: str, before: list[dict], after: list[dict], tools: list | None, whole: str
    ) -> tuple[int, int]:
        """The range of characters of ``whole`` that ``after`` adds to ``before``."""
        if not before:
            raise DataError(
                f"{location}: begins with the assistant's turn, which a chat template without "
                "{% generation %} cannot set apart; begin with a user's or a system's"
            )
        start, _ = self._render(location, before, tools, add_generation_prompt=True)
        end, _ = self._render(location, after, tools)
        if not whole.startswith(end) or not end.startswith(start):
            raise DataError(
                f"{location}: the chat template of {self.model_folder.name} writes turn "
                f"{len(after)} differently once the conversation continues, so the assistant's "
                "part cannot be set apart; put {% generation %} around it in the template"
            )
        return len(start), len(end)

    def _render(
        self, location: str, messages: list[dict], tools: list | None,
        is_marked: bool = False, add_generation_prompt: bool = False,
    ) -> tuple[str, Ranges]:  # fmt: skip
        """Text and the marked ranges of characters; what a template refuses is a DataError."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            texts, ranges = render_jinja_template(
                [given], tools=tools, chat_template=self.template,
                return_assistant_tokens_mask=is_marked,
                add_generation_prompt=add_generation_prompt, **self._tokenizer.special_tokens_map,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{location}: the chat template cannot write it ({reason}); look at the roles and "
                "contents of its messages"
            ) from None
        return texts[0], ranges[0] if is_marked else []
