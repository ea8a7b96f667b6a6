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

    @property
    def template(self) -> str | None:
        if self._tokenizer is None:
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
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def template_hash(self) -> str | None:
        """SHA-256 of the template; None where none was asked for, or there is none."""
        template = self.template if self._tokenizer else None
        return hashlib.sha256(template.encode()).hexdigest() if template else None

    def render(self, place: str, messages: list[dict], tools: list | None) -> tuple[str, Ranges]:
        """The conversation as the template writes it, and the assistant's parts of it.

        Where the template does not mark them with {% generation %}, a turn is what is added to the
        conversation before it, the invitation to the assistant included, by that turn.
        """
        if self.template is None:
            raise DataError(
                f"{place}: a conversation, but the tokenizer of {self.model_folder.name} has no "
                "chat template; choose an instruct model, or add a chat_template.jinja"
            )
        if GENERATION_TAG.search(self.template):
            text, learned = self._render(place, messages, tools, is_marked=True)
            return text, [(first, last) for first, last in learned if first < last]
        text, _ = self._render(place, messages, tools)
        learned = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                before, after = messages[:i], messages[: i + 1]
                learned.append(self._difference(place, before, after, tools, text))
        return text, learned

    def render_completion(
        self, place: str, prompt: list[dict], completion: list[dict], tools: list | None
    ) -> tuple[str, Ranges]:
        """Both as one conversation, and the part of it that follows the prompt."""
        messages = [*prompt, *completion]
        text, _ = self._render(place, messages, tools)
        return text, [self._difference(place, prompt, messages, tools, text)]

    def _difference(self, place: str, before: list, after: list, tools, whole: str):
        if not before:
            raise DataError(
                f"{place}: begins with the assistant's turn, which a chat template without "
                "{% generation %} cannot set apart; begin with a user's or a system's"
            )
        start, _ = self._render(place, before, tools, add_generation_prompt=True)
        end, _ = self._render(place, after, tools)
        if not whole.startswith(end) or not end.startswith(start):
            raise DataError(
                f"{place}: the chat template of {self.model_folder.name} writes turn {len(after)} "
                "differently once the conversation goes on, so the assistant's part cannot be set "
                "apart; put {% generation %} around it in the template"
            )
        return len(start), len(end)

    def _render(self, place, messages, tools, is_marked=False, add_generation_prompt=False):
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
                f"{place}: the chat template cannot write it ({reason}); look at the roles and "
                "contents of its messages"
            ) from None
        return texts[0], ranges[0] if is_marked else []
