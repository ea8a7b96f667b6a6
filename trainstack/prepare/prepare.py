"""Tokenises data sets into token stores.

Command line: ``python -m trainstack prepare [--home DIR] [--config FILE] [--force] [--processes N]
[key=value ...]``. Uses no network, so what it could load a run can load. A store that is there
already is left alone; a preparation that was interrupted is continued.
"""

import argparse
import errno
import os
import shutil
import time
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainstack.chat.ends import Ends, ends_of_turns
from trainstack.chat.template import Chat
from trainstack.config.load import load
from trainstack.config.schema import Config, DataSection
from trainstack.data import packing, store
from trainstack.data.duplicates import shared_documents
from trainstack.data.split import EVAL, TRAIN, Split
from trainstack.data.writer import TokenWriter, abandoned, temporary_folder
from trainstack.errors import ConfigError, DataError, Failed
from trainstack.options import parse, parser_of
from trainstack.prepare import demo, earlier
from trainstack.prepare.tokenise import (
    DataFile,
    Tokenised,
    Tokeniser,
    data_files_of,
    find_boundary,
    format_of,
    in_order,
    tasks_from,
)
from trainstack.prepare.tokenizer import check_vocabulary, load_encoder
from trainstack.prepare.told import SPEAKER, describe, notes_on_data, say
from trainstack.processes import end_on_interrupt
from trainstack.records.columns import check_columns
from trainstack.storage import files, layout, manifest

FEW_BYTES = 4 << 20  # of data, for which one process is enough
MOST_PROCESSES = 16  # unless more are asked for: others use the login node too
TOLD_SECONDS = 60  # between two lines of progress, if there is no terminal


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    # The processes that tokenise end with this one; nothing has to be saved.
    end_on_interrupt(f"{SPEAKER}: stopped; run it again, it continues where it stopped")
    # Unless it is set, the library warns when processes are forked after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        config = load(options.config, options.overrides)
        make_demo(options.home, config, options.force)
        prepare(options.home, config, options.force, options.processes)
    except DataError as error:
        raise Failed(str(error)) from None
    except OSError as error:
        raise Failed(files.disk_problem(error)) from None
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("prepare", __doc__, has_config=True)
    parser.add_argument("--force", action="store_true", help="make the demo and the tokens again")
    most = f"that tokenise; default: one per core, at most {MOST_PROCESSES}"
    parser.add_argument("--processes", type=int, help=most)
    options = parse(parser, arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes {options.processes}: at least one has to tokenise")
    return options


def make_demo(home: Path, config: Config, force: bool) -> None:
    """Build the parts of the demo that the configuration names, if missing or of other code."""
    demo_data = (layout.dataset_folder(home, layout.DEMO, None), demo.make_dataset)
    wanted = [(section.name, *demo_data) for section in config.data.sources]
    wanted.append((config.model.name, layout.model_folder(home, layout.DEMO), demo.make_model))
    for name, folder, make in wanted:
        if name == layout.DEMO and (force or not demo.is_current(folder)):
            make(home)


def prepare(home: Path, config: Config, force: bool, processes: int | None = None) -> None:
    """Make the token stores of a configuration unless they are there.

    Failed if a process was killed, as happens when memory ends; what it left is continued.
    """
    must_be_whole(config.model.name, layout.model_folder(home, config.model.name))
    processes = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    for section in config.data.sources:
        try:
            prepare_one(home, config.model.name, section, force, processes)
        except DataError as error:
            if len(config.data.sources) == 1 or section.name in str(error):
                raise
            raise DataError(f"{section.label}: {error}") from None
        except BrokenProcessPool:
            raise Failed(
                "a process that tokenises was killed, most likely for lack of memory; run it again "
                f"with fewer than PROCESSES={processes}: it continues where it stopped"
            ) from None


def prepare_one(
    home: Path, model_name: str, section: DataSection, force: bool, processes: int
) -> None:
    """Make the token store of one data set unless it is there."""
    started = time.monotonic()
    must_be_whole(section.name, layout.dataset_folder(home, section.name, section.subset))
    final = store.store_folder(home, model_name, section)
    lock = home / "cache" / "locks" / f"tokens--{final.name}"
    with files.only_one(lock, lambda: say(section, "another process tokenises it; waiting")):
        if not force and (
            manifest.is_whole(final) or earlier.adopt(home, model_name, section, final)
        ):
            # Checked here too, for models with the same tokenizer share a store.
            meta = files.read_object(final / "meta.json")
            largest_id = meta["counts"].get("largest_id", meta["vocab_size"] - 1)
            check_vocabulary(home, model_name, largest_id)
            remove(abandoned(final))
            describe(section, final, "are here")
            return
        write_store(home, model_name, section, final, force, processes)
    describe(section, final, f"{time.monotonic() - started:.0f} s")


def must_be_whole(name: str, folder: Path) -> None:
    """ConfigError if a model or a data set is not there, or damaged."""
    if problem := next(manifest.damage(folder, manifest.TRUSTED_BY_SIZE), None):
        raise ConfigError(f"{name}: {folder}: {problem}; run: bash download_data_model.sh")


def write_store(
    home: Path, model_name: str, section: DataSection, final: Path, force: bool, processes: int
) -> None:
    """Tokenise all documents beside ``final``, and publish them there."""
    model_folder = layout.model_folder(home, model_name)
    encoder = load_encoder(home, model_name, section.special_tokens)
    data_files = data_files_of(home, section)
    check_columns(section)
    chat = Chat.of(model_folder, section)
    form = format_of(data_files, section) if section.format == "auto" else section.format
    if form != "text":
        chat.load()  # here once, not in each process
        if section.split_on:
            raise ConfigError(f"data.split_on: {section.name} has no texts but {form}; write null")
    writer = open_writer(section, final, encoder.largest_id + 1, force)
    tokenise = Tokeniser(section, encoder, chat, form, writer.dtype)
    try:
        tokenise.boundary = find_boundary(tokenise, data_files)
        if tokenise.boundary:
            say(section, tokenise.boundary.reason)
        fill(writer, section, data_files, tokenise, processes)
        splits = pack(writer, section)
    except (ConfigError, DataError):  # once corrected, it will be another store
        remove([writer.temporary])
        raise
    if section.eval_split:  # else the hash of a text puts copies on one side
        writer.counts.shared_documents = shared_documents(splits[TRAIN], splits[EVAL])
    meta, ends = meta_of(home, model_name, section, tokenise), Ends([], [], 0, "")
    if meta["template"]:
        learned = splits[TRAIN]
        ends = ends_of_turns(encoder.tokenizer, learned.ids, learned.spans, encoder.end_id)
    meta["stop_ids"] = ends.stops
    meta["notes"] = notes_on_data(model_folder, tokenise, data_files, ends)
    target, is_plain = final, form == "text" and not writer.counts.written_documents
    if is_plain and store.is_as_before(section) and earlier.is_read_alike(model_folder):
        # What the rules before made alike keeps its name, so that runs from before resume with it.
        target = store.store_folder(home, model_name, section, store.EARLIER_VERSION)
    if not force and manifest.is_whole(target):
        remove([writer.temporary])  # runs learn from it, or where locks exclude nobody it is new
    else:
        manifest.remove_folder(target)  # damaged, or to be made again
        writer.publish(target, meta)
    if target != final:
        earlier.link(final, target)


def open_writer(section: DataSection, final: Path, vocab_size: int, force: bool) -> TokenWriter:
    """The writer of a new store, which continues an interrupted preparation if it can."""
    left = abandoned(final)
    killed = left[0] if left and not force else None
    temporary = temporary_folder(final)
    try:
        writer = TokenWriter(temporary, vocab_size, killed)
    except OSError as error:
        if killed is None or error.errno == errno.ENOSPC:
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
    told_at, seen = time.monotonic(), {*range(writer.position[0] + (writer.position[1] > 1))}
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, desc="tokenise") as bar:
        tasks = tasks_from(data_files, tokenise.wanted, writer.position)
        for (file, chunk, _), found in in_order(tokenise, tasks, processes):
            add(writer, section, found)
            writer.reached(file, chunk.stop)
            seen.add(file)
            bar.n = sum(sizes[:file])
            bar.set_postfix(tokens=f"{writer.counts.train_tokens:,}")
            if bar.disable and time.monotonic() > told_at + TOLD_SECONDS:
                done = f"{writer.counts.train_tokens:,} tokens so far"
                say(section, f"{done}, in file {file + 1} of {len(data_files)}")
                told_at = time.monotonic()
    if empty := [path.name for number, (path, _) in enumerate(data_files) if number not in seen]:
        say(section, f"{len(empty):,} files have no record, first {empty[0]}")
    if not writer.counts.train_documents:
        empty, bad = writer.counts.empty_documents, writer.counts.bad_records
        reason = f"its {empty:,} documents are empty" if empty else "look at what was downloaded"
        if bad:
            reason = f"its {bad:,} bad records are left out; data.max_bad_records=0 says why"
        raise DataError(f"{section.name}: no document to train on; {reason}")


