"""The token store: a data set tokenised once, then read-only.

``tokens/<key>/`` holds for each of the splits train and eval

- .bin: token ids, little-endian uint16 or uint32, one document after the other
- .documents: where each document ends
- .loss: which tokens carry loss, if not all do
- .pieces, .rows, .targets: the samples, if documents are packed whole

and meta.json (what made it), bad_records.jsonl (which records were left out) and manifest.json.
The key is a hash of the data files, the tokenizer and the settings: other data is another store.
The key of the newest rules may be a link to the store that the rules before made alike.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.chat import template
from trainstack.config.schema import Config, DataSection
from trainstack.data.split import EVAL, TRAIN, Split
from trainstack.errors import ConfigError
from trainstack.storage import manifest
from trainstack.storage.files import read_object
from trainstack.storage.layout import dataset_folder, model_folder
from trainstack.units import counted

FORMAT_VERSION = 4  # higher whenever the same files would give other tokens, as by formats.py
LAST_VERSION = 3  # which differs in conversations alone: calls, and tags that somebody wrote
EARLIER_VERSION = 2  # whose stores, as the last ones, the runs that began with them go on using
EARLIER_FILES = (  # of the model, whose hashes are in a key of that version
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Of a model's files: what is no weight and none of these may decide tokens.
NOT_OF_TOKENIZER = ("config.json", "generation_config.json", "preprocessor_config.json")
# Settings that version 2 did not have, with the values that it stands for.
SINCE_VERSION_3 = {
    "columns": {}, "learn": "all", "each_turn": False, "chat_template": None, "chat_date": None,
    "special_tokens": None, "split_on": None,
}  # fmt: skip
REMARKS = {
    **template.REMARKS,
    "unanswered": "conversations end with a turn that nobody answers; if data.columns swaps user "
    "and assistant, correct it",
    "merged_answers": "prompts end with other tokens when their answers follow than alone, as at "
    "inference; take white space away where they meet, in the data or in the template",
    "unknown_tokens": "tokens are the unknown token, for what the tokenizer does not know; choose "
    "a model made for such texts",
    "lost_characters": "characters are lost, for the tokenizer has no token that they could be of; "
    "choose a model made for such texts",
    "shared_documents": "held-out documents are in the training split too, so their loss says "
    "little; take them out of one",
}  # counts of which people are told, if they are not 0
PLAIN = ("text", "prompt_completion")  # formats that no chat template writes
BAD_RECORDS = "bad_records.jsonl"  # location and reason of each record left out
SHOWN = 8  # columns
PACKED_LAYOUT = 2  # of samples of whole documents; another one is another store


@dataclass
class Counts:
    """What a preparation found: documents and tokens per split, and what was left out."""

    train_documents: int = 0
    train_tokens: int = 0
    train_target_tokens: int = 0  # those that carry loss
    train_bytes: int = 0  # of text whose tokens all carry loss; 0 in stores from before
    eval_documents: int = 0
    eval_tokens: int = 0
    eval_target_tokens: int = 0
    eval_bytes: int = 0
    empty_documents: int = 0
    split_documents: int = 0  # longer than seq_len, if documents are packed whole
    dropped_documents: int = 0
    bad_records: int = 0
    dropped_thoughts: int = 0  # turns whose thoughts the chat template left out
    ignored_tools: int = 0  # that it did not write
    unnamed_calls: int = 0  # of tools, without the name
    stray_ends: int = 0  # turns that close what nothing opens
    unasked_turns: int = 0  # without the generation prompt of inference before them
    unanswered: int = 0  # conversations that end before an answer
    moved_turns: int = 0  # behind another text than when the model is asked
    uneven_turns: int = 0  # that begin otherwise than the last one of their conversation
    merged_answers: int = 0  # before which a prompt ends with other tokens than alone
    unknown_tokens: int = 0  # the tokenizer's own for what it does not know
    lost_characters: int = 0  # for which there is no token, not even one for what is not known
    shared_documents: int = 0  # held out, and in the training split too
    divided_texts: int = 0  # in which data.split_on is
    written_documents: int = 0  # that hold a special token of a person, as text
    first_written: str = ""  # location and token of the first
    largest_id: int = 0  # of all tokens
    unread: list[str] = field(default_factory=list)  # columns, and keys of turns

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Counts":
        """As they were written down; those that only later code has are left out."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def made_from(
    home: Path, model_name: str, section: DataSection, version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """All that decides what a store holds: hashes of the files, and settings.

    FileNotFoundError or ValueError if the model or the data set is not there or not whole.
    """
    model = model_folder(home, model_name)
    files = manifest.read_manifest(model)["files"]
    source = manifest.read_manifest(dataset_folder(home, section.name, section.subset))["files"]
    is_earlier = version == EARLIER_VERSION
    decides = [n for n in files if not is_of_weights(n) and n not in NOT_OF_TOKENIZER]
    decides = [n for n in files if n in EARLIER_FILES] if is_earlier else decides
    inputs = {
        "format": version,
        "tokenizer": {name: files[name]["sha256"] for name in decides},
        "source": {name: entry["sha256"] for name, entry in source.items()},
        "settings": store_settings(section, is_earlier),
    }
    return inputs if is_earlier else inputs | {"config": read_by_tokenizer(model)}


