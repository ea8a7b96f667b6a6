"""Shows what a run would learn, before it costs GPU hours: counts, lengths, a few samples.

Command line: ``python -m trainstack data_report [--config FILE] [--home DIR] [key=value ...]``.
Reads the token store that download_data_model.sh or prepare made. Tokens that carry loss are
coloured on a terminal, and between [[ and ]] elsewhere.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainstack.chat.template import Chat, load_tokenizer
from trainstack.config.load import load
from trainstack.config.schema import Config, DataSection
from trainstack.data.corpus import Corpus, open_corpus
from trainstack.data.duplicates import duplicates
from trainstack.data.store import TokenStore
from trainstack.options import parse, parser_of
from trainstack.storage import layout
from trainstack.units import counted

SHOWN_SAMPLES = 3
SHOWN_PIECES, SHOWN_TOKENS = 4, 100  # of a sample, and of each piece
ENDS = 6  # tokens that are shown of a document's beginning and end
BAR_WIDTH, SHARE_WIDTH = 34, 20  # characters: of lengths, of sources; lines fit into 80 columns
COLOUR, PLAIN = ("\033[32m", "\033[0m"), ("[[", "]]")


def main(arguments: list[str]) -> int:
    parser = parser_of("data_report", __doc__, has_config=True)
    options = parse(parser, arguments)
    config = load(options.config, options.overrides)
    corpus = open_corpus(options.home, config)
    marks = COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
    for line in shares(config, corpus):
        print(line)
    model_folder = layout.model_folder(options.home, config.model.name)
    for section, store in zip(config.data.sources, corpus.stores.values(), strict=True):
        for line in (*report(section, store), *examples(store, model_folder, marks)):
            print(line)
        for remark in store.remarks(section):  # last, where they are read: each is a decision
            print(f"remark: {remark}")
        if store.meta["template"]:
            prompt = Chat.of(model_folder, section).generation_prompt()
            print(f"at inference the model is given, before it answers: {prompt!r}")
    return 0


def shares(config: Config, corpus: Corpus) -> Iterator[str]:
    """Of each data set of a mixture, how much of what is learned comes from it."""
    if len(corpus.sizes) == 1:
        return
    steps = config.steps_for(corpus.train.num_samples)
    drawn = steps * config.train.global_batch_size
    yield f"share of the sequences, and epochs of each data set in {counted(steps, 'step')}"
    rows = zip(corpus.stores, corpus.sizes, corpus.shares(config.data.sources), strict=True)
    for label, size, share in rows:
        drawn_bar = f"{bar(share, SHARE_WIDTH):<{SHARE_WIDTH}}"
        yield f"    {share:>6.1%} {drawn_bar} {share * drawn / max(1, size):>7.2f} epochs  {label}"


def report(section: DataSection, store: TokenStore) -> Iterator[str]:
    """What there is, how full the samples are, how much of it is repeated, and how long it is."""
    yield f"{section.label} in {store.folder}"
    yield from (f"  {line}" for line in store.summary(section))
    copies = duplicates(store.train)
    share = copies / max(1, len(store.train.stops))
    yield f"  duplicates: {counted(copies, 'document')} ({share:.1%})"
    yield from histogram(np.diff(store.train.stops, prepend=0))


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """A line for each power of two: how many lengths are below it, and not below half of it."""
    if not len(lengths):
        return
    middle, longest = f"{np.median(lengths):,.0f}", f"{lengths.max():,}"
    yield f"  tokens per document of train: median {middle}, longest {longest}"
    bins = np.bincount(np.ceil(np.log2(lengths + 1)).astype(np.int64))
    for power in range(np.flatnonzero(bins)[0], len(bins)):
        count, least, most = bins[power], 1 << power >> 1, (1 << power) - 1
        drawn = bar(count / bins.max(), BAR_WIDTH)
        shown = f"    {least:>9,} to {most:>9,} {count:>11,} {count / len(lengths):>6.1%} {drawn}"
        yield shown.rstrip()


def bar(share: float, width: int) -> str:
    """A share of ``width`` characters; what is there at all has one at least."""
    return "#" * max(int(share > 0), round(share * width))


def examples(store: TokenStore, model_folder: Path, marks: tuple[str, str]) -> Iterator[str]:
    """Some samples and documents as a model gets them, spread over the training split."""
    tokenizer = load_tokenizer(model_folder)
    split = store.train
    for sample in spread(split.num_samples):
        pieces = split.pieces_of(sample)
        yield f"sample {sample:,}: {len(pieces)} pieces; of each the first {SHOWN_TOKENS} tokens:"
        for start, count in pieces[:SHOWN_PIECES]:
            positions = np.arange(start, start + min(count + 1, SHOWN_TOKENS))
            carries = split.targets_in(positions, positions + 1) > 0
            carries[0] = False  # the first token is no target
            yield "".join(marked(tokenizer, split.ids[positions].tolist(), carries, marks))
    for number in spread(len(split.stops)):
        first, stop = (split.stops[number - 1] if number else 0), split.stops[number]
        ids = split.ids[first:stop].tolist()
        ends = [tokenizer.convert_ids_to_tokens(part) for part in (ids[:ENDS], ids[-ENDS:])]
        special = sorted({*ids} & {*tokenizer.all_special_ids})
        names = " ".join(tokenizer.convert_ids_to_tokens(special)) or "none"
        learned = split.targets_in(np.array([first]), np.array([stop])).item()
        yield (
            f"document {number:,}: {len(ids):,} tokens, {learned:,} of them learned; begins "
            f"{' '.join(ends[0])}; ends {' '.join(ends[1])}; special tokens in it: {names}"
        )


def spread(number: int) -> list[int]:
    """SHOWN_SAMPLES numbers from 0 up to ``number``, as far apart as can be; fewer of a few."""
    return np.unique(np.linspace(0, number - 1, SHOWN_SAMPLES).astype(int)).tolist() * bool(number)


def marked(tokenizer, ids: list[int], carries: np.ndarray, marks: tuple[str, str]) -> Iterator[str]:
    """The text of each run of tokens that carry loss, marked, or that carry none."""
    edges = [0, *(np.flatnonzero(np.diff(carries)) + 1), len(ids)]
    # From the beginning: of tokens alone, some tokenizers leave out a space before the first.
    texts = [tokenizer.decode(ids[:edge], clean_up_tokenization_spaces=False) for edge in edges]
    for first, (before, text) in zip(edges, itertools.pairwise(texts), strict=False):
        text = text[len(os.path.commonprefix([before, text])) :]
        yield f"{marks[0]}{text}{marks[1]}" if carries[first] else text
