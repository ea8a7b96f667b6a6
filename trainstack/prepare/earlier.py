"""Stores that the rules before made: where both rules make the same, there is one store."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.config.schema import DataSection
from trainstack.data import store
from trainstack.data.writer import temporary_folder
from trainstack.prepare.tokenizer import load_backend
from trainstack.storage import layout, manifest
from trainstack.storage.files import read_object

UNREAD = {"post_processor": None, "truncation": None, "padding": None}  # if they add no token


def adopt(home: Path, model_name: str, section: DataSection, final: Path) -> bool:
    """Whether the rules before made the same store; then ``final`` becomes a link to it."""
    last = store.store_folder(home, model_name, section, store.LAST_VERSION).resolve()
    if manifest.is_whole(last) and read_object(last / "meta.json")["format"] in store.PLAIN:
        link(final, last)
        return True
    earlier = store.store_folder(home, model_name, section, store.EARLIER_VERSION)
    if not (store.is_as_before(section) and manifest.is_whole(earlier)):
        return False
    model_folder = layout.model_folder(home, model_name)
    made = store.TokenStore(earlier, section.seq_len)
    tokenizer = read_alike(model_folder) if made.meta["format"] == "text" else None
    if tokenizer is None:
        return False
    added = tokenizer.get_added_tokens_decoder().items()
    special = [number for number, token in added if token.special]
    found = sum(int(np.isin(split.ids, special).sum()) for split in (made.train, made.eval))
    if found != made.counts.train_documents + made.counts.eval_documents:
        return False  # some were written in a document, which are text now
    link(final, earlier)
    return True


def read_alike(model_folder: Path) -> Any:
    """The tokenizer, if it gives a plain text the ids that its tokenizer.json alone gives."""
    from tokenizers import Tokenizer

    path = model_folder / "tokenizer.json"
    if not path.exists():
        return None
    pair = Tokenizer.from_file(str(path)), load_backend(model_folder)[0]
    own, theirs = ({**json.loads(made.to_str()), **UNREAD} for made in pair)
    adds = any(made.num_special_tokens_to_add(False) for made in pair)
    return pair[0] if own == theirs and not adds else None


def link(final: Path, target: Path) -> None:
    """Let ``final`` be another name of a store beside it."""
    temporary = temporary_folder(final)
    temporary.symlink_to(target.name)
    manifest.remove_folder(final)
    temporary.replace(final)
