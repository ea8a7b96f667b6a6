"""What of a record is learned: token by token, for each format and three kinds of chat template."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from trainstack.chat.checks import check_roles
from trainstack.chat.template import Chat
from trainstack.config.schema import DataSection
from trainstack.errors import ConfigError, DataError
from trainstack.prepare import formats
from trainstack.prepare.tokenizer import Encoder
from trainstack.records import columns

END = "<|im_end|>"
SPECIAL = [END, "<|im_start|>"]
SMOLLM2 = (  # its own, without generation tags
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
PLAIN = (  # no special token around turns, no invitation to the assistant
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q ' + m['content'] + ' A' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # writes an answer differently once it is not the last, as Qwen3 does
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' "
    "and loop.last %}{{ 'think ' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "tagged": TAGGED, "plain": PLAIN, "forgetful": FORGETFUL, "no": ""}
WORDS = (
    "You are a helpful AI assistant named SmolLM trained by Hugging Face system user tool one two "
    "three four five Q A think Below is an instruction that describes task Write response "
    "appropriately completes the request Instruction Response Input paired with input provides "
    "further context"
)
TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five"},
]
HALF = {
    "role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Tokenizers of words and single spaces, newlines and signs, one for each template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    names = [*SPECIAL, *dict.fromkeys(WORDS.split()), " ", "\n", "#", ":", ".", ","]
    words_tokenizer = Tokenizer(
        models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=END)
    )
    words_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    words_tokenizer.add_special_tokens(SPECIAL)
    made = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("tokenizers") / name
        folder.mkdir()
        words_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
        )
        if template:
            (folder / "chat_template.jinja").write_text(template)
        made[name] = Chat(folder)
    return made, words_tokenizer


def test_each_format_of_the_settings_can_be_built_and_recognised():
    settings = get_args(DataSection.model_fields["format"].annotation)
    assert {*settings} == {"auto", "text", *formats.BUILDERS}
    assert formats.BUILDERS.keys() == columns.COLUMNS.keys()


def section(**changes) -> SimpleNamespace:
    """The settings of a data set that a format reads, as config.yaml ships them but ``changes``."""
    known = {
        "format": "auto",
        "text_field": "text",
        "columns": {},
        "learn": "all",
        "each_turn": False,
    }
    return SimpleNamespace(**{**known, **changes})


def documents(record: dict, chat: Chat, **changes) -> list[formats.Document]:
    name = columns.recognise("a.jsonl:1", record, section(**changes))
    return formats.to_documents("a.jsonl:1", record, name, section(**changes), chat)


def marked(chats, template: str, record: dict, **changes) -> str:
    """The tokens of a record's documents joined; learned ones between < and >, runs together."""
    made, words_tokenizer = chats
    return " | ".join(
        tokens_of(document, words_tokenizer)
        for document in documents(record, made[template], **changes)
    )


def tokens_of(document: formats.Document, words_tokenizer) -> str:
    end_id = words_tokenizer.token_to_id(END)
    rows = words_tokenizer.get_vocab_size()
    words_tokenizer.encode_special_tokens = False  # as another Encoder may have left it
    [(_, encoded)] = Encoder(words_tokenizer, end_id, rows, None).encode([document])
    ids, flags = encoded.ids, encoded.flags
    flags = np.ones(len(ids), bool) if flags is None else flags
    assert len(ids) == len(flags)
    words = [words_tokenizer.id_to_token(i) for i in ids]
    short = {"<|im_end|>": "END", "<|im_start|>": "START", "\n": "NL", " ": "_"}
    words = [short.get(word, word) for word in words]
    return " ".join(f"<{w}>" if f else w for w, f in zip(words, flags, strict=True))


def test_smollm2s_own_template_has_no_tags_and_the_turn_with_its_end_is_learned(chats):
    assert marked(chats, "smollm2", {"messages": TURNS}) == (
        "START system NL You _ are _ a _ helpful _ AI _ assistant _ named _ SmolLM , _ trained _ "
        "by _ Hugging _ Face END NL START user NL one END NL "
        "START assistant NL <two> <_> <three> <END> NL "
        "START user NL four END NL START assistant NL <five> <END> NL"
    )


def test_a_template_with_generation_tags_says_itself_what_is_learned(chats):
    assert marked(chats, "tagged", {"messages": TURNS}) == (
        "START user NL one END NL START assistant NL <two> <_> <three> <END> NL "
        "START user NL four END NL START assistant NL <five> <END> NL"
    )


