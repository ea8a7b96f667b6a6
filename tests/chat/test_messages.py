"""The messages of a record in one shape, whatever its roles and columns are called."""

import json
import re

import pytest

from trainstack.chat.messages import messages_of, tools_of, turns_in
from trainstack.errors import DataError

TURNS = [
    {"role": "user", "content": "one", "weight": None},
    {"role": "assistant", "content": "two", "weight": 0},
]


def message(turn: dict) -> dict:
    [found], _ = messages_of("a:1", [turn], "messages")
    return found


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("human", "user"), ("gpt", "assistant"), ("User", "user"), ("observation", "tool"),
        ("function", "tool"), ("developer", "developer"), ("model", "assistant"),
        ("critic", "critic"), ("ipython", "tool"), ("system", "system"),
    ],
)  # fmt: skip
def test_roles_of_other_projects_are_known(role, expected):
    assert message({"role": role, "content": "one"})["role"] == expected


def test_both_shapes_of_a_turn_are_read_in_any_column():
    as_openai, _ = messages_of("a:1", [{"role": "user", "content": "one"}], "conversations")
    as_sharegpt, _ = messages_of("a:1", [{"from": "human", "value": "one"}], "messages")
    assert as_openai == as_sharegpt == [{"role": "user", "content": "one"}]


def test_parts_of_text_are_joined_and_other_parts_are_named():
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}, " three"]
    assert message({"role": "user", "content": parts})["content"] == "one two three"
    thinking = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "one"}]
    assert message({"role": "assistant", "content": thinking})["reasoning_content"] == "hm"
    with pytest.raises(DataError, match=r"^a:1: message 1 of messages .*no text \(image\)"):
        message({"role": "user", "content": [{"type": "image", "image": "a.png"}]})
    with pytest.raises(DataError, match=r"\(tool_use\); write calls as tool_calls"):
        message({"role": "assistant", "content": [{"type": "tool_use", "name": "rain"}]})


@pytest.mark.parametrize("thoughts", [{"thinking": ["hm"]}, {"thinking": "hm", "reasoning": "so"}])
def test_thoughts_that_are_not_one_text_are_no_message(thoughts):
    with pytest.raises(DataError, match="thoughts that are not one text"):
        message({"role": "assistant", "content": "one", **thoughts})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_have_one_name(name):
    found = message({"role": "assistant", "content": "one", name: "hm"})
    assert found == {"role": "assistant", "content": "one", "reasoning_content": "hm"}


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [WEATHER]},
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]},
        {
            "tool_calls": [
                {"name": "weather", "arguments": json.dumps(json.dumps({"city": "Bern"}))}
            ]
        },
        {"tool_calls": [{"function": '{"name": "weather", "arguments": {"city": "Bern"}}'}]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Bern"}}]},
        {"tool_calls": '[{"name": "weather", "arguments": {"city": "Bern"}}]'},
        {"tool_calls": ['{"name": "weather", "parameters": {"city": "Bern"}}']},
        {"function_call": {"name": "weather", "arguments": '{"city": "Bern"}'}},
        {"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Bern"}}'},
    ],
)
def test_tool_calls_have_one_shape(turn):
    found = message({"role": "assistant", "content": None, **turn})
    assert found == {"role": "assistant", "content": "", "tool_calls": [WEATHER]}


@pytest.mark.parametrize(
    "turns",
    [
        json.dumps(TURNS),
        [json.dumps(turn) for turn in TURNS],
        {"role": ["user", "assistant"], "content": ["one", "two"], "weight": [None, 0]},
    ],
)
def test_turns_as_json_and_in_lists_by_their_keys_are_turns(turns):
    assert turns_in(turns) == TURNS


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        (str(TURNS), "but a text that is no JSON ([{'role': 'user'"),
        ({"messages": TURNS}, "but an object with messages; write [{role, content}]"),
        ({"role": ["user"], "content": []}, "but an object with role, content; write"),
        (["one"], "but a list with one; write [{role, content}]"),
    ],
)
def test_what_is_no_list_of_turns_is_shown(turns, told):
    with pytest.raises(DataError, match=re.escape(told)):
        messages_of("a:1", turns_in(turns), "messages")


