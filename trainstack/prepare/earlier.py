"""Stores that the rules before made: where both rules make the same, there is one store."""

import json
from pathlib import Path

from trainstack.config.schema import DataSection
from trainstack.data import store
from trainstack.data.writer import temporary_folder
from trainstack.prepare.tokenizer import load_backend
from trainstack.storage import manifest
from trainstack.storage.files import read_object

UNREAD = {"post_processor": None, "truncation": None, "padding": None}  # if they add no token


def adopt(home: Path, model_name: str, section: DataSection, final: Path) -> bool:
    """Whether the last rules made the same store; then ``final`` becomes a link to it."""
    last = store.store_folder(home, model_name, section, store.LAST_VERSION).resolve()
    is_same = manifest.is_whole(last) and read_object(last / "meta.json")["format"] in store.PLAIN
    if is_same:
        link(final, last)
    return is_same


def is_read_alike(model_folder: Path) -> bool:
    """Whether the tokenizer gives a plain text the ids that its tokenizer.json alone gives.

    And says itself what ends a text: the key of the rules before knows nothing of config.json.
    """
    from tokenizers import Tokenizer

    path = model_folder / "tokenizer.json"
    if not path.exists() or "eos_token_id" in store.read_by_tokenizer(model_folder):
        return False
    pair = Tokenizer.from_file(str(path)), load_backend(model_folder)[0]
    own, theirs = ({**json.loads(made.to_str()), **UNREAD} for made in pair)
    return own == theirs and not any(made.num_special_tokens_to_add(False) for made in pair)


def link(final: Path, target: Path) -> None:
    """Let ``final`` be another name of a store beside it."""
    temporary = temporary_folder(final)
    temporary.symlink_to(target.name)
    manifest.remove_folder(final)
    temporary.replace(final)
