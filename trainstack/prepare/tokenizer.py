"""The tokenizer of a model folder, and documents as the tokens that it gives at inference."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.chat.template import load_tokenizer
from trainstack.errors import ConfigError
from trainstack.prepare import long_texts
from trainstack.prepare.formats import Document
from trainstack.prepare.long_texts import Flags, cut_of, joined, learned_tokens, long_ids
from trainstack.storage import layout
from trainstack.storage.files import read_object


def load_backend(model_folder: Path) -> tuple[Any, int]:
    """The tokenizer of the library tokenizers in a model folder, and the id of its end token.

    As transformers makes it: for many models that differs from their tokenizer.json. ConfigError if
    it cannot be loaded or has no end token.
    """
    loaded = load_tokenizer(model_folder)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        problem = "transformers has only Python code for its tokenizer"
        raise ConfigError(f"{model_folder}: {problem}; choose a model with a tokenizer.json")
    if getattr(tokenizer.model, "dropout", None):
        raise ConfigError(
            f"{model_folder}: its tokenizer.json makes tokens at random (dropout "
            f'{tokenizer.model.dropout:.3g}), at inference too; write there "dropout": null'
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_id = loaded.eos_token_id
    if end_id is None:
        end_id = read_object(model_folder / "config.json").get("eos_token_id")
        end_id = end_id[0] if isinstance(end_id, list) else end_id
    if end_id is None:
        raise ConfigError(
            f"{model_folder}: its tokenizer has no end token, so documents cannot be joined; "
            "name one as eos_token in its tokenizer_config.json"
        )
    return tokenizer, end_id


def load_encoder(home: Path, model_name: str, special_tokens: str | None) -> "Encoder":
    """The tokenizer of a model, ready to encode; raises as ``load_backend``.

    ConfigError too if the model has no row for a token that every document gets.
    """
    folder = layout.model_folder(home, model_name)
    tokenizer, end_id = load_backend(folder)
    made = Encoder(tokenizer, end_id, model_vocabulary(folder), special_tokens)
    largest = max([end_id, *made.before, *made.after])
    check_vocabulary(home, model_name, largest, f" ({tokenizer.id_to_token(largest)})")
    return made


def check_vocabulary(home: Path, model_name: str, largest_id: int, name: str = "") -> None:
    """ConfigError if the model's embedding has no row for a token; ``name``: of it, if known."""
    vocab_size = model_vocabulary(layout.model_folder(home, model_name))
    if largest_id >= vocab_size:
        raise ConfigError(
            f"{model_name}: its tokenizer gives token {largest_id:,}{name}, its model has "
            f"only {vocab_size:,}; they do not belong together, choose another model.name"
        )


def model_vocabulary(model_folder: Path) -> int:
    """Rows of the model's embedding, from its config.json. ConfigError if it does not say."""
    config = read_object(model_folder / "config.json")
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not size:  # the class of the configuration has a value, maybe under another name
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(model_folder, local_files_only=True).get_text_config()
        size = getattr(text, "vocab_size", None)
    if not size:
        raise ConfigError(f"{model_folder}/config.json: no vocab_size; is it a language model?")
    return size


@dataclass(frozen=True)
class Encoded:
    """A document's token ids, int32, and flags, both [tokens].

    ``written``: the special tokens that a person wrote out in it, and that were kept as text.
    ``remarks``: counts under names of REMARKS. ``problem``: why it cannot be learned from, or None.
    """

    ids: np.ndarray
    flags: Flags
    written: list[str]
    remarks: dict[str, int]
    problem: str | None


