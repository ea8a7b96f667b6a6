"""What ends turns is where generating stops, unless a turn has it in its midst too."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from trainstack.chat.ends import Ends, ends_of_turns

WORDS = {"a": 0, "b": 1, "c": 2}
END, RETURN, DOCUMENT = 3, 4, 5


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    names = ("<|end|>", "<|return|>", "<|document|>")
    made.add_special_tokens([AddedToken(name, special=True) for name in names])
    return made


def ends(tokenizer, *turns: list[int]) -> Ends:
    """Of turns that are learned, with a token of somebody else before each."""
    ids = np.array([token for turn in turns for token in (0, *turn)], np.uint16)
    stops = np.cumsum([len(turn) + 1 for turn in turns])
    firsts = stops - [len(turn) for turn in turns]
    spans = np.stack([firsts, stops, np.zeros_like(stops)], axis=1)
    return ends_of_turns(tokenizer, ids, spans, DOCUMENT)


@pytest.mark.parametrize(("turns", "stops", "within"), [
    ([[1, END], [2, RETURN]], [END, RETURN], []),
    ([[1, END], [1, END, 2, RETURN]], [RETURN], ["<|end|>"]),  # a thought, then the answer
    ([[1, END, 2, RETURN]], [RETURN], []),  # it ends no turn
    ([[1, DOCUMENT, 2, DOCUMENT]], [DOCUMENT], []),
    ([[END], [1, END]] * 2, [END], []),
])  # fmt: skip
def test_a_token_within_turns_is_no_stop(tokenizer, turns, stops, within):
    assert ends(tokenizer, *turns) == Ends(stops, within, 0, "")


def test_a_rare_token_within_a_turn_changes_nothing(tokenizer):
    turns = [[1, END]] * 200
    assert ends(tokenizer, *turns, [1, END, 2, END]).stops == [END]


def test_turns_that_end_with_a_word_are_counted(tokenizer):
    assert ends(tokenizer, [1, END], [2, 1], [1, 1]) == Ends([END], [], 2, " b")
