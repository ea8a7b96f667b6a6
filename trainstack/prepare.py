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
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainstack import demo, files, places, tokens
from trainstack.config import Config, load
from trainstack.documents import DataError, read_documents, split_files
from trainstack.errors import ConfigError

BATCH_BYTES = 4 << 20  # characters that are encoded at once, over all cores
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
    settings = tokens.store_settings(config.data)
    final = home / "tokens" / tokens.store_key(model_folder, dataset_folder, settings)
    if not force and not any(files.damage(final, SMALL_FILE)):
        describe(config, tokens.TokenStore(final), "are here")
        return final
    temporary = final.with_name(f".{final.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        write_store(config, model_folder, dataset_folder, temporary, final, force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    describe(config, tokens.TokenStore(final), f"{time.monotonic() - started:.0f} s")
    return final


def describe(config: Config, store: tokens.TokenStore, remark: str) -> None:
    counts = store.counts
    print(
        f"prepare: {config.data.name}: {counts.train_documents:,} documents -> "
        f"{counts.train_tokens:,} tokens, {counts.eval_documents:,} held out "
        f"({counts.eval_tokens:,} tokens), {counts.empty_documents:,} empty dropped; "
        f"vocabulary {store.meta['vocab_size']:,}; {remark}",
        file=sys.stderr,
    )


def write_store(
    config: Config, model_folder: Path, dataset_folder: Path, temporary: Path, final: Path,
    force: bool,
) -> None:  # fmt: skip
    """Tokenise all documents into a temporary folder and publish it."""
    section = config.data
    tokenizer, end_id = load_tokenizer(model_folder)
    writer = tokens.TokenWriter(temporary, tokenizer.get_vocab_size())
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
                texts = read_documents(path, section.text_field)
                add_documents(writer, tokenizer, end_id, texts, split, section.eval_fraction)
                bar.update(path.stat().st_size)
    if not writer.counts.train_documents:
        raise DataError(f"{config.data.name}: no document with text; look at data.text_field")
    meta = {
        "model": config.model.name,
        "data": config.data.name,
        "settings": tokens.store_settings(section),
        "end_id": end_id,
        "vocab_size": tokenizer.get_vocab_size(),
        "format": tokens.FORMAT_VERSION,
    }
    if force or any(files.damage(final, SMALL_FILE)):
        files.remove_folder(final)
    writer.publish(final, meta)


def add_documents(writer, tokenizer, end_id, texts, split: str | None, fraction: float) -> None:
    """Encode documents in large batches, over all cores, and append them in their order."""
    batch, size = [], 0
    for text in texts:
        if not text.strip():
            writer.counts.empty_documents += 1
            continue
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            _add_batch(writer, tokenizer, end_id, batch, split, fraction)
            batch, size = [], 0
    if batch:
        _add_batch(writer, tokenizer, end_id, batch, split, fraction)


def _add_batch(writer, tokenizer, end_id, batch, split: str | None, fraction: float) -> None:
    encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    for text, encoding in zip(batch, encoded, strict=True):
        is_eval = split is None and tokens.is_held_out(text, fraction)
        writer.append(split or (tokens.EVAL if is_eval else tokens.TRAIN), [*encoding.ids, end_id])


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
    dataset_folder = places.dataset_folder(home, config.data.name, config.data.subset)
    try:
        AutoConfig.from_pretrained(model_folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{config.model.name}: transformers cannot load it ({reason}); choose another model"
        ) from None
    settings = tokens.store_settings(config.data)
    key = tokens.store_key(model_folder, dataset_folder, settings)
    store = tokens.TokenStore(home / "tokens" / key)
    first = tokens.windows(store.train, min(config.data.seq_len, len(store.train) - 1), [0])[0]
    text = tokenizer.decode(first[:12].tolist())
    print(f"prepare: loads offline; the data begins: {text!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
