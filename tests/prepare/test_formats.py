"""What of a record is learned: token by token, for each format and three kinds of chat template."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from trainstack.config.schema import DataSection
from trainstack.errors import DataError
from trainstack.prepare import formats, tokenizer
from trainstack.prepare.chat import Chat

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
    assert formats.BUILDERS.keys() == formats.COLUMNS.keys()


def marked(chats, template: str, record: dict, name: str | None = None) -> str:
    """The tokens of a record's document joined; learned ones between < and >, runs together."""
    made, words_tokenizer = chats
    name = name or formats.recognise("a.jsonl:1", record, "text")
    document = formats.to_document("a.jsonl:1", record, name, "text", made[template])
    end_id = words_tokenizer.token_to_id(END)
    [(_, ids, flags)] = tokenizer.encode(words_tokenizer, end_id, [document])
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
        "START assistant NL <two> <_> <three> <END> <NL> "
        "START user NL four END NL START assistant NL <five> <END> <NL>"
    )


def test_a_template_with_generation_tags_says_itself_what_is_learned(chats):
    assert marked(chats, "tagged", {"messages": TURNS}) == (
        "START user NL one END NL START assistant NL <two> <_> <three> <END> NL "
        "START user NL four END NL START assistant NL <five> <END> NL"
    )


def test_the_mask_of_a_tagged_template_is_the_one_of_transformers(chats):
    made, words_tokenizer = chats
    document = formats.to_document("a", {"messages": TURNS}, "messages", "text", made["tagged"])
    [(_, ids, flags)] = tokenizer.encode(words_tokenizer, 0, [document])
    theirs = made["tagged"]._tokenizer.apply_chat_template(
        TURNS, return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids.tolist() == theirs["input_ids"]
    assert flags.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]


def test_a_template_without_an_invitation_learns_what_the_turn_adds(chats):
    assert marked(chats, "plain", {"messages": TURNS}) == (
        "Q _ one _ A <_> <two> <_> <three> <END> Q _ four _ A <_> <five> <END>"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(chats):
    with pytest.raises(DataError, match=r"a.jsonl:1: .*writes turn 2 differently.*generation"):
        marked(chats, "forgetful", {"messages": TURNS})
    assert "<think> <_> <two>" in marked(chats, "forgetful", {"messages": TURNS[:2]})


def test_text_is_learned_whole_with_the_end(chats):
    assert marked(chats, "no", {"text": "one two"}) == "<one> <_> <two> <END>"


def test_of_prompt_and_completion_the_completion_and_the_end_are_learned(chats):
    record = {"prompt": "one two", "completion": " three"}
    assert marked(chats, "no", record) == "one _ two <_> <three> <END>"
    record = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    assert marked(chats, "smollm2", record).endswith(
        "START assistant NL <two> <_> <three> <END> <NL>"
    )


def test_alpaca_is_a_conversation_if_there_is_a_template_else_its_own_prompt(chats):
    record = {"instruction": "one", "input": "two", "output": "three"}
    assert marked(chats, "tagged", record) == (
        "START user NL one NL NL two END NL START assistant NL <three> <END> NL"
    )
    text = marked(chats, "no", record)
    assert "# # # _ Instruction : NL one NL NL # # # _ Input : NL two NL NL" in text
    assert text.endswith("# # # _ Response : NL <three> <END>")
    assert "Input" not in marked(chats, "no", {**record, "input": ""})


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
        ({"messages": [{"role": "user", "content": 5}]}, "content of message 1 is a int"),
        ({"messages": [{"role": "user"}]}, "chat template cannot write it .*content"),
        ({"messages": TURNS[1:2]}, "begins with the assistant's turn"),
        ({"conversations": [{"from": "Bob", "value": "x"}]}, "turn 1 is from 'Bob'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "no string in value but null"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"turn 1 is from \['gpt'\]"),
        ({"instruction": "one", "output": "two", "history": ["one"]}, "no list of pairs"),
        ({"prompt": "one", "completion": None}, "no string in completion but null"),
        ({"prompt": "one", "completion": " "}, "completion is empty"),
        ({"instruction": "one", "output": ""}, "output is empty"),
        ({"text": 5}, "no string in data.text_field=text but int"),
        ({"text": "a\0b"}, "NUL character at 1"),
        ({"text": "a\ud800b"}, r"half a character \(U\+D800\) at 1"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": "a\0"}]}, "NUL character"),
        ({"body": "one"}, "nor any of messages, .*the record has: body"),
        ({"text": "one", "messages": TURNS}, "fits text and messages; .*data.format=messages"),
        (["one"], "the record is a list"),
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
    name = formats.recognise("a", record, "text")
    assert formats.to_document("a", record, name, "text", chats[0]["smollm2"]) is None


def test_tools_and_calls_reach_the_template(chats, tmp_path):
    template = "{{ tools | length }}{% for m in messages %}{{ m.role }}{% if m.tool_calls %}" \
        "{% generation %}{{ m.tool_calls[0].function.name }}{% endgeneration %}{% endif %}" \
        "{% endfor %}"  # fmt: skip
    chat = chats[0]["tagged"]
    other = Chat(chat.model_folder)
    assert other.template
    other._tokenizer.chat_template = template
    call = {"function": {"name": "five", "arguments": {}}}
    record = {
        "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([{"type": "function", "function": {"name": "five"}}]),
    }
    document = formats.to_document("a", record, "messages", "text", other)
    [segment] = document.segments
    assert [segment.text[a:b] for a, b in segment.learned] == ["five"]
    assert segment.text.startswith("1user")


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE as GPT-2's, trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([Path(__file__).read_text()], trainer)
    return made


@pytest.mark.parametrize("text", [Path(__file__).read_text(), "a  b \n\n c\n" * 900, "x" * 9000])
def test_a_long_text_is_tokenised_in_parts_as_the_whole_would_be(monkeypatch, byte_level, text):
    monkeypatch.setattr(tokenizer, "LONG_TEXT", 2000)
    whole = byte_level.encode(text, add_special_tokens=False).ids
    assert tokenizer.long_ids(byte_level, text).tolist() == whole
    is_cut = tokenizer.safe_cut(byte_level, text, 0, 2000) is not None
    assert is_cut == ("\n" in text), "a text of one word stays whole"
    document = formats.Document("a", (formats.Segment(text, None),), True)
    [(_, ids, flags)] = tokenizer.encode(byte_level, 7, [document])
    assert ids.tolist() == [*whole, 7]
    assert flags is None
