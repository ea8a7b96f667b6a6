"""The token store: a data set tokenised once, then read-only.

``tokens/<key>/`` holds for each of the splits train and eval

- .bin: token ids, little-endian uint16 or uint32, one document after the other
- .documents: where each document ends
- .loss: which tokens carry loss, if not all do
- .pieces, .rows, .targets: the samples, if documents are packed whole

and meta.json (what made it), bad_records.jsonl (which records were left out) and manifest.json.
The key is a hash of the data files, the tokenizer and the settings: other data is another store.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.config.schema import DataSection
from trainstack.data.split import EVAL, TRAIN, Split
from trainstack.storage import manifest
from trainstack.storage.layout import dataset_folder, model_folder

FORMAT_VERSION = 2  # higher whenever the same files would give other tokens, as by formats.py
# Their hashes are in the key of a store: another list means another key. A checkpoint copies more.
DECIDE_TOKENS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PACKED_LAYOUT = 2  # of samples of whole documents; another one is another store


@dataclass
class Counts:
    """What a preparation found: documents and tokens per split, and what was left out."""

    train_documents: int = 0
    train_tokens: int = 0
    train_target_tokens: int = 0  # those that carry loss
    eval_documents: int = 0
    eval_tokens: int = 0
    eval_target_tokens: int = 0
    empty_documents: int = 0
    split_documents: int = 0  # longer than seq_len, if documents are packed whole
    dropped_documents: int = 0
    bad_records: int = 0


def made_from(model: Path, dataset: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a store holds: hashes of the files, and settings; from manifests only.

    FileNotFoundError or ValueError if the model or the data set is not there or not whole.
    """
    model_files = manifest.read_manifest(model)["files"]
    return {
        "format": FORMAT_VERSION,
        "tokenizer": {n: model_files[n]["sha256"] for n in DECIDE_TOKENS if n in model_files},
        "source": {n: e["sha256"] for n, e in manifest.read_manifest(dataset)["files"].items()},
        "settings": settings,
    }


def store_key(inputs: dict[str, Any]) -> str:
    """The name of the store that ``made_from`` describes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def store_folder(home: Path, model_name: str, section: DataSection) -> Path:
    """Where the store of one data set is, or will be. Raises as ``made_from``."""
    model = model_folder(home, model_name)
    dataset = dataset_folder(home, section.name, section.subset)
    return home / "tokens" / store_key(made_from(model, dataset, store_settings(section)))


def store_settings(section: DataSection) -> dict[str, Any]:
    """The settings of config.yaml's data section that decide which tokens a store holds."""
    keys = ["split", "eval_split", "eval_fraction", "format", "text_field", "packing"]
    keys += ["max_bad_records"]
    if section.packing != "concat":  # the samples are laid out in the store
        keys += ["seq_len", "too_long"]
    settings = {key: getattr(section, key) for key in keys}
    return settings if section.packing == "concat" else {**settings, "layout": PACKED_LAYOUT}


class TokenStore:
    """One store by samples of ``seq_len`` tokens, read-only; ``train`` and ``eval``: its splits."""

    def __init__(self, folder: Path, seq_len: int):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_bytes())
        self.counts = Counts(**self.meta["counts"])
        dtype = np.dtype(self.meta["dtype"])
        self.train, self.eval = (Split(folder, s, dtype, seq_len) for s in (TRAIN, EVAL))