def test_calls_that_are_turns_of_their_own_are_calls_of_one_turn():
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'}
    turns = [{"from": "human", "value": "one"}, call, call, {"from": "observation", "value": "two"}]
    found, marks = messages_of("a:1", turns, "conversations")
    assert [len(m.get("tool_calls", ())) for m in found] == [0, 2, 0] and marks == [True] * 3
    # Behind what the assistant says before them they are of its turn, as at inference.
    by_keys = {"role": "tool_call", "name": "weather", "arguments": {"city": "Bern"}}
    turns[1:1] = [{"from": "gpt", "value": "I look it up."}, by_keys]
    found, _ = messages_of("a:1", turns, "conversations")
    assert [m["role"] for m in found] == ["user", "assistant", "tool"]
    assert found[1] == {
        "role": "assistant",
        "content": "I look it up.",
        "tool_calls": [WEATHER] * 3,
    }


def test_arguments_that_are_no_json_stay_text_and_lists_without_a_call_are_none():
    call = {"function": {"name": "run", "arguments": "print(1)"}}
    found = message({"role": "assistant", "content": "", "tool_calls": [call]})
    assert found["tool_calls"][0]["function"]["arguments"] == "print(1)"
    assert "tool_calls" not in message({"role": "user", "content": "one", "tool_calls": []})


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ({"content": "one"}, "has no role; the turn has: content"),
        ({"role": "user"}, "has no content; write a text"),
        (
            {"role": "user", "text": "a"},
            "or say which of text it is: data.columns.content=ITS_KEY",
        ),
        ({"role": "user", "content": {"a": 1}}, "a content that is a dict"),
        ({"role": "assistant", "content": "one", "weight": 0.5}, "has weight: 0.5; write 0 or 1"),
        ({"from": "function_call", "value": "rain"}, "has function_call that is no JSON"),
        ({"role": "assistant", "content": "", "tool_calls": [5]}, "a tool call that is a int"),
        (
            {"from": "function_call", "value": '{"name": "a", "arguments": {"b": [1, 1e400]}}'},
            "has a call with NaN or Infinity",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "a tool call without a name"),
    ],
)
def test_a_bad_turn_is_named_with_its_number(turn, told):
    with pytest.raises(DataError, match=f"^a:1: message 1 of messages .*{told}"):
        message(turn)


def test_marks_say_which_turns_are_learned_and_do_not_reach_the_template():
    turns = [{"role": "assistant", "content": "one", "weight": 0, "train": None}]
    assert messages_of("a:1", turns, "messages") == (
        [{"role": "assistant", "content": "one"}], [False]
    )  # fmt: skip


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        [{"name": "weather", "parameters": '{"type": "object"}'}],
        '[{"name": "weather", "parameters": {"type": "object"}}]',
        ['{"name": "weather", "parameters": {"type": "object"}}'],
        {"name": "weather", "parameters": {"type": "object"}},
        [
            {
                "type": "function",
                "function": json.dumps({"name": "weather", "parameters": {"type": "object"}}),
            }
        ],
    ],
)
def test_tools_have_one_shape(tools):
    [tool] = tools_of("a:1", tools)
    assert tool["type"] == "function"
    assert tool["function"] == {"name": "weather", "parameters": {"type": "object"}}


def test_no_tools_are_none_and_bad_ones_are_named():
    assert [tools_of("a:1", none) for none in (None, [], "", "[]")] == [None] * 4
    with pytest.raises(DataError, match="^a:1: the record has a tool whose function is no obj"):
        tools_of("a:1", [{"type": "function", "function": "[]"}])
    with pytest.raises(DataError, match="^a:1: the record has tools that is no JSON"):
        tools_of("a:1", "weather")