class Encoder:
    """Documents as the token ids that the tokenizer, which is changed, gives at inference.

    ``vocab_size``: rows of the model's embedding. ``special_tokens``: data.special_tokens.
    """

    def __init__(self, tokenizer, end_id: int, vocab_size: int, special_tokens: str | None):
        self.tokenizer, self.end_id, self.vocab_size = tokenizer, end_id, vocab_size
        self.setting = special_tokens
        self.largest_id = max(end_id, *tokenizer.get_vocab().values())
        self.before, self.after = ids_around(tokenizer)
        tokenizer.post_processor = None  # it would take spaces out of the offsets
        self._is_always_text = tokenizer.encode_special_tokens
        added = [] if self._is_always_text else tokenizer.get_added_tokens_decoder().items()
        # Nobody writes out one of a single character.
        self._special = {t.content: n for n, t in added if t.special and len(t.content) > 1}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._unknown = getattr(tokenizer.model, "unk_token", "<unk>")  # Unigram does not tell
        unknown_id = tokenizer.token_to_id(self._unknown or "")
        self.unknown_id = -1 if unknown_id in (None, end_id) else unknown_id

    @functools.cached_property
    def _marks(self) -> tuple[dict[str, str], np.ndarray]:
        """A mark for each special token, and the id that is meant by each id of the tokenizer.

        A mark stands for a special token that a template wrote, where those are text that a person
        wrote. It is as long as the token, and begins with NUL, which no document holds.
        """
        from tokenizers import AddedToken

        known, taken = self.tokenizer.get_added_tokens_decoder(), self.tokenizer.get_vocab()
        kinds = ("single_word", "lstrip", "rstrip", "normalized")
        marks = {}
        for name, number in self._special.items():
            marks[name] = f"\0{chr(0x10000 + number)}".ljust(len(name), "\0")
            alike = {kind: getattr(known[number], kind) for kind in kinds}
            self.tokenizer.add_tokens([AddedToken(marks[name], special=False, **alike)])
        numbers = {self.tokenizer.token_to_id(mark): name for name, mark in marks.items()}
        assert numbers.keys().isdisjoint(taken.values()), "the library gave ids a second time"
        meant = np.arange(max(*numbers, *taken.values()) + 1, dtype=np.int32)
        for number, name in numbers.items():
            meant[number] = self._special[name]
        return marks, meant

    def encode(self, documents: Sequence[Document]) -> Iterator[tuple[Document, Encoded]]:
        """Each document with its tokens, encoded together, over all cores.

        One of which no token is a target comes with flags that are all False.
        """
        pairs = [(document, self._written(document)) for document in documents]
        for is_text, run in itertools.groupby(pairs, lambda pair: self._is_text(*pair)):
            yield from self._encode_alike(list(run), is_text)

    def _written(self, document: Document) -> list[str]:
        """The special tokens that a person wrote out, if those are to be text."""
        if self.setting == "tokens" and not document.is_rendered:
            return []
        text, ranges = document.text, document.of_people
        found = (self._pattern.findall(text, first, last) for first, last in ranges)
        return list(dict.fromkeys(itertools.chain(*found)))

    def _is_text(self, document: Document, written: list[str]) -> bool:
        """Whether special tokens are encoded as text; those of a template then have marks."""
        if document.is_rendered:
            return self._is_always_text or bool(written)
        return self.setting != "tokens" or self._is_always_text

    def _encode_alike(
        self, run: list[tuple[Document, list[str]]], is_text: bool
    ) -> Iterator[tuple[Document, Encoded]]:
        self.tokenizer.encode_special_tokens = is_text
        texts = [self._marked(d) if is_text and d.written is not None else d.text for d, _ in run]
        needs_offsets = any(document.learned for document, _ in run)  # a quarter of the speed
        tokenizer, special = self.tokenizer, [*self._special.values()]
        if is_text and any(d.written for d, _ in run):
            special += np.flatnonzero(np.isin(self._marks[1], special)).tolist()
        encode_batch = tokenizer.encode_batch if needs_offsets else tokenizer.encode_batch_fast
        short = [text for text, (d, _) in zip(texts, run, strict=True) if not is_long(d)]
        encodings = iter(encode_batch(short, add_special_tokens=False))
        for text, (document, written) in zip(texts, run, strict=True):
            if is_long(document):  # a piece comes with what its tokens depend on
                around, first = document.before + text + document.after, len(document.before)
                stop = first + len(text) if document.after else None
                ids, offsets = long_ids(tokenizer, around, first, stop)
            else:
                encoding = next(encodings)
                ids = np.array(encoding.ids, np.int32)
                offsets = encoding.offsets if document.learned else ()
            flags, others = learned_tokens(tokenizer, text, ids, offsets, document.learned, special)
            meant = ids if text is document.text else self._marks[1][ids]
            problem = self._problem(document, written, ids, meant)
            remarks = {
                "merged_answers": others,
                "unknown_tokens": int((ids == self.unknown_id).sum()),
                "lost_characters": self.lost_in(document.text),
            }
            if not document.is_rendered:
                meant, flags = self._whole(document, meant, flags)
            yield document, Encoded(meant, flags, written, remarks, problem)

    @functools.cached_property
    def _alphabet(self) -> set[str]:
        """The characters of its tokens, if others would get lost; empty if none can."""
        from tokenizers import models, pre_tokenizers

        model = self.tokenizer.model
        if not isinstance(model, models.BPE) or model.unk_token or model.byte_fallback:
            return set()
        found = {*"".join(self.tokenizer.get_vocab())}
        return set() if {*pre_tokenizers.ByteLevel.alphabet()} <= found else found

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - there is one for a preparation
    def _is_lost(self, sign: str) -> bool:
        """Whether a character has no token. One that its pre-tokenizer takes away is not meant."""
        normalizer, splitter = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        text = normalizer.normalize_str(sign) if normalizer else sign
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return not {*"".join(pieces)} <= self._alphabet

    def lost_in(self, text: str) -> int:
        """How many characters of a text no token could be of."""
        if not self._alphabet:
            return 0
        text = self._pattern.sub("", text)
        return sum(text.count(sign) for sign in {*text} if self._is_lost(sign))

    def cut(self, text: str) -> tuple[int, int, int] | None:
        """As ``cut_of``, for texts that no template wrote."""
        self.tokenizer.encode_special_tokens = self.setting != "tokens" or self._is_always_text
        return cut_of(self.tokenizer, text)

    def _marked(self, document: Document) -> str:
        """The text with marks for the special tokens that no person wrote."""
        marks, text, parts, start = self._marks[0], document.text, [], 0
        for first, last in [*document.written, (len(text), len(text))]:
            parts.append(self._pattern.sub(lambda m: marks[m.group()], text[start:first]))
            parts.append(text[first:last])
            start = last
        return "".join(parts)

    def _whole(self, document: Document, ids: np.ndarray, flags: Flags) -> tuple[np.ndarray, Flags]:
        """With what comes before and behind a text that no template wrote, each once."""
        before = [] if document.is_begun else self.before
        before = [] if ids[: len(before)].tolist() == before else before
        if document.is_continued:  # its end is in another piece
            return joined([before, ids], np.int32), flags
        after = self.after
        after = [] if ids[-len(after) :].tolist() == after else after
        if [*ids[-1:], *after][-1:] != [self.end_id]:
            after = [*after, self.end_id]
        if flags is not None:
            flags = joined([[False] * len(before), flags, [True] * len(after)], bool)
        return joined([before, ids, after], np.int32), flags

    def _problem(
        self, document: Document, written: list[str], ids: np.ndarray, meant: np.ndarray
    ) -> str | None:
        """Why a document cannot be learned from; ``ids`` have marks, ``meant`` what they mean."""
        holds, rows = f"{document.location}: holds", self.vocab_size
        numbers = {name: self._special[name] for name in written}
        for name, number in numbers.items():
            if number >= rows and self.setting is None and not document.is_rendered:
                return (
                    f"{holds} {name}, token {number:,} of a model that has {rows:,}; keep it as "
                    "text with data.special_tokens=text, or set tokens and choose another model"
                )
            if name != self._unknown and (ids == number).any():
                return f"{holds} {name}, which this tokenizer cannot write as text; change it" + (
                    "" if document.is_rendered else ", or set data.special_tokens=tokens"
                )
        largest = int(meant.max(initial=0))
        if largest >= rows:
            name = self.tokenizer.id_to_token(largest)
            fix = "leave it out, or choose another model.name"
            if name in self._special:
                fix = "keep it as text with data.special_tokens=text"
                if document.is_rendered:
                    fix = "the chat template writes it: set another data.chat_template"
            return f"{holds} {name}, token {largest:,} of a model that has {rows:,}; {fix}"
        return None


def is_long(document: Document) -> bool:
    """Whether its text is tokenised in parts, since it is long, or a piece of a longer one."""
    return len(document.text) > long_texts.LONG_TEXT or document.before + document.after != ""


def ids_around(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before each text at inference, and what behind."""
    for text in ("a", *tokenizer.get_vocab()):
        inner = tokenizer.encode(text, add_special_tokens=False).ids
        if inner:
            break
    encoding = tokenizer.encode(text)
    is_added = encoding.special_tokens_mask
    first = is_added.index(0)
    return encoding.ids[:first], encoding.ids[first + len(inner) :]
