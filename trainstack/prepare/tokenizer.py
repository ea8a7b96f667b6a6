"""The tokenizer of a model folder: whether it fits the model, and documents as its tokens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.errors import ConfigError
from trainstack.prepare.chat import Ranges
from trainstack.prepare.formats import Document, Segment
from trainstack.storage import layout

LONG_TEXT = 1 << 18  # characters; a longer text is tokenised in parts
CUT_WINDOW = 200  # characters on each side of a cut that are compared
CUT_TRIES = 50  # possible cuts that are compared
Flags = np.ndarray | None  # bool [tokens]: whether each carries loss; None: all do


def load_tokenizer(model_folder: Path) -> tuple[Any, int]:
    """The tokenizer of a model folder without transformers (4 s), and the id of its end token.

    The tokenizer is one of the library tokenizers. ConfigError if it has no end token.
    """
    path = model_folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:  # a sentencepiece model: transformers converts it
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        tokenizer = tokenizer.backend_tokenizer
    end = read_json(model_folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    end_id = tokenizer.token_to_id(end) if end else None
    if end_id is None:
        end_id = read_json(model_folder / "config.json").get("eos_token_id")
        end_id = end_id[0] if isinstance(end_id, list) else end_id
    if end_id is None:
        raise ConfigError(
            f"{model_folder}: its tokenizer has no end token, so documents cannot be joined; "
            "name one as eos_token in its tokenizer_config.json"
        )
    return tokenizer, end_id


def check_vocabulary(home: Path, model_name: str, tokens_known: int) -> None:
    """ConfigError if the tokenizer has more tokens than the model's embedding has rows."""
    vocab_size = model_vocabulary(layout.model_folder(home, model_name))
    if tokens_known > vocab_size:
        raise ConfigError(
            f"{model_name}: its tokenizer has {tokens_known:,} tokens, its "
            f"model only {vocab_size:,}; they do not belong together, choose another model.name"
        )


def model_vocabulary(model_folder: Path) -> int:
    """Rows of the model's embedding, from its config.json. ConfigError if it does not say."""
    config = read_json(model_folder / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise ConfigError(f"{model_folder}/config.json: no vocab_size; is it a language model?")
    return size


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there."""
    return json.loads(path.read_bytes()) if path.exists() else {}


def encode(
    tokenizer, end_id: int, documents: Sequence[Document]
) -> Iterator[tuple[Document, np.ndarray, Flags]]:
    """Each document with its token ids and flags, both [tokens].

    Encoded together, over all cores. A document of which no token is a target comes with flags that
    are all False.
    """
    segments = [segment for document in documents for segment in document.segments]
    needs_offsets = any(segment.learned for segment in segments)  # costs a quarter of the speed
    encode_batch = tokenizer.encode_batch if needs_offsets else tokenizer.encode_batch_fast
    texts = [segment.text for segment in segments if not _is_long(segment)]
    encoded = iter(encode_batch(texts, add_special_tokens=False))
    for document in documents:
        ids, flags = [], []
        for segment in document.segments:
            if _is_long(segment):
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


def _is_long(segment: Segment) -> bool:
    """Whether it is tokenised in parts; ranges of characters need the whole text."""
    return len(segment.text) > LONG_TEXT and not segment.learned


def long_ids(tokenizer, text: str) -> np.ndarray:
    """The ids of a long text, int64, tokenised in parts: at once it takes 120 bytes a character.

    Cut only where the tokens around the cut are those of the uncut text; if that is nowhere, whole.
    """
    found, start = [], 0
    while start < len(text):
        stop = len(text)
        if stop - start > LONG_TEXT:
            stop = safe_cut(tokenizer, text, start, start + LONG_TEXT) or len(text)
        encoding = tokenizer.encode_batch_fast([text[start:stop]], add_special_tokens=False)[0]
        found.append(np.array(encoding.ids, np.int64))
        start = stop
    return np.concatenate(found)


def safe_cut(tokenizer, text: str, start: int, stop: int) -> int | None:
    """Where a text can be cut before ``stop``: at the end of a line, else before a space."""

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for sign, skipped in (("\n", 1), (" ", 0)):
        at = stop
        for _ in range(CUT_TRIES):
            at = text.rfind(sign, start + 1, at)
            if at < 0:
                break
            cut = at + skipped
            before, after = text[max(start, cut - CUT_WINDOW) : cut], text[cut : cut + CUT_WINDOW]
            if ids_of(before) + ids_of(after) == ids_of(before + after):
                return cut
    return None


def learned_tokens(encoding, learned: Ranges | None) -> np.ndarray:
    """Per token, whether it is, at least in part, in one of the ranges of characters; bool."""
    if not learned:
        return np.full(len(encoding.ids), learned is None)
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    flags = np.zeros(len(offsets), bool)
    for first, last in learned:
        begin = np.searchsorted(offsets[:, 1], first, "right")
        flags[begin : np.searchsorted(offsets[:, 0], last, "left")] = True
    return flags
