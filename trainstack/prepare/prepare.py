"""Tokenise a data set into the token store, and prove that a run can load everything offline.

Command line: ``python -m trainstack prepare --home DIR [--config FILE] [--force] [--prove]
[--processes N] [key=value ...]``. Needs no network. A store that is there already is left alone;
one that was in the making when its process was killed is gone on with.
"""

import argparse
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from trainstack.config.load import load
from trainstack.config.schema import Config, DataSection
from trainstack.data.corpus import open_corpus
from trainstack.data.split import EVAL, TRAIN
from trainstack.data.store import (
    FORMAT_VERSION,
    TokenStore,
    made_from,
    store_folder,
    store_settings,
)
from trainstack.errors import ConfigError, DataError
from trainstack.prepare import demo, formats, packing
from trainstack.prepare.chat import Chat
from trainstack.prepare.readers import read_chunks, split_files
from trainstack.prepare.tokenise import Task, Tokenised, Tokeniser, in_order
from trainstack.prepare.tokenizer import _read_json, check_vocabulary, load_tokenizer
from trainstack.prepare.writer import BAD_RECORDS, TokenWriter, abandoned, temporary_folder
from trainstack.processes import end_on_interrupt
from trainstack.storage import files, layout, manifest

FEW_BYTES = 4 << 20  # of a source, for which one process is enough
MOST_PROCESSES = 16  # unless more are asked for: others use the login node too
TOLD_SECONDS = 60  # between two lines of progress where there is no terminal


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack prepare", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"))
    parser.add_argument("--force", action="store_true", help="make the demo and the tokens anew")
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
    # Those that tokenise end with this one; nothing has to be saved.
    end_on_interrupt("prepare: stopped; run it again, it goes on where it was")
    # Said aloud, the library does not warn of processes that are forked after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        config = load(options.config, options.overrides)
        if options.prove:
            prove(options.home, config)
        else:
            make_demo(options.home, config, options.force)
            prepare(options.home, config, options.force, options.processes)
    except (ConfigError, DataError) as error:
        problem = error if isinstance(error, ConfigError) else ConfigError(str(error))
        print(problem.report("prepare"), file=sys.stderr)
        return problem.code if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.errno == errno.ENOMEM:
            print(f"prepare: error: {error.strerror}", file=sys.stderr)
            return 1
        place = error.filename or options.home
        free = files.free_bytes(Path(place)) / 1e9
        print(f"prepare: error: {place}: {error.strerror} ({free:.1f} GB free)", file=sys.stderr)
        return 1
    return 0


def make_demo(home: Path, config: Config, force: bool) -> None:
    """Build the parts of the demo that the configuration names and that are not there."""
    demo_data = (layout.dataset_folder(home, layout.DEMO, None), demo.make_dataset)
    wanted = [(section.name, *demo_data) for section in config.data.sources]
    wanted.append((config.model.name, layout.model_folder(home, layout.DEMO), demo.make_model))
    for name, folder, make in wanted:
        if name == layout.DEMO and (
            force or any(manifest.damage(folder, manifest.TRUSTED_BY_SIZE))
        ):
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
        if not force and not any(manifest.damage(final, manifest.TRUSTED_BY_SIZE)):
            # Asked of them too: models with one tokenizer share them.
            check_vocabulary(home, model_name, _read_json(final / "meta.json")["vocab_size"])
            remove(abandoned(final))
            describe(section, final, "are here")
            return
        write_store(home, model_name, section, final, force, processes)
    describe(section, final, f"{time.monotonic() - started:.0f} s")


def must_be_whole(name: str, folder: Path) -> None:
    """ConfigError where a model or a data set is not there, or damaged."""
    problem = next(manifest.damage(folder, manifest.TRUSTED_BY_SIZE), None)
    if problem:
        raise ConfigError(f"{name}: {folder}: {problem}; run: bash download_data_model.sh")


def say(section: DataSection, text: str) -> None:
    print(f"prepare: {section.label}: {text}", file=sys.stderr)


def describe(section: DataSection, folder: Path, remark: str) -> None:
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
        say(section, f"{counts.bad_records:,} records set aside: {folder / BAD_RECORDS}")