def test_the_mask_of_a_tagged_template_is_the_one_of_transformers(chats):
    made, words_tokenizer = chats
    [document] = documents({"messages": TURNS}, made["tagged"])
    rows = words_tokenizer.get_vocab_size()
    [(_, encoded)] = Encoder(words_tokenizer, 0, rows, None).encode([document])
    theirs = made["tagged"]._tokenizer.apply_chat_template(
        TURNS, return_assistant_tokens_mask=True, return_dict=True
    )
    assert encoded.ids.tolist() == theirs["input_ids"]
    assert encoded.flags.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]


def test_a_template_without_an_invitation_learns_what_the_turn_adds(chats):
    assert marked(chats, "plain", {"messages": TURNS}) == (
        "Q _ one _ A <_> <two> <_> <three> <END> Q _ four _ A <_> <five> <END>"
    )


def test_a_template_that_writes_the_last_turn_otherwise_is_learned_from_as_it_is(chats):
    assert marked(chats, "forgetful", {"messages": TURNS}) == (
        "START user NL one END START assistant NL <two> <_> <three> <END> "
        "START user NL four END START assistant NL <think> <_> <five> <END>"
    )
    assert "<think> <_> <two>" in marked(chats, "forgetful", {"messages": TURNS[:2]})


def test_only_the_last_turn_is_learned_if_that_is_asked_for(chats):
    assert "<two>" not in marked(chats, "tagged", {"messages": TURNS}, learn="last")
    assert "<five> <END>" in marked(chats, "tagged", {"messages": TURNS}, learn="last")


def test_each_turn_can_be_a_sample_behind_what_the_model_is_given_before_it(chats):
    assert marked(chats, "forgetful", {"messages": TURNS}, each_turn=True) == (
        "START user NL one END START assistant NL <think> <_> <two> <_> <three> <END> | "
        "START user NL one END START assistant NL two _ three END "
        "START user NL four END START assistant NL <think> <_> <five> <END>"
    )


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_a_turn_that_is_marked_as_not_to_be_learned_is_not(chats, mark):
    turns = [TURNS[0], {**TURNS[1], **mark}, TURNS[2], {**TURNS[3], "weight": 1}]
    text = marked(chats, "tagged", {"messages": turns})
    assert "two _ three END" in text and "<five> <END>" in text


def test_text_is_learned_whole_with_the_end(chats):
    assert marked(chats, "no", {"text": "one two"}) == "<one> <_> <two> <END>"


def test_of_prompt_and_completion_the_completion_and_the_end_are_learned(chats):
    record = {"prompt": "one two", "completion": " three"}
    assert marked(chats, "no", record) == "one _ two <_> <three> <END>"
    record = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    assert marked(chats, "smollm2", record).endswith(
        "START assistant NL <two> <_> <three> <END> NL"
    )


def test_alpaca_is_a_conversation_if_there_is_a_template_else_its_own_prompt(chats):
    record = {"instruction": "one", "input": "two", "output": "three"}
    assert marked(chats, "tagged", record) == (
        "START user NL one NL NL two END NL START assistant NL <three> <END> NL"
    )
    text = marked(chats, "no", record)
    assert "# # # _ Instruction : NL one NL NL # # # _ Input : NL two NL NL" in text
    assert text.endswith("# # # _ Response : NL <three> <END>")
    assert "Input" not in marked(chats, "no", {**record, "input": "", "history": []})
    with pytest.raises(DataError, match="its history would be left out"):
        marked(chats, "no", {**record, "history": [["one", "two"]]})


