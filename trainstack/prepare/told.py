"""What people are told of a data set and its store."""

import sys
from pathlib import Path

from trainstack.config.schema import DataSection
from trainstack.data.store import REMARKS, TokenStore
from trainstack.data.writer import BAD_RECORDS

SPEAKER = "prepare"
OTHER_TOKENS = (
    "transformers makes other tokens of it than tokenizer.json ({!r} for {!r}), and the model "
    "learns those; if it was trained with the others, write in its tokenizer_config.json: "
    '"tokenizer_class": "PreTrainedTokenizerFast"'
)


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
    if store.meta["template"]:
        say(section, "checked: each text of each conversation is in it, the assistant's is learned")
    for name, text in REMARKS.items():
        if count := getattr(counts, name):
            say(section, f"{count:,} {text}")
    if counts.written_documents:
        choice = "; data.special_tokens=text if they are meant as text, tokens if as tokens"
        say(section, f"{counts.written_documents:,} documents hold a special token, kept as text, "
            f"first {counts.first_written}{'' if section.special_tokens else choice}")  # fmt: skip
    if counts.bad_records:
        say(section, f"{counts.bad_records:,} bad records left out: {folder / BAD_RECORDS}")
