"""Chat templates of 70 released models, with the shapes of conversation that data sets have.

They are in the sources of a package, llama.cpp's collection (vendor/llama.cpp/models/templates of
the sdist), which is downloaded and not installed.
"""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from trainstack.chat.template import Chat
from trainstack.errors import DataError

PACKAGE = "llama-cpp-python==0.3.36"
NUMBER = 70
QUESTIONS = ("Qalpha one?", "Qbeta two?", "Qgamma three?")
ANSWERS = ("Aalpha 1.", "Abeta 2.", "Agamma 3.")


def user(number: int = 0) -> dict:
    return {"role": "user", "content": QUESTIONS[number]}


def answer(number: int = 0, **more) -> dict:
    return {"role": "assistant", "content": ANSWERS[number], **more}


def call(name: str, key: str = "call12345", **arguments) -> dict:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, name: str = "get_weather", key: str = "call12345") -> dict:
    return {"role": "tool", "name": name, "tool_call_id": key, "content": text}


def tool(name: str) -> dict:
    properties = {"city": {"type": "string", "description": "where"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {"name": name, "description": f"tells {name}", "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = call("get_weather", city="Bern")
TIME = call("get_time", "call67890", city="Rome", hours=7)
TOOLS = [tool("get_weather"), tool("get_time")]
SHAPES = {  # messages, tools
    "one round": ([user(), answer()], None),
    "two rounds": ([user(), answer(), user(1), answer(1)], None),
    "a system": ([{"role": "system", "content": "Sbrief."}, user(), answer()], None),
    "a developer": ([{"role": "developer", "content": "Sbrief."}, user(), answer()], None),
    "two questions": ([user(), user(1), answer(1)], None),
    "two answers": ([user(), answer(), answer(1)], None),
    "an empty answer": ([user(), {"role": "assistant", "content": ""}, user(1), answer(1)], None),
    "a greeting": ([answer(), user(), answer(1)], None),
    "a question at the end": ([user(), answer(), user(1)], None),
    "short texts": (
        [
            {"role": "user", "content": "4"}, {"role": "assistant", "content": "user"},
            {"role": "user", "content": "user"}, {"role": "assistant", "content": "4"},
        ],
        None,
    ),
    "white space": (
        [{"role": "user", "content": " Qalpha one?\n"},
         {"role": "assistant", "content": "\nAalpha 1. \n"}],
        None,
    ),
    "thoughts in tags": ([user(), answer(content="<think>\nThm\n</think>\n\nAalpha 1.")], None),
    "thoughts apart": (
        [user(), answer(reasoning_content="Thm"), user(1), answer(1, reasoning_content="Tso")],
        None,
    ),
    "a call": (
        [user(), answer(content="", tool_calls=[WEATHER]), result("Rrain"), answer(1)], TOOLS,
    ),
    "text with a call": (
        [user(), answer(tool_calls=[WEATHER]), result("Rrain"), answer(1), user(2), answer(2)],
        TOOLS,
    ),
    "two calls": (
        [user(), answer(content="", tool_calls=[WEATHER, TIME]), result("Rrain"),
         result("Rnoon", "get_time", "call67890"), answer(1)],
        TOOLS,
    ),
    "a call at the end": ([user(), answer(content="", tool_calls=[TIME])], TOOLS),
}  # fmt: skip
# So many of the templates refuse a shape, in their own words, or leave out some of it.
REFUSED = {
    "one round": 1, "two rounds": 1, "a system": 3, "a developer": 3, "two questions": 5,
    "two answers": 6, "an empty answer": 1, "a greeting": 8, "a question at the end": 1,
    "short texts": 1, "white space": 1, "thoughts in tags": 7, "thoughts apart": 43, "a call": 12,
    "text with a call": 26, "two calls": 18, "a call at the end": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, Chat]:
    """A Chat of each template."""
    folder = tmp_path_factory.mktemp("templates")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    sources = ["--no-deps", "--no-binary", ":all:", "-d", folder, PACKAGE]
    subprocess.run([*pip, *sources], check=True, timeout=300)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    made = {}
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.search(r"/models/templates/[^/]*\.jinja$", member.name):
                name = Path(member.name).stem
                tokenizer.chat_template = tar.extractfile(member).read().decode()
                tokenizer.save_pretrained(folder / name)
                made[name] = Chat(folder / name, date="2026-01-31")
    assert len(made) == NUMBER
    return made


def said(message: dict) -> list[str]:
    """Every text of a message, the names and values of its calls included."""
    texts = re.split(r"</?think>", message["content"]) + [message.get("reasoning_content", "")]
    for one in message.get("tool_calls", ()):
        function = one["function"]
        texts += [
            function["name"],
            *function["arguments"],
            *map(str, function["arguments"].values()),
        ]
    return [text.strip() for text in texts if text.strip()]


@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_conversation_what_the_assistant_says_is_learned_and_nothing_else(chats, shape):
    messages, tools = SHAPES[shape]
    refused = []
    for name, chat in chats.items():
        try:
            text, ranges, _, remarks = chat.render("a:1", messages, tools)
        except DataError as error:
            assert re.search(r"drops|does not (take|show)", str(error)), (name, str(error))
            refused.append(name)
            continue
        turns = [m for m in messages if m["role"] == "assistant" and said(m)]
        learned = [text[first:last] for first, last in ranges]
        assert len(learned) == len(turns), name
        for turn, part in zip(turns, learned, strict=True):
            own = said(turn)
            if remarks.get("dropped_thoughts") and turn is turns[0]:
                own.remove(turn["reasoning_content"])
            assert all(word in part for word in own), (name, part)
            assert part[part.rindex(own[-1]) + len(own[-1]) :].strip(" \n}])\"'`"), (name, part)
            others = [word for m in messages if m["role"] != "assistant" for word in said(m)]
            assert shape == "short texts" or not any(word in part for word in others), (name, part)
        for message in messages:
            assert message["role"] == "assistant" or all(w in text for w in said(message)), name
    assert len(refused) <= REFUSED[shape], refused


def test_each_turn_can_be_written_as_at_inference_by_every_template(chats):
    messages, _ = SHAPES["two rounds"]
    for name, chat in chats.items():
        if name.startswith("fireworks"):  # wants variables that only its own code gives
            continue
        theirs = chat._tokenizer.apply_chat_template
        question = {"conversation": messages[:1], "tokenize": False, "add_generation_prompt": True}
        try:
            prompt = theirs(**question)
        except TypeError:  # it goes through its tools without asking whether there are any
            prompt = theirs(**question, tools=[])
        rendered = chat.render("a:1", messages, None, learned=[1], is_asked=True)
        [(first, last)] = rendered.learned
        assert rendered.text[:first].startswith(prompt.rsplit("31 Jan", 1)[0][:40]), name
        assert ANSWERS[0] in rendered.text[first:last], name
        assert rendered.text[:first].endswith(prompt[-20:]), name