def write_store(
    home: Path, model_name: str, section: DataSection, final: Path, force: bool, processes: int
) -> None:
    """Tokenise all documents beside ``final``, and publish them there."""
    model_folder = layout.model_folder(home, model_name)
    dataset_folder = layout.dataset_folder(home, section.name, section.subset)
    tokenizer, end_id = load_tokenizer(model_folder)
    check_vocabulary(home, model_name, tokenizer.get_vocab_size())
    chat = Chat(model_folder)
    sources = sources_of(section, dataset_folder)
    form = section.format if section.format != "auto" else recognise(section, sources)
    if form != "text":
        chat.template  # loaded here once, not in each process  # noqa: B018
    left = abandoned(final)
    temporary = temporary_folder(final)
    earlier = None if force else next(iter(left), None)
    try:
        writer = TokenWriter(temporary, tokenizer.get_vocab_size(), earlier)
    except OSError as error:
        if earlier is None or error.errno == errno.ENOSPC:
            raise
        say(section, f"what an earlier call left cannot be gone on with ({error}); begun anew")
        remove([temporary])
        writer = TokenWriter(temporary, tokenizer.get_vocab_size())
    remove(left)
    try:
        tokenise = Tokeniser(section, tokenizer, end_id, chat, form, writer.dtype)
        fill(writer, section, sources, tokenise, processes)
        pack(writer, section)
    except (ConfigError, DataError):  # other data will be another store
        remove([temporary])
        raise
    meta = {
        "model": model_name,
        "data": section.name,
        "settings": store_settings(section),
        "made_from": made_from(model_folder, dataset_folder, store_settings(section)),
        "format": form,
        "template": chat.template_hash,
        "end_id": end_id,
        "vocab_size": tokenizer.get_vocab_size(),
        "version": FORMAT_VERSION,
        "tokenizers": version("tokenizers"),
    }
    if not force and not any(manifest.damage(final, manifest.TRUSTED_BY_SIZE)):
        remove([temporary])  # where locks exclude nobody, another one was faster
        return
    manifest.remove_folder(final)  # damaged, or to be made anew
    writer.publish(final, meta)


def remove(folders: list[Path]) -> None:
    """Remove folders in the making."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


Source = tuple[Path, str | None]  # a file, and its split; None: each text's hash decides


def sources_of(section: DataSection, dataset_folder: Path) -> list[Source]:
    trained = split_files(dataset_folder, section.split)
    if not section.eval_split:
        return [(path, None) for path in trained]
    held_out = split_files(dataset_folder, section.eval_split, "data.eval_split")
    return [*((p, TRAIN) for p in trained), *((p, EVAL) for p in held_out)]


def recognise(section: DataSection, sources: list[Source]) -> str:
    """The format of the first record that has one."""
    failed, last = 0, None
    for path, _ in sources:
        for chunk in read_chunks(path):
            for place, record in chunk.records():
                try:
                    if isinstance(record, DataError):
                        raise record
                    return formats.recognise(place, record, section.text_field)
                except DataError as error:
                    failed, last = failed + 1, error
                    if failed > section.max_bad_records:
                        raise
    raise last or DataError(f"{section.name}: no record in it; look at what was downloaded")


def fill(
    writer: TokenWriter, section: DataSection, sources: list[Source], tokenise: Tokeniser,
    processes: int,
) -> None:  # fmt: skip
    """Tokenise what is not yet in the store."""
    sizes = [path.stat().st_size for path, _ in sources]
    if sum(sizes) <= FEW_BYTES:
        processes = 1
    if writer.position != [0, 1]:
        file, record = writer.position
        say(section, f"goes on at record {record:,} of {sources[file][0].name}, after "
            f"{writer.counts.train_tokens:,} tokens that are kept")  # fmt: skip
    tqdm.monitor_interval = 0  # its thread would be there when the processes begin
    told_at = time.monotonic()
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, desc="tokenise") as bar:
        tasks = left_over(sources, writer.position)
        for (file, chunk, _), found in in_order(tokenise, tasks, processes):
            add(writer, section, found)
            writer.reached(file, chunk.stop)
            bar.n = sum(sizes[:file])
            bar.set_postfix(tokens=f"{writer.counts.train_tokens:,}")
            if bar.disable and time.monotonic() > told_at + TOLD_SECONDS:
                done = f"{writer.counts.train_tokens:,} tokens so far"
                say(section, f"{done}, in file {file + 1} of {len(sources)}")
                told_at = time.monotonic()
    if not writer.counts.train_documents:
        raise DataError(
            f"{section.name}: no document to train on; look at data.format, data.text_field"
        )


def left_over(sources: list[Source], position: list[int]) -> Iterator[Task]:
    """What of the source begins at a position or lies behind it."""
    at_file, at_record = position
    for file, (path, split) in enumerate(sources):
        if file < at_file:
            continue
        for chunk in read_chunks(path):
            if file == at_file:
                chunk = chunk.from_record(at_record)
            if chunk is not None:
                yield file, chunk, split


def add(writer: TokenWriter, section: DataSection, found: Tokenised) -> None:
    """Put what became of a chunk into the store; DataError beyond data.max_bad_records."""
    limit = section.max_bad_records
    for place, reason in found.bad:
        if writer.counts.bad_records == limit:
            more = f" (data.max_bad_records={limit} others were set aside)" if limit else ""
            raise DataError(f"{reason}{more}")
        writer.set_aside(place, reason)
    writer.counts.empty_documents += found.empty
    for split, part in found.parts.items():
        writer.append(split, part)


def pack(writer: TokenWriter, section: DataSection) -> None:
    """Close the tokens and, where documents are packed whole, lay out the samples."""
    for name, split in writer.seal(section.seq_len).items():
        if section.packing == "concat":
            continue
        made = packing.plans(
            split.stops, split.targets_in, section.seq_len, section.packing, section.too_long
        )
        writer.lay_out(name, split, made)


def prove(home: Path, config: Config) -> None:
    """Load by path, offline: model configuration, tokenizer, first batch (not the weights)."""
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
        print(f"prepare: loads offline; {label} begins: {text!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