def read_by_tokenizer(model: Path) -> dict[str, Any]:
    """What of config.json decides tokens, if the tokenizer's own settings do not."""
    settings = read_object(model / "tokenizer_config.json")
    config = read_object(model / "config.json")
    pairs = {"tokenizer_class": "model_type", "eos_token": "eos_token_id"}
    return {theirs: config.get(theirs) for own, theirs in pairs.items() if not settings.get(own)}


def is_of_weights(name: str) -> bool:
    """Whether a file of a model holds weights, or says which ones do."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def store_folder(
    home: Path, model_name: str, section: DataSection, version: int = FORMAT_VERSION
) -> Path:
    """Where the store of one data set is, or will be. Raises as ``made_from``."""
    inputs = json.dumps(made_from(home, model_name, section, version), sort_keys=True)
    return home / "tokens" / hashlib.sha256(inputs.encode()).hexdigest()[:16]


def find_store(home: Path, model_name: str, section: DataSection, kept: Sequence[str]) -> Path:
    """The store that a run reads, whether or not it is there; links are followed.

    ``kept``: the names of those that the run has learned from: it continues with one that the rules
    before made of the same files and settings. Raises as ``made_from``.
    """
    for version in (LAST_VERSION, EARLIER_VERSION) if kept else ():
        if version == LAST_VERSION or is_as_before(section):
            earlier = store_folder(home, model_name, section, version)
            if earlier.name in kept and earlier.exists():
                return earlier
    return store_folder(home, model_name, section).resolve()


def find_stores(home: Path, config: Config, kept: Sequence[str]) -> list[Path]:
    """The store of each data set, in their order, as ``find_store`` has them.

    Of a run that has learned (``kept``) the stores themselves will do, whatever became of the model
    and the data that they were made from.
    """
    found, sections = [], config.data.sources
    for number, section in enumerate(sections):
        own = home / "tokens" / kept[number] if len(kept) == len(sections) else None
        try:
            folder = find_store(home, config.model.name, section, kept)
        except (OSError, ValueError):
            if own is None:
                raise
            folder = own
        is_gone = not (model_folder(home, config.model.name) / "config.json").exists()
        found.append(own if own is not None and is_gone else folder)
    return found


def is_as_before(section: DataSection) -> bool:
    """Whether the settings ask for nothing that the rules before did not have."""
    usual = SINCE_VERSION_3.items()
    return all(getattr(section, key) == value for key, value in usual if key != "chat_date")


def store_settings(section: DataSection, is_earlier: bool = False) -> dict[str, Any]:
    """The settings of config.yaml's data section that decide which tokens a store holds."""
    keys = ["split", "eval_split", "eval_fraction", "format", "text_field", "packing"]
    keys += ["max_bad_records", *(() if is_earlier else SINCE_VERSION_3)]
    settings = {key: getattr(section, key) for key in keys}
    if section.packing != "concat":  # the samples are laid out in the store
        settings |= {"seq_len": section.seq_len, "too_long": section.too_long}
        settings["layout"] = PACKED_LAYOUT
    if is_earlier:
        return settings
    if section.special_tokens != "tokens":
        settings["special_tokens"] = None  # text and null make the same tokens
    if section.chat_template:  # another path with the same content is the same
        name = f"data.chat_template={section.chat_template}"
        try:
            content = Path(section.chat_template).read_bytes()
        except OSError as error:
            fix = "name a file that holds a Jinja template, or null for the model's own"
            raise ConfigError(f"{name}: {error.strerror}; {fix}") from None
        if not content.strip():
            raise ConfigError(f"{name}: is empty; write a Jinja template into it, or set null")
        settings["chat_template"] = hashlib.sha256(content).hexdigest()
    return settings


