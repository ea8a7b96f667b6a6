"""What people are told of a data set and its store."""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

from trainstack.config.schema import DataSection
from trainstack.data.store import PLAIN, TokenStore
from trainstack.data.writer import BAD_RECORDS
from trainstack.prepare.tokenise import DataFile, Tokenised, Tokeniser, tasks_from

SPEAKER = "prepare"
LOOKED_AT, COMPARED = 100, 5000  # the first records, and characters of a text
OTHER_TOKENS = (
    "transformers makes other tokens of it than tokenizer.json ({!r} for {!r}), and the model "
    "learns those; if it was trained with the others, write in its tokenizer_config.json: "
    '"tokenizer_class": "PreTrainedTokenizerFast"'
)
BEHIND_PROMPTS = (
    "at inference its tokenizer puts {} behind a prompt, and after it the model has learned to "
    "begin another text; take it away from prompts"
)
NO_END = (
    "{:,} turns end with {!r}, which is no token of its own, so that generating does not stop "
    "there; make it one in the tokenizer, or use a chat template that ends turns with {}"
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
    for remark in store.remarks():
        say(section, remark)
    if counts.written_documents:
        choice = "; data.special_tokens=text if they are meant as text, tokens if as tokens"
        say(section, f"{counts.written_documents:,} documents hold a special token, kept as text, "
            f"first {counts.first_written}{'' if section.special_tokens else choice}")  # fmt: skip
    if counts.bad_records:
        say(section, f"{counts.bad_records:,} bad records left out: {folder / BAD_RECORDS}")


def notes_on_data(
    model_folder: Path, tokenise: Tokeniser, data_files: list[DataFile], unended: int, end: str
) -> list[str]:
    """What nobody counts, of the first records and of the tokenizer.

    ``unended``: how many turns end with ``end``, where nothing stops the model.
    """
    encoder, notes = tokenise.encoder, []
    tasks = tasks_from(data_files, tokenise.wanted, [0, 1])
    documents = (d for task in tasks for d, _ in tokenise.documents(task, Tokenised()))
    texts = (document.text[:COMPARED] for document in itertools.islice(documents, LOOKED_AT))
    if tokens := tokens_of_file(model_folder, encoder.tokenizer, texts):
        notes.append(OTHER_TOKENS.format(*tokens))
    own_end, *after = map(encoder.tokenizer.id_to_token, [encoder.end_id, *encoder.after])
    if after and tokenise.format in PLAIN:
        notes.append(BEHIND_PROMPTS.format(" ".join(after)))
    if unended:
        notes.append(NO_END.format(unended, end, own_end))
    return notes


def tokens_of_file(model_folder: Path, tokenizer, texts: Iterable[str]) -> tuple[str, str] | None:
    """Where tokenizer.json makes other tokens of a text than ``tokenizer``: the first, of both.

    A class of transformers that a tokenizer_config.json names may have rules of its own.
    """
    from tokenizers import Tokenizer

    if not (model_folder / "tokenizer.json").exists():
        return None
    both = tokenizer, Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    both[1].no_truncation()
    both[1].no_padding()
    for text in texts:
        pair = [made.encode(text, add_special_tokens=False).tokens for made in both]
        for ours, theirs in zip(*pair, strict=False):
            if ours != theirs:
                return ours, theirs
    return None
