"""Tokenises data sets into token stores, and proves that a run can load all without a network.

Command line: ``python -m trainstack prepare --home DIR [--config FILE] [--force] [--prove]
[--processes N] [key=value ...]``. Needs no network. A store that is there already is left alone; a
preparation that was interrupted is continued.
"""

import argparse
import errno
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainstack.config.load import load
from trainstack.config.schema import Config, DataSection
from trainstack.data.corpus import open_corpus
from trainstack.data.store import (
    FORMAT_VERSION,
    TokenStore,
    made_from,
    store_folder,
    store_settings,
)
from trainstack.errors import ConfigError, DataError
from trainstack.prepare import demo, packing
from trainstack.prepare.chat import Chat
from trainstack.prepare.tokenise import (
    DataFile,
    Tokenised,
    Tokeniser,
    data_files_of,
    format_of,
    in_order,
    tasks_from,
)
from trainstack.prepare.tokenizer import check_vocabulary, load_tokenizer, read_json
from trainstack.prepare.writer import BAD_RECORDS, TokenWriter, abandoned, temporary_folder
from trainstack.processes import end_on_interrupt
from trainstack.storage import files, layout, manifest

SPEAKER = "prepare"
FEW_BYTES = 4 << 20  # of data, for which one process is enough
MOST_PROCESSES = 16  # unless more are asked for: others use the login node too
TOLD_SECONDS = 60  # between two lines of progress, if there is no terminal


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    # The processes that tokenise end with this one; nothing has to be saved.
    end_on_interrupt(f"{SPEAKER}: stopped; run it again, it continues where it stopped")
    # Unless it is set, the library warns when processes are forked after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        config = load(options.config, options.overrides)
        if options.prove:
            prove(options.home, config)
        else:
            make_demo(options.home, config, options.force)
            prepare(options.home, config, options.force, options.processes)
    except ConfigError as error:
        print(error.report(SPEAKER), file=sys.stderr)
        return error.code
    except DataError as error:
        print(f"{SPEAKER}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{SPEAKER}: error: {system_problem(error, options.home)}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainstack prepare", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"))
    parser.add_argument("--force", action="store_true", help="make the demo and the tokens again")
    parser.add_argument("--prove", action="store_true", help="only load everything, offline")
    parser.add_argument(
        "--processes",
        type=int,
        help=f"that tokenise; default: one per core, at most {MOST_PROCESSES}",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes {options.processes}: at least one has to tokenise")
    return options


def system_problem(error: OSError, home: Path) -> str:
    """What the system did not do, as a person reads it."""
    if error.errno == errno.ENOMEM:
        return error.strerror
    path = error.filename or home
    return f"{path}: {error.strerror} ({files.free_bytes(Path(path)) / 1e9:.1f} GB free)"


def make_demo(home: Path, config: Config, force: bool) -> None:
    """Build the parts of the demo that the configuration names and that are not there."""
    demo_data = (layout.dataset_folder(home, layout.DEMO, None), demo.make_dataset)
    wanted = [(section.name, *demo_data) for section in config.data.sources]
    wanted.append((config.model.name, layout.model_folder(home, layout.DEMO), demo.make_model))
    for name, folder, make in wanted:
        if name == layout.DEMO and (force or not is_whole(folder)):
            make(home)


def prepare(home: Path, config: Config, force: bool, processes: int | None = None) -> None:
    """Make the token stores of a configuration unless they are there."""
    must_be_whole(config.model.name, layout.model_folder(home, config.model.name))
    processes = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    for section in config.data.sources:
        prepare_one(home, config.model.name, section, force, processes)


def prepare_one(
    home: Path, model_name: str, section: DataSection, force: bool, processes: int
) -> None:
    """Make the token store of one data set unless it is there."""
    started = time.monotonic()
    must_be_whole(section.name, layout.dataset_folder(home, section.name, section.subset))
    final = store_folder(home, model_name, section)
    lock = home / "cache" / "locks" / f"tokens--{final.name}"
    with files.only_one(lock, lambda: say(section, "another process tokenises it; waiting")):
        if not force and is_whole(final):
            # Checked here too, for models with the same tokenizer share a store.
            check_vocabulary(home, model_name, read_json(final / "meta.json")["vocab_size"])
            remove(abandoned(final))
            describe(section, final, "are here")
            return
        write_store(home, model_name, section, final, force, processes)
    describe(section, final, f"{time.monotonic() - started:.0f} s")


def must_be_whole(name: str, folder: Path) -> None:
    """ConfigError if a model or a data set is not there, or damaged."""
    problem = next(manifest.damage(folder, manifest.TRUSTED_BY_SIZE), None)
    if problem:
        raise ConfigError(f"{name}: {folder}: {problem}; run: bash download_data_model.sh")


def is_whole(folder: Path) -> bool:
    return not any(manifest.damage(folder, manifest.TRUSTED_BY_SIZE))


def say(section: DataSection, text: str) -> None:
    print(f"{SPEAKER}: {section.label}: {text}", file=sys.stderr)


def describe(section: DataSection, folder: Path, remark: str) -> None:
    """Say what is in a store."""
    store = TokenStore(folder, section.seq_len)
    counts = store.counts
    share = counts.train_target_tokens / max(1, counts.train_tokens)
    learned = "" if store.train.spans is None else f" ({share:.0%} of them learned)"
    say(
        section,
        f"{counts.train_documents:,} documents ({store.meta['format']}) -> "
        f"{counts.train_tokens:,} tokens{learned}, {counts.eval_documents:,} held out "
        f"({counts.eval_tokens:,} tokens), {counts.empty_documents:,} empty dropped; "
        f"vocabulary {store.meta['vocab_size']:,}; {remark}",
    )
    if section.packing != "concat":
        say(
            section,
            f"packing {section.packing}: {store.train.num_samples:,} samples "
            f"of {section.seq_len} tokens, {store.train.padding_share:.1%} padding; longer: "
            f"{counts.split_documents:,} documents split, {counts.dropped_documents:,} dropped",
        )
    if counts.bad_records:
        say(section, f"{counts.bad_records:,} bad records left out: {folder / BAD_RECORDS}")


def write_store(
    home: Path, model_name: str, section: DataSection, final: Path, force: bool, processes: int
) -> None:
    """Tokenise all documents beside ``final``, and publish them there."""
    tokenizer, end_id = load_tokenizer(layout.model_folder(home, model_name))
    check_vocabulary(home, model_name, tokenizer.get_vocab_size())
    data_files = data_files_of(home, section)
    chat = Chat(layout.model_folder(home, model_name))
    form = format_of(data_files, section) if section.format == "auto" else section.format
    if form != "text":
        chat.load()  # here once, not in each process
    writer = open_writer(section, final, tokenizer.get_vocab_size(), force)
    tokenise = Tokeniser(section, tokenizer, end_id, chat, form, writer.dtype)
    try:
        fill(writer, section, data_files, tokenise, processes)
        pack(writer, section)
    except (ConfigError, DataError):  # once corrected, it will be another store
        remove([writer.temporary])
        raise
    meta = meta_of(home, model_name, section, tokenise)
    if not force and is_whole(final):
        remove([writer.temporary])  # where locks exclude nobody, another process was faster
        return
    manifest.remove_folder(final)  # damaged, or to be made again
    writer.publish(final, meta)


def open_writer(section: DataSection, final: Path, vocab_size: int, force: bool) -> TokenWriter:
    """The writer of a new store, which continues an interrupted preparation if it can."""
    left = abandoned(final)
    earlier = None if force else next(iter(left), None)
    temporary = temporary_folder(final)
    try:
        writer = TokenWriter(temporary, vocab_size, earlier)
    except OSError as error:
        if earlier is None or error.errno == errno.ENOSPC:
            raise
        say(section, f"the interrupted preparation cannot be continued ({error}); starting again")
        remove([temporary])
        writer = TokenWriter(temporary, vocab_size)
    remove(left)
    return writer


def remove(folders: list[Path]) -> None:
    """Remove unfinished folders."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def fill(
    writer: TokenWriter, section: DataSection, data_files: list[DataFile], tokenise: Tokeniser,
    processes: int,
) -> None:  # fmt: skip
    """Tokenise what is not yet in the store. DataError if no document is there to train on."""
    sizes = [path.stat().st_size for path, _ in data_files]
    if sum(sizes) <= FEW_BYTES:
        processes = 1
    if writer.position != [0, 1]:
        file, record = writer.position
        say(section, f"continues at record {record:,} of {data_files[file][0].name}, after "
            f"{writer.counts.train_tokens:,} tokens that are kept")  # fmt: skip
    tqdm.monitor_interval = 0  # its thread would be there when the processes begin
    told_at = time.monotonic()
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, desc="tokenise") as bar:
        tasks = tasks_from(data_files, writer.position)
        for (file, chunk, _), found in in_order(tokenise, tasks, processes):
            add(writer, section, found)
            writer.reached(file, chunk.stop)
            bar.n = sum(sizes[:file])
            bar.set_postfix(tokens=f"{writer.counts.train_tokens:,}")
            if bar.disable and time.monotonic() > told_at + TOLD_SECONDS:
                done = f"{writer.counts.train_tokens:,} tokens so far"
                say(section, f"{done}, in file {file + 1} of {len(data_files)}")
                told_at = time.monotonic()
    if not writer.counts.train_documents:
        raise DataError(
            f"{section.name}: no document to train on; look at data.format, data.text_field"
        )


def add(writer: TokenWriter, section: DataSection, found: Tokenised) -> None:
    """Put what became of a chunk into the store; DataError beyond data.max_bad_records."""
    limit = section.max_bad_records
    for location, reason in found.bad:
        if writer.counts.bad_records == limit:
            more = f" (data.max_bad_records={limit} others were left out)" if limit else ""
            raise DataError(f"{reason}{more}")
        writer.leave_out(location, reason)
    writer.counts.empty_documents += found.empty
    for split, batch in found.batches.items():
        writer.append(split, batch)


def pack(writer: TokenWriter, section: DataSection) -> None:
    """Close the tokens and, if documents are packed whole, lay out the samples."""
    for name, split in writer.seal(section.seq_len).items():
        if section.packing == "concat":
            continue
        made = packing.plans(
            split.stops, split.targets_in, section.seq_len, section.packing, section.too_long
        )
        writer.lay_out(name, split, made)


def meta_of(
    home: Path, model_name: str, section: DataSection, tokenise: Tokeniser
) -> dict[str, Any]:
    """What made a store, for its meta.json."""
    model_folder = layout.model_folder(home, model_name)
    dataset_folder = layout.dataset_folder(home, section.name, section.subset)
    return {
        "model": model_name,
        "data": section.name,
        "settings": store_settings(section),
        "made_from": made_from(model_folder, dataset_folder, store_settings(section)),
        "format": tokenise.format,
        "template": tokenise.chat.template_hash,
        "end_id": tokenise.end_id,
        "vocab_size": tokenise.tokenizer.get_vocab_size(),
        "version": FORMAT_VERSION,
        "tokenizers": version("tokenizers"),
    }


def prove(home: Path, config: Config) -> None:
    """Load by path, without a network: the model's configuration, tokenizer and tokens.

    The weights are not loaded. ConfigError if something else cannot be.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig, AutoTokenizer

    model_folder = layout.model_folder(home, config.model.name)
    try:
        AutoConfig.from_pretrained(model_folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{config.model.name}: transformers cannot load it ({reason}); choose another model"
        ) from None
    for label, store in open_corpus(home, config).stores.items():
        text = tokenizer.decode(store.train.ids[:12].tolist())
        print(
            f"{SPEAKER}: {label}: model and tokens load without a network; it begins {text!r}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