class TokenStore:
    """One store by samples of ``seq_len`` tokens, read-only; ``train`` and ``eval``: its splits."""

    def __init__(self, folder: Path, seq_len: int):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_bytes())
        self.counts = Counts.of(self.meta["counts"])
        self.dtype = np.dtype(self.meta["dtype"])
        self.train, self.eval = (Split(folder, s, self.dtype, seq_len) for s in (TRAIN, EVAL))

    def hold_out_all(self) -> None:
        """What there is to train on is held out, also the last tokens, which fill no sample."""
        self.eval = Split(self.folder, TRAIN, self.dtype, self.train.seq_len, is_held_out=True)
        self.counts.eval_bytes = self.counts.train_bytes
        self.counts.eval_target_tokens = self.counts.train_target_tokens

    def summary(self, section: DataSection) -> Iterator[str]:
        """What it holds, in a few lines."""
        counts = self.counts
        share = counts.train_target_tokens / max(1, counts.train_tokens)
        learned = "" if self.train.spans is None else f" ({share:.1%} of them learned)"
        yield (
            f"{counted(counts.train_documents, 'document')} ({self.meta['format']}) -> "
            f"{counts.train_tokens:,} tokens{learned}, {counts.eval_documents:,} held out "
            f"({counts.eval_tokens:,} tokens), {counts.empty_documents:,} empty dropped; "
            f"vocabulary {self.meta['vocab_size']:,}"
        )
        samples = f"{counted(self.train.num_samples, 'sample')} of {section.seq_len} tokens"
        line = f"packing {section.packing}: {samples}, {self.eval.num_samples:,} more held out"
        if section.packing != "concat":
            line += (
                f", {self.train.padding_share:.1%} padding; "
                f"{counted(counts.split_documents, 'longer document')} split, "
                f"{counts.dropped_documents:,} dropped (data.too_long)"
            )
        yield line
        if counts.bad_records:
            bad = counted(counts.bad_records, "bad record")
            yield f"{bad} left out: {self.folder / BAD_RECORDS}"

    def remarks(self, section: DataSection) -> Iterator[str]:
        """What a person has to decide on, a line for each."""
        for name, text in REMARKS.items():
            if count := getattr(self.counts, name):
                yield f"{count:,} {text}"
        sign = self.meta["settings"].get("split_on")  # stores from before did not count
        if sign and self.meta["counts"].get("divided_texts") == 0:
            hint = 'a line break is "\\n" in double quotes' if "\\" in sign else "see the data"
            yield f"no text holds data.split_on={sign!r}, so each is one document; {hint}"
        if self.train.rows is not None and not self.train.num_samples:
            yield "no document fits data.seq_len: nothing to train on; set data.too_long=split"
        if self.counts.eval_documents and not self.eval.num_samples:
            yield "no held-out document fits data.seq_len: no evaluation; set data.too_long=split"
        yield from self.meta.get("notes", ())
        if self.counts.written_documents:
            choice = "; data.special_tokens=text if they are meant as text, tokens if as tokens"
            if self.meta["template"]:
                choice = "; in a conversation the template alone writes tokens"
            yield (
                f"a special token, kept as text, is in "
                f"{counted(self.counts.written_documents, 'document')}, first "
                f"{self.counts.first_written}{'' if section.special_tokens else choice}"
            )
        if unread := self.counts.unread:
            more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
            names = ", ".join(name if name.strip() else repr(name) for name in unread[:SHOWN])
            is_column = any(not name.startswith("turn.") for name in unread)
            has_others = self.meta["format"] != "text"  # a text has but the column that was found
            hint = " (data.columns could map them)" if is_column and has_others else ""
            yield f"nothing reads these columns{hint}: {names}{more}"
