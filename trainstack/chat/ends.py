"""Which tokens end the turns that are learned, where generating has to stop."""

import os
from typing import NamedTuple

import numpy as np

from trainstack.chat.marks import TAG

MOST_TURNS = 100_000  # that are looked at for what ends them
SHOWN_TOKENS, SHOWN_TURNS = 12, 100  # of the end of a turn, and of which turns
RARE = 0.01  # share of turns; what ends fewer is not taken for an end of turns


class Ends(NamedTuple):
    """``stops``: ids that end turns. ``within``: tokens that do, and are within turns as well, as
    where a thought ends with them too: generating must not stop there. ``unended``: how many turns
    end with no token of their own, and ``tail``, what the first of them end with.
    """

    stops: list[int]
    within: list[str]
    unended: int
    tail: str


def ends_of_turns(tokenizer, ids: np.ndarray, spans: np.ndarray, end_id: int) -> Ends:
    """The ends of the turns in a store: its ``ids`` [tokens], and ``spans`` as a Split has them.

    ``end_id``, which ends documents, is never among ``within``.
    """
    spans = spans[:MOST_TURNS]
    lasts = ids[spans[:, 1] - 1]
    found, counts = np.unique(lasts, return_counts=True)
    common = {*found[counts >= RARE * len(lasts)].tolist()}
    ends = sorted(common & tokenizer.get_added_tokens_decoder().keys())
    inner = [n for n in ends if n != end_id and turns_with(n, ids, spans) >= RARE * len(lasts)]
    within = [tokenizer.id_to_token(number) for number in inner]
    stops = [number for number in ends if number not in inner]
    others = spans[~np.isin(lasts, ends)]
    if len(others) < max(1, RARE * len(lasts)):
        return Ends(stops, within, 0, "")
    tails = [ids[max(s[0], s[1] - SHOWN_TOKENS) : s[1]].tolist() for s in others[:SHOWN_TURNS]]
    texts = tokenizer.decode_batch(tails, skip_special_tokens=False)
    text = os.path.commonprefix([text[::-1] for text in texts])[::-1]  # what all end with
    return Ends(stops, within, len(others), (TAG.findall(text) or [text])[-1][-SHOWN_TOKENS:])


def turns_with(number: int, ids: np.ndarray, spans: np.ndarray) -> int:
    """How many turns have a token before their last one."""
    places = np.flatnonzero(ids[: spans[-1, 1]] == number)
    turns = np.searchsorted(spans[:, 0], places, "right") - 1
    return len(np.unique(turns[(turns >= 0) & (places < spans[turns, 1] - 1)]))
