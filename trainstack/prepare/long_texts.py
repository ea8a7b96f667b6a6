"""Long texts as tokens in parts that overlap, with the tokens of the whole."""

from collections.abc import Sequence

import numpy as np

from trainstack.chat.template import Ranges

LONG_TEXT = 1 << 18  # characters; a longer text is tokenised in parts
OVERLAP = 2000  # characters of a part that the next one begins with
SAME = 200  # on each side of a cut, of which both parts make the same tokens
CUT_TRIES = 32  # places where the next part may begin
Flags = np.ndarray | None  # bool [tokens]: whether each carries loss; None: all do


def long_ids(
    tokenizer, text: str, first: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [tokens], and offsets of a long text in parts: at once it takes 120 bytes a
    character.

    Offsets [tokens, 2]: which characters each token is of: first, last + 1. Only of the tokens that
    begin at the characters from ``first`` up to ``stop``; None: to its end.

    A part begins within the one before. What both have alike shows where the ids of the later one
    are those of the whole text; what a tokenizer puts before every text is not among them.
    """
    found, places = [], []
    end = len(text) + 1 if stop is None else stop
    start, kept, size = 0, first, LONG_TEXT
    while True:
        ids, offsets = part(tokenizer, text, start, start + size)
        begin, cut = next_part(tokenizer, text, ids, offsets, start + size)
        if cut is None:  # no place where both are alike
            size *= 2
            continue
        own = slice(*np.searchsorted(offsets[:, 0], [kept, min(cut, end)]))
        found.append(ids[own])
        places.append(offsets[own])
        if cut >= end:
            return joined(found, np.int32), joined(places, np.int64)
        start, kept, size = begin, cut, LONG_TEXT


def cut_of(tokenizer, text: str) -> tuple[int, int, int] | None:
    """Where a text that continues can be cut between two tokens of the whole, near its end.

    The place, between the beginning and the end of the text that shows it. None if two
    beginnings do not give the same tokens there, as with a long run of one character.
    """
    stop = len(text) - OVERLAP
    start = stop - 4 * OVERLAP
    if start < 0:
        return None
    ids, offsets = part(tokenizer, text, start, stop)
    begin, cut = next_part(tokenizer, text, ids, offsets, stop)
    if cut is None:
        return None
    is_same = is_alike(cut, ids, offsets, *part(tokenizer, text, start + 7, stop))
    return (int(begin), cut, len(text)) if is_same else None


def part(tokenizer, text: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [tokens] of a part of a text, and which characters each is of: first, last + 1."""
    encoding = tokenizer.encode(text[start:stop], add_special_tokens=False)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), offsets + start


def next_part(
    tokenizer, text: str, ids: np.ndarray, offsets: np.ndarray, stop: int
) -> tuple[int, int | None]:
    """Where the part behind ``stop`` begins, and from where on its tokens count; None: nowhere.

    ``ids``, ``offsets``: of the part before. It begins with one of its tokens if it can, so that a
    run of one character is divided alike.
    """
    if stop >= len(text):
        return stop, len(text) + 1
    cuts = np.unique(offsets[:, 0])
    cuts = cuts[cuts >= stop - OVERLAP]
    for begin in (cuts[:1, None] + np.arange(CUT_TRIES)).ravel():
        other_ids, other = part(tokenizer, text, begin, stop + OVERLAP)
        for cut in cuts[(cuts > begin + 2 * SAME) & (cuts < stop - 2 * SAME)]:
            at = np.searchsorted(offsets[:, 0], cut)
            is_same = is_alike(cut, ids, offsets, other_ids, other)
            if is_same and offsets[at - 1, 1] <= cut:  # not within a character
                return begin, int(cut)
    return stop, None


def is_alike(
    cut: int, ids: np.ndarray, offsets: np.ndarray, other_ids: np.ndarray, other: np.ndarray
) -> bool:
    """Whether two parts have the same tokens around a place."""
    near = (cut - SAME, cut + SAME)
    ours, theirs = (slice(*np.searchsorted(o[:, 0], near)) for o in (offsets, other))
    return np.array_equal(ids[ours], other_ids[theirs]) and np.array_equal(
        offsets[ours], other[theirs]
    )


def joined(arrays: list, dtype) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype, casting="unsafe")


def learned_tokens(
    tokenizer, text: str, ids: np.ndarray, offsets: Sequence | np.ndarray, learned: Ranges | None,
    special: np.ndarray,
) -> tuple[Flags, int]:  # fmt: skip
    """Per token, whether it is, at least in part, in one of the ranges of characters; bool.

    Not a special token that begins before a range: with ``rstrip`` it takes the white space behind
    it, and is still what the model is given. Also before how many ranges the text has other tokens
    than it has without what follows, as at inference.
    """
    if learned is None:
        return None, 0
    offsets = np.array(offsets).reshape(-1, 2)
    flags, others = np.zeros(len(ids), bool), 0
    is_special = np.isin(ids, special)
    for first, last in learned:
        begin = np.searchsorted(offsets[:, 1], first, "right")
        if begin < len(ids) and offsets[begin, 0] < first:
            begin += is_special[begin]
        others += not is_prompt(tokenizer, text, ids[:begin], offsets, is_special, first)
        flags[begin : np.searchsorted(offsets[:, 0], last, "left")] = True
    return flags, others


def is_prompt(
    tokenizer, text: str, ids: np.ndarray, offsets: np.ndarray, is_special: np.ndarray, stop: int
) -> bool:
    """Whether the text up to ``stop`` ends with the same tokens if nothing follows it.

    ``ids``: the tokens before that place. Looks at what follows the last special token, or at the
    last SAME characters.
    """
    specials = np.flatnonzero(is_special[: len(ids)])
    first = specials[-1] if len(specials) else 0
    cuts = offsets[: len(ids), 0]
    if len(ids) and stop - cuts[first] > 2 * SAME:
        first = np.searchsorted(cuts, stop - 2 * SAME, "right") - 1
    start = int(cuts[first]) if len(ids) else 0
    alone, places = part(tokenizer, text, start, stop)
    if first and not is_special[first]:  # the first tokens may be others than in the whole
        first = np.searchsorted(cuts, stop - SAME)
        alone = alone[np.searchsorted(places[:, 0], stop - SAME) :]
    return np.array_equal(ids[first:], alone)