def test_sharegpt_has_its_role_names_mapped(chats):
    turns = [("system", "one"), ("human", "two"), ("gpt", "three"), ("tool", "four")]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    assert marked(chats, "tagged", record) == (
        "START system NL one END NL START user NL two END NL "
        "START assistant NL <three> <END> NL START tool NL four END NL"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TURNS[:1]}, "no token of it carries loss"),
        ({"messages": "one"}, "no list of messages in messages"),
        ({"messages": [{"content": "one"}]}, "message 1 of messages has no role"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "has a content that is a int",
        ),
        ({"messages": [{"role": "user"}]}, "message 1 of messages has no content"),
        (
            {"conversations": [{"from": "Bob", "value": "x"}]},
            "message 1 is from Bob, which the",
        ),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            "message 1 .*has no content",
        ),
        (
            {"conversations": [{"from": ["gpt"], "value": "x"}]},
            "message 1 .*has no role",
        ),
        ({"instruction": "one", "output": "two", "history": ["one"]}, "no list of pairs"),
        ({"prompt": "one", "completion": "two", "system": "three"}, "its system would be left out"),
        (
            {"messages": [{"role": "system", "content": "one"}, *TURNS], "system": "two"},
            "two texts",
        ),
        ({"prompt": TURNS[:2], "completion": TURNS[3:]}, "would continue the assistant's turn"),
        ({"prompt": "one", "completion": None}, "no string in completion but null"),
        ({"prompt": "one", "completion": " "}, "completion is empty"),
        ({"instruction": "one", "output": ""}, "output is empty"),
        ({"text": 5}, "no string in data.text_field=text but int"),
        ([{"text": "a"}], "if the file is an array of records, end its name with .json$"),
        ({"text": "a\0b"}, "NUL character at 1"),
        ({"text": "a\ud800b"}, r"half a character \(U\+D800\) at 1"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": "a\0"}]}, "NUL character"),
        ({"messages": [*TURNS[:1], HALF]}, r"half a character \(U\+D83D\)"),
        ({"body": "one"}, "nor any of messages, .*the record has: body"),
        ({"text": "one", "messages": TURNS}, "fits text and messages; .*data.format=messages"),
        (
            {f"id{n}": {"text": "a"} for n in range(30)},
            "id19 and 10 more; if its values are the rec",
        ),
        ({"prompt": {"0": "a"}, "completion": {"0": "b"}}, "a record for each of its values"),
        (["one"], "the record is a list; write objects"),
        (TURNS, "the record is a list; write an object with its turns"),
        ({"id;text": "0;one"}, "the record has: id;text; columns of a .csv are separated by comm"),
        (
            {"dialog": [{"who": "a", "said": "b"}] * 2},
            "if dialog holds turns, which have who, said, write data.columns.messages=dialog "
            "data.columns.role=ITS_KEY data.columns.content=ITS_KEY; if records, write that list",
        ),
        ({"dialog": TURNS}, "say where its turns are: data.columns.messages=dialog"),
        ({"TEXT": "a", "id": 1}, "write data.text_field=TEXT$"),
        ({"story": "a"}, "write data.text_field=story$"),
        (
            {"prompt": "a"},
            "write its completion too, or for texts alone data.text_field=prompt data.format=text$",
        ),
        (
            {"question": "a", "answer": "b", "id": 1},
            r"data.columns.prompt=question data.columns.completion=answer$",
        ),
        ({"prompt": "a", "response ": "b"}, "write 'data.columns.completion=\"response \"'$"),
        (
            {"instruction": "a", "context": "", "response": "b"},
            "write data.columns.output=response data.columns.input=context$",
        ),
        ({"input_ids": [1], "labels": [1]}, "tokens are made here, .*: bring the texts"),
        ({"text": b"a\xff"}, "text is not UTF-8 at byte 1"),
        ({"text": ["a"]}, "but list; the record has: text; write a record for each"),
        ({"translation": {"en": "a"}}, "write what is in translation as columns"),
        ({"hello world": "a text"}, "a .csv has the names of its columns in its first row"),
        ("a text", "the record is a str; write objects: "),
        ({"data": [{"text": "a"}, {"text": "b"}]}, "write the list data alone, an array of rec"),
    ],
)
def test_what_is_no_document_is_named_with_its_location_and_the_fix(chats, record, message):
    with pytest.raises(DataError, match=f"^a.jsonl:1: .*{message}"):
        marked(chats, "smollm2", record)


def test_a_conversation_without_a_template_is_refused(chats):
    with pytest.raises(DataError, match="no has no chat template"):
        marked(chats, "no", {"messages": TURNS})


@pytest.mark.parametrize(
    "record", [{"text": " \n"}, {"messages": []}, {"conversations": []}, {"text": ""}]
)
def test_what_is_empty_is_no_document(chats, record):
    assert documents(record, chats[0]["smollm2"]) == []


def test_tools_and_calls_reach_the_template(chats, tmp_path):
    template = "{{ tools | length }}{% for m in messages %}{{ m.role + m.content }}" \
        "{% if m.tool_calls %}{% generation %}{{ m.tool_calls[0].function.name }}" \
        "{% endgeneration %}{% endif %}{{ '<end>' }}{% endfor %}"  # fmt: skip
    chat = chats[0]["tagged"]
    other = Chat(chat.model_folder)
    assert other.template
    other._tokenizer.chat_template = template
    call = {"function": {"name": "five", "arguments": {}}}
    record = {
        "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([{"type": "function", "function": {"name": "five"}}]),
    }
    [document] = documents(record, other)
    assert [document.text[a:b] for a, b in document.learned] == ["five"]
    assert document.text == "1userone<end>assistantfive<end>"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAGE = Path(__file__).resolve().parents[2] / "doc" / "formats.md"