def add(writer: TokenWriter, section: DataSection, found: Tokenised) -> None:
    """Put what became of a chunk into the store; DataError beyond data.max_bad_records."""
    limit = section.max_bad_records
    for location, reason in found.bad:
        if writer.counts.bad_records == limit:
            more = f" (data.max_bad_records={limit} others were left out)" if limit else ""
            raise DataError(f"{reason}{more}")
        writer.leave_out(location, reason)
    counts = writer.counts
    counts.unread += sorted(found.unread - {*counts.unread})
    for name, count in found.counts.items():
        setattr(counts, name, getattr(counts, name) + count)
    counts.first_written = counts.first_written or found.first_written
    for split, batch in found.batches.items():
        writer.append(split, batch)


def pack(writer: TokenWriter, section: DataSection) -> dict[str, Split]:
    """Close the tokens and, if documents are packed whole, lay out the samples. The splits."""
    splits = writer.seal(section.seq_len)
    how = section.seq_len, section.packing, section.too_long
    for name, split in splits.items() if section.packing != "concat" else ():
        writer.lay_out(name, split, packing.plans(split.stops, split.targets_in, *how))
    return splits


def meta_of(
    home: Path, model_name: str, section: DataSection, tokenise: Tokeniser
) -> dict[str, Any]:
    """What made a store, for its meta.json."""
    return {
        "model": model_name,
        "data": section.name,
        "settings": store.store_settings(section),
        "made_from": store.made_from(home, model_name, section),
        "format": tokenise.format,
        "template": tokenise.chat.template_hash,
        "chat_template": tokenise.chat.template if section.chat_template else None,
        "end_id": tokenise.encoder.end_id,
        "vocab_size": tokenise.encoder.largest_id + 1,
        "version": store.FORMAT_VERSION,
        "tokenizers": version("tokenizers"),
    }
