"""Tokenise a data set into the token store, and prove that a run can load everything offline.

Command line: ``python -m trainstack.prepare --home DIR [--config FILE] [--force] [--prove]
[key=value ...]``. Needs no network. A store that is there already is left alone.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainstack import demo, files, formats, packing, places, tokens
from trainstack.chat import Chat
from trainstack.config import Config, DataSection, load
from trainstack.documents import read_records, split_files
from trainstack.errors import ConfigError, DataError

BATCH_CHARACTERS = 4 << 20  # that are encoded at once, over all cores
BAD_RECORDS = "bad_records.jsonl"  # of a store: place and reason of what was set aside
SMALL_FILE = 64 << 20  # bytes; larger files are compared by size when nothing is to be done


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack.prepare", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"))
    parser.add_argument("--force", action="store_true", help="make the demo and the tokens anew")
    parser.add_argument("--prove", action="store_true", help="only load everything, offline")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config, options.overrides)
        if options.prove:
            prove(options.home, config)
        else:
            make_demo(options.home, config, options.force)
            prepare(options.home, config, options.force)
    except (ConfigError, DataError) as error:
        problem = error if isinstance(error, ConfigError) else ConfigError(str(error))
        print(problem.report("prepare"), file=sys.stderr)
        return problem.code if isinstance(error, ConfigError) else 1
    except OSError as error:
        place = error.filename or options.home
        free = files.free_bytes(options.home) / 1e9
        print(f"prepare: error: {place}: {error.strerror} ({free:.1f} GB free)", file=sys.stderr)
        return 1
    return 0


def make_demo(home: Path, config: Config, force: bool) -> None:
    """Build the parts of the demo that the configuration names and that are not there."""
    wanted = [
        (config.data.name, places.dataset_folder(home, places.DEMO, None), demo.make_dataset),
        (config.model.name, places.model_folder(home, places.DEMO), demo.make_model),
    ]
    for name, folder, make in wanted:
        if name == places.DEMO and (force or any(files.damage(folder, SMALL_FILE))):
            make(home)


def prepare(home: Path, config: Config, force: bool) -> Path:
    """Make the token store of a configuration unless it is there; returns its folder."""
    started = time.monotonic()
    model_folder = places.model_folder(home, config.model.name)
    dataset_folder = places.dataset_folder(home, config.data.name, config.data.subset)
    for folder, name in ((model_folder, config.model.name), (dataset_folder, config.data.name)):
        problem = next(files.damage(folder, SMALL_FILE), None)
        if problem:
            raise ConfigError(f"{name}: {folder}: {problem}; run: bash download_data_model.sh")
    check_vocabulary(config, model_folder)
    final = tokens.store_folder(home, config)
    if not force and not any(files.damage(final, SMALL_FILE)):
        describe(home, config, "are here")
        return final
    temporary = final.with_name(f".{final.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        write_store(config, model_folder, dataset_folder, temporary, final, force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    describe(home, config, f"{time.monotonic() - started:.0f} s")
    return final


def describe(home: Path, config: Config, remark: str) -> None:
    store = tokens.open_store(home, config)
    counts, name = store.counts, config.data.name
    share = counts.train_target_tokens / max(1, counts.train_tokens)
    learned = "" if store.train.spans is None else f" ({share:.0%} of them learned)"
    print(
        f"prepare: {name}: {counts.train_documents:,} documents ({store.meta['format']}) -> "
        f"{counts.train_tokens:,} tokens{learned}, {counts.eval_documents:,} held out "
        f"({counts.eval_tokens:,} tokens), {counts.empty_documents:,} empty dropped; "
        f"vocabulary {store.meta['vocab_size']:,}; {remark}",
        file=sys.stderr,
    )
    if config.data.packing != "concat":
        print(
            f"prepare: {name}: packing {config.data.packing}: {store.train.num_samples:,} samples "
            f"of {config.data.seq_len} tokens, {store.train.padding_share:.1%} padding; longer: "
            f"{counts.split_documents:,} documents split, {counts.dropped_documents:,} dropped",
            file=sys.stderr,
        )
    if counts.bad_records:
        where = store.folder / BAD_RECORDS
        print(
            f"prepare: {name}: {counts.bad_records:,} records set aside: {where}", file=sys.stderr
        )


def write_store(
    config: Config, model_folder: Path, dataset_folder: Path, temporary: Path, final: Path,
    force: bool,
) -> None:  # fmt: skip
    """Tokenise all documents into a temporary folder and publish it."""
    section = config.data
    tokenizer, end_id = load_tokenizer(model_folder)
    writer = tokens.TokenWriter(temporary, tokenizer.get_vocab_size())
    preparation = Preparation(section, writer, tokenizer, end_id, Chat(model_folder))
    sources = [(split_files(dataset_folder, section.split), None)]
    if section.eval_split:
        held_out = split_files(dataset_folder, section.eval_split)
        sources = [(sources[0][0], tokens.TRAIN), (held_out, tokens.EVAL)]
    paths = [path for found, _ in sources for path in found]
    with tqdm(
        total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=None,
        desc="tokenise",
    ) as bar:  # fmt: skip
        for found, split in sources:
            for path in found:
                preparation.add_records(read_records(path), split)
                bar.update(path.stat().st_size)
    if not writer.counts.train_documents:
        raise DataError(
            f"{config.data.name}: no document to train on; look at data.format, data.text_field"
        )
    pack(writer, section)
    preparation.write_bad_records()
    meta = {
        "model": config.model.name,
        "data": config.data.name,
        "settings": tokens.store_settings(section),
        "format": preparation.format,
        "template": preparation.chat.template_hash,
        "end_id": end_id,
        "vocab_size": tokenizer.get_vocab_size(),
        "version": tokens.FORMAT_VERSION,
    }
    if force or any(files.damage(final, SMALL_FILE)):
        files.remove_folder(final)
    writer.publish(final, meta)


class Preparation:
    """Records on their way into a store: encoded in large batches, over all cores, in order."""

    def __init__(self, section: DataSection, writer, tokenizer, end_id: int, chat: Chat):
        self.section, self.writer, self.chat = section, writer, chat
        self.tokenizer, self.end_id = tokenizer, end_id
        self.format = None if section.format == "auto" else section.format
        self.bad_records: list[str] = []

    def add_records(self, records: Iterable[tuple[str, Any]], split: str | None) -> None:
        """The documents of one file; ``split``: where to, None for as their hash says."""
        batch, size = [], 0
        for place, record in records:
            document = self._document(place, record)
            if document is not None:
                batch.append(document)
                size += len(document.text)
            if size >= BATCH_CHARACTERS:
                self._add_batch(batch, split)
                batch, size = [], 0
        if batch:
            self._add_batch(batch, split)

    def _document(self, place: str, record: Any) -> formats.Document | None:
        try:
            if isinstance(record, DataError):
                raise record
            field = self.section.text_field
            self.format = self.format or formats.recognise(place, record, field)
            document = formats.to_document(place, record, self.format, field, self.chat)
        except DataError as error:
            self._set_aside(place, error)
            return None
        self.writer.counts.empty_documents += document is None
        return document

    def _add_batch(self, batch: list[formats.Document], split: str | None) -> None:
        for document, ids, flags in formats.encode(self.tokenizer, self.end_id, batch):
            if flags is not None and not flags[1:].any():
                problem = f"{document.place}: {formats.NOTHING_LEARNED}"
                self._set_aside(document.place, DataError(problem))
                continue
            is_eval = split is None and tokens.is_held_out(
                document.text, self.section.eval_fraction
            )
            self.writer.append(split or (tokens.EVAL if is_eval else tokens.TRAIN), ids, flags)

    def _set_aside(self, place: str, error: DataError) -> None:
        """Leave a record out, and remember it; raises its error beyond data.max_bad_records."""
        self.writer.counts.bad_records += 1
        limit = self.section.max_bad_records
        if self.writer.counts.bad_records > limit:
            more = f" (data.max_bad_records={limit} others were set aside)" if limit else ""
            raise DataError(f"{error}{more}")
        self.bad_records.append(json.dumps({"place": place, "reason": str(error)}) + "\n")

    def write_bad_records(self) -> None:
        if self.bad_records:
            self.writer.add_file(BAD_RECORDS, "".join(self.bad_records).encode())


def pack(writer: tokens.TokenWriter, section: DataSection) -> None:
    """Close the tokens and, where documents are packed whole, lay out the samples."""
    for name, split in writer.seal(section.seq_len).items():
        if section.packing == "concat":
            continue
        made = packing.plan(
            split.stops, split.targets_in, section.seq_len, section.packing, section.too_long
        )
        for kind, values in (
            ("pieces", made.pieces),
            ("rows", made.rows),
            ("targets", made.targets),
        ):
            writer.add_file(f"{name}.{kind}", values.astype(tokens.INDEX).tobytes())
        writer.counts.split_documents += made.split_documents
        writer.counts.dropped_documents += made.dropped_documents


def load_tokenizer(model_folder: Path) -> tuple[Any, int]:
    """The tokenizer of a model folder without transformers (4 s), and the id of its end token."""
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
    end = _read_json(model_folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    end_id = tokenizer.token_to_id(end) if end else None
    if end_id is None:
        end_id = _read_json(model_folder / "config.json").get("eos_token_id")
        end_id = end_id[0] if isinstance(end_id, list) else end_id
    if end_id is None:
        raise ConfigError(
            f"{model_folder}: its tokenizer has no end token, so documents cannot be joined; "
            "name one as eos_token in its tokenizer_config.json"
        )
    return tokenizer, end_id


def check_vocabulary(config: Config, model_folder: Path) -> None:
    """ConfigError where a token id would lie beyond the model's embedding.

    Asked also of tokens that are there: models with one tokenizer share them.
    """
    tokenizer, _ = load_tokenizer(model_folder)
    vocab_size = model_vocabulary(model_folder)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"{config.model.name}: its tokenizer has {tokenizer.get_vocab_size():,} tokens, its "
            f"model only {vocab_size:,}; they do not belong together, choose another model.name"
        )


def model_vocabulary(model_folder: Path) -> int:
    """Rows of the model's embedding, from its config.json."""
    config = _read_json(model_folder / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise ConfigError(f"{model_folder}/config.json: no vocab_size; is it a language model?")
    return size


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def prove(home: Path, config: Config) -> None:
    """Load by path, offline: model configuration, tokenizer, first batch (not the weights)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig, AutoTokenizer

    model_folder = places.model_folder(home, config.model.name)
    try:
        AutoConfig.from_pretrained(model_folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{config.model.name}: transformers cannot load it ({reason}); choose another model"
        ) from None
    store = tokens.open_store(home, config)
    text = tokenizer.decode(store.train.ids[:12].tolist())
    print(f"prepare: loads offline; the data begins: {text!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