EXAMPLES = re.findall(
    r"## (\w+)\n\n```json\n(.*?)\n```\n```text\n(.*?)\n```", PAGE.read_text(), re.S
)


def test_the_page_has_an_example_of_each_format():
    assert {name for name, _, _ in EXAMPLES} == {"text", *formats.BUILDERS}


@pytest.mark.parametrize(("name", "record", "expected"), EXAMPLES)
def test_an_example_of_the_page_gives_what_the_page_says(chats, name, record, expected):
    chat = Chat(chats[0]["smollm2"].model_folder)
    assert chat.template
    chat._tokenizer.chat_template = CHATML
    record = json.loads(record)
    assert columns.recognise("a", record, section()) == name
    [document] = documents(record, chat)
    text, end = document.text, "" if document.is_rendered else "<|endoftext|>"
    ranges = [(0, len(text))] if document.learned is None else document.learned
    for first, last in reversed(ranges):
        more = end if last == len(text) else ""
        text = f"{text[:first]}[[{text[first:last]}{more}]]{text[last:]}"
    assert text.rstrip("\n") == expected


@pytest.mark.parametrize("who", ["role", "from"])
def test_the_names_of_roles_may_be_the_datas_own(chats, who):
    said = "content" if who == "role" else "value"
    turns = [
        {who: {"user": "Client", "assistant": "me"}[turn["role"]], said: turn["content"]}
        for turn in TURNS[:2]
    ]
    column = "messages" if who == "role" else "conversations"
    columns = {"user": "Client", "assistant": "me", "tool": "nobody"}
    template = next(iter(chats[0]))
    expected = marked(chats, template, {"messages": TURNS[:2]})
    assert marked(chats, template, {column: turns}, columns=columns) == expected


def test_a_column_that_no_format_has_is_refused_with_the_nearest():
    columns.check_columns(section(columns={"messages": "x", "role": "y", "user": "z", "text": "t"}))
    with pytest.raises(ConfigError, match="no format has mesages, did you mean messages"):
        columns.check_columns(section(columns={"mesages": "dialogue"}))
    with pytest.raises(ConfigError, match=r"data.columns.nonsense=foo: no format has nonsense; w"):
        columns.check_columns(section(columns={"messages": "x", "nonsense": "foo"}))
    with pytest.raises(ConfigError, match="; write data.columns.prompt=question in its place"):
        columns.check_columns(section(columns={"question": "prompt"}))


@pytest.mark.parametrize(
    ("others", "told"),
    [(["expert"], "user=expert"), (["user", "expert"], "assistant=expert")],
)
def test_a_role_that_nobody_knows_comes_with_a_setting_that_fits_the_others(others, told):
    turns = [{"role": role, "content": "one"} for role in others]
    with pytest.raises(DataError, match=f"who each is, such as data.columns.{told}"):
        check_roles("a:1", turns, "")


@pytest.mark.parametrize("own", ["response", "answers"])
def test_a_mapping_to_a_column_that_is_not_there_is_named(own):
    mapped = section(columns={"completion": own, "system": "setup"})
    record = {"prompt": "q", "response ": "a"}
    match = rf"a:1: data.columns.completion={own}, but the record has: prompt, 'response '"
    with pytest.raises(DataError, match=match):
        columns.recognise("a:1", record, mapped)


@pytest.mark.parametrize(("form", "record", "fix"), [
    ("auto", {"prompt": "a", "completion": "b"}, "this is prompt_completion, the first record is"),
    ("text", {"prompt": "a", "completion": "b"}, "write data.format=prompt_completion$"),
    ("messages", {"text": "a"}, "write data.format=text$"),
    ("prompt_completion", {"prompt": "a", "answer": "b"}, "data.columns.completion=answer$"),
])  # fmt: skip
def test_a_record_of_another_format_is_named_with_what_it_is(chats, form, record, fix):
    name = "text" if form == "auto" else form
    with pytest.raises(DataError, match=f"^a:1: no .*{fix}"):
        formats.to_documents("a:1", record, name, section(format=form), chats[0]["smollm2"])


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_a_blank_system_column_is_as_if_it_were_not_there(chats, system):
    record = {"messages": TURNS}
    assert marked(chats, "tagged", {**record, "system": system}) == marked(chats, "tagged", record)
