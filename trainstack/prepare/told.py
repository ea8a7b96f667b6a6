"""What people are told of a data set and its store."""

import itertools
import os
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from trainstack.chat.ends import Ends
from trainstack.config.schema import DataSection
from trainstack.data.store import PLAIN, SINCE_VERSION_3, TokenStore
from trainstack.prepare.tokenise import DataFile, Tokenised, Tokeniser, tasks_from
from trainstack.prepare.tokenizer import Encoder

if TYPE_CHECKING:
    from tokenizers import Encoding

SPEAKER = "prepare"
LOOKED_AT, COMPARED = 100, 5000  # the first records, and characters of a text
OTHER_TOKENS = (
    "transformers makes other tokens of it than tokenizer.json ({!r} for {!r}), and the model "
    "learns those; if it was trained with the others, write in its tokenizer_config.json: "
    '"tokenizer_class": "PreTrainedTokenizerFast"'
)
OTHER_TEXTS = (
    "its tokenizer changes texts, at inference too ({!r} becomes {!r}); if that matters, choose a "
    "model whose tokenizer does not"
)
BEHIND_PROMPTS = (
    "at inference its tokenizer puts {} behind a prompt, and after it the model has learned to "
    "begin another text; take it away from prompts"
)
NO_END = (
    "{:,} turns end with {!r}, which is no token of its own, so that generating does not stop "
    "there; make it one in the tokenizer, or use a chat template that ends turns with {}, within "
    "{{% generation %}} if it has that"
)
MOST_OFF = 4  # times that more or less is held out than asked for
WITHIN = (
    "{} ends turns, and is within others as well, as where thoughts end with it too: the "
    "checkpoints do not stop there, for they would not come to the answer"
)


def say(section: DataSection, text: str) -> None:
    print(f"{SPEAKER}: {section.label}: {text}", file=sys.stderr)


def describe(section: DataSection, folder: Path, remark: str) -> None:
    """Say what is in a store."""
    store = TokenStore(folder, section.seq_len)
    counts, lines = store.counts, [*store.summary(section)]
    lines[0] += f"; {remark}"
    held = counts.eval_tokens / max(1, counts.eval_tokens + counts.train_tokens)
    wanted = 0 if section.eval_split else section.eval_fraction
    if wanted and not wanted / MOST_OFF < held < wanted * MOST_OFF:
        lines.append(
            f"{held:.1%} of the tokens are held out, not data.eval_fraction={wanted:g}: whole "
            "documents are, by a hash of each; with more documents it comes nearer, or name a "
            "data.eval_split, or divide them (data.split_on)"
        )
    if store.meta["template"] and store.meta["format"] not in PLAIN:
        lines.append("checked: each text of each conversation is in it, the assistant's is learned")
    for line in (*lines, *store.remarks(section)):
        say(section, line)


def notes_on_data(
    model_folder: Path, tokenise: Tokeniser, data_files: list[DataFile], ends: Ends
) -> list[str]:
    """What nobody counts: of the first records, of the tokenizer and of the ``ends`` of turns."""
    encoder, notes = tokenise.encoder, []
    encoder.tokenizer.encode_special_tokens = True  # what is written for one is told elsewhere
    tasks = tasks_from(data_files, tokenise.wanted, [0, 1])
    documents = (d for task in tasks for d, _ in tokenise.documents(task, Tokenised()))
    texts = [
        document.text[first:last][:COMPARED]
        for document in itertools.islice(documents, LOOKED_AT)
        for first, last in document.of_people
    ]
    encodings = encoder.tokenizer.encode_batch(texts, add_special_tokens=False)
    if pair := other_text(encoder, texts, encodings):
        notes.append(OTHER_TEXTS.format(*pair))
    if tokens := tokens_of_file(model_folder, encoder, texts, encodings):
        notes.append(OTHER_TOKENS.format(*tokens))
    of_turns = ("learn", "each_turn", "chat_template")
    given = [key for key in of_turns if getattr(tokenise.section, key) != SINCE_VERSION_3[key]]
    if given and tokenise.format == "text":
        notes.append(f"texts have no turns, so data.{' and data.'.join(given)} does nothing")
    own_end, *after = map(encoder.tokenizer.id_to_token, [encoder.end_id, *encoder.after])
    if after and tokenise.format in PLAIN:
        notes.append(BEHIND_PROMPTS.format(" ".join(after)))
    if ends.within:
        notes.append(WITHIN.format(" and ".join(ends.within)))
    if ends.unended:
        notes.append(NO_END.format(ends.unended, ends.tail, own_end))
    return notes


def other_text(
    encoder: Encoder, texts: list[str], encodings: list["Encoding"]
) -> tuple[str, str] | None:
    """Where tokens are decoded to another text than they were made of: the first, of both.

    White space at its ends and the form of composed characters (NFC) do not count, nor texts with
    characters that are unknown.
    """
    for text, encoding in zip(texts, encodings, strict=True):
        if encoder.unknown_id in encoding.ids or encoder.lost_in(text):
            continue
        other = encoder.tokenizer.decode(encoding.ids, skip_special_tokens=False)
        pair = [unicodedata.normalize("NFC", found.strip()) for found in (text, other)]
        at = len(os.path.commonprefix(pair))
        if pair[0] != pair[1]:
            return tuple(found[max(0, at - 8) : at + 8] for found in pair)
    return None


def tokens_of_file(
    model_folder: Path, encoder: Encoder, texts: list[str], encodings: list["Encoding"]
) -> tuple[str, str] | None:
    """Where tokenizer.json makes other tokens of a text than ``encodings``: the first, of both.

    Special tokens are text in both. A class of transformers that a tokenizer_config.json names may
    have rules of its own.
    """
    from tokenizers import Tokenizer

    if not (model_folder / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    for added in encoder.tokenizer.get_added_tokens_decoder().values():  # of its configuration
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    others = tokenizer.encode_batch(texts, add_special_tokens=False)
    for encoding, other in zip(encodings, others, strict=True):
        for ours, theirs in zip(encoding.tokens, other.tokens, strict=False):
            if ours != theirs:
                return ours, theirs
    return None
