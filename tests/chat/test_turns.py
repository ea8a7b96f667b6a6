"""What of a conversation is learned, with templates that write it in the ways that real ones do.

tests/chat/test_real_templates.py does the same with the templates of released models.
"""

import json

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from trainstack.chat.checks import check_roles
from trainstack.chat.template import Chat
from trainstack.errors import ConfigError, DataError

HEAD = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "chatml": HEAD + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "last turn ends otherwise": HEAD + "<|{{ m.role }}|>\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|end|>\n{% endif %}" + ASK,
    "empty thoughts in the last turn": HEAD + "<|{{ m.role }}|>\n{% if loop.last and m.role == "
    "'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n" + ASK,
    "prompt opens a thought": HEAD + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
    "drops thoughts": HEAD + "<|{{ m.role }}|>\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|end|>\n"
    + ASK,
    "next role ends": HEAD + "<|{{ m.role }}|>\n{{ m.content }}" + ASK,
    "no tag at all": HEAD + "{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "no invitation": HEAD + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}",
    "system in the last question": "{% if messages[0].role == 'system' %}{% set s = "
    "messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}" + HEAD
    + "{% if m.role == 'user' %}[INST] {% if s is defined and not messages[loop.index0 + 1:] | "
    "selectattr('role', 'equalto', 'user') | list %}{{ s }}{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "two tokens end": HEAD + "<|start|>{{ m.role }}<|text|>{{ m.content }}<|stop|><|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|text|>{% endif %}",
}  # fmt: skip
ALWAYS = HEAD + "[SOT]{{ m.role }}[EOH]\n\n{{ m.content }}<|eot|>{% endfor %}[SOT]assistant[EOH]\n"
TEMPLATES["invites unasked"] = ALWAYS + "{{ '\\n' }}"
TEMPLATES["invites unasked, a line short"] = "<|begin|>" + ALWAYS + "\n"  # Jinja takes the last one
TWO_ROUNDS = [
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "user"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def chat_with(tmp_path_factory):
    """Makes a Chat of a template."""
    bytes_only = tiny.byte_tokenizer()

    def make(template: str, **options) -> Chat:
        folder = tmp_path_factory.mktemp("model")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return Chat(folder, **options)

    return make


def learned(chat: Chat, messages: list[dict], tools=None, **options) -> list[str]:
    rendered = chat.render("a:1", messages, tools, **options)
    return [rendered.text[first:last] for first, last in rendered.learned]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["user<|im_end|>", "4<|im_end|>"]),
        ("last turn ends otherwise", ["user<|end|>", "4</s>"]),
        ("empty thoughts in the last turn", ["user<|end|>", "<think>\n\n</think>\n\n4<|end|>"]),
        ("prompt opens a thought", ["user<|end|>", "4<|end|>"]),
        ("drops thoughts", ["user<|end|>", "4<|end|>"]),
        ("next role ends", ["user<|user|>", "4<|user|>"]),
        ("no tag at all", [" user\n\nUser:", " 4\n\nUser:"]),
        ("no invitation", [" user</s>", " 4</s>"]),
        ("system in the last question", [" user</s>", " 4</s>"]),
        ("invites unasked", ["user<|eot|>", "4<|eot|>"]),
        ("invites unasked, a line short", ["\nuser<|eot|>", "\n4<|eot|>"]),
        ("two tokens end", ["user<|stop|><|end|>", "4<|stop|><|end|>"]),
    ],
)
def test_a_turn_is_what_follows_the_generation_prompt_up_to_what_ends_it(chat_with, name, expected):
    assert learned(chat_with(TEMPLATES[name]), TWO_ROUNDS) == expected


def test_what_a_template_invites_with_unasked_is_its_generation_prompt(chat_with):
    assert chat_with(TEMPLATES["invites unasked"]).generation_prompt() == "[SOT]assistant[EOH]\n\n"
    assert chat_with(TEMPLATES["no invitation"]).generation_prompt() == ""


def test_a_system_turn_that_moves_into_a_later_one_is_in_the_text_and_not_learned(chat_with):
    chat = chat_with(TEMPLATES["system in the last question"])
    messages = [{"role": "system", "content": "Be brief."}, *TWO_ROUNDS]
    assert learned(chat, messages) == [" user</s>", " 4</s>"]
    rendered = chat.render("a:1", messages, None)
    assert rendered.text.count("Be brief.") == 1
    # At inference the first answer is asked for behind it.
    assert rendered.remarks == {"moved_turns": 1}
    assert chat.render("a:1", TWO_ROUNDS, None).remarks == {}
    asked = chat.render("a:1", messages, None, learned=[2], is_asked=True)
    assert asked.text == "[INST] Be brief.\n\n4 [/INST] user</s>" and asked.remarks == {}


THOUGHTS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\ntwo"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "<think>\nthen\n</think>\n\nfour"},
]


def test_thoughts_that_a_template_drops_from_earlier_rounds_are_counted(chat_with):
    chat = chat_with(TEMPLATES["drops thoughts"])
    assert learned(chat, THOUGHTS) == ["two<|end|>", "<think>\nthen\n</think>\n\nfour<|end|>"]
    assert chat.render("a:1", THOUGHTS, None).remarks == {"dropped_thoughts": 1}
    assert learned(chat, THOUGHTS, learned=[1], is_asked=True) == [
        "<think>\nfirst\n</think>\n\ntwo<|end|>"
    ]


def test_thoughts_that_a_template_drops_from_the_last_round_are_an_error(chat_with):
    chat = chat_with(TEMPLATES["drops thoughts"].replace(" and not loop.last", ""))
    with pytest.raises(DataError, match=r"^a:1: .*drops thoughts of message 4 \(then\)"):
        learned(chat, THOUGHTS)


def test_a_text_that_a_template_drops_or_changes_is_named(chat_with):
    silent = HEAD + "{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}" \
        "{% endfor %}"  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, *TWO_ROUNDS]
    with pytest.raises(DataError, match=r"drops text of message 1 \(Be brief.\)"):
        learned(chat_with(silent), messages)
    louder = TEMPLATES["chatml"].replace("m.content | trim", "m.content | upper")
    with pytest.raises(DataError, match=r"drops text of message 2 \(user\)"):
        learned(chat_with(louder), TWO_ROUNDS[:2])


def test_turns_whose_rendering_lacks_the_generation_prompt_are_counted(chat_with):
    chat = chat_with(TEMPLATES["prompt opens a thought"])
    assert chat.render("a:1", TWO_ROUNDS, None).remarks == {"unasked_turns": 2}
    asked = chat.render("a:1", TWO_ROUNDS, None, is_asked=True)
    assert asked.text.endswith("<|assistant|>\n<think>\n4<|end|>") and asked.remarks == {}


def test_a_text_with_the_signs_that_mark_texts_is_rendered_all_the_same(chat_with):
    messages = [TWO_ROUNDS[0], {"role": "assistant", "content": "\U00030000 five"}]
    assert learned(chat_with(TEMPLATES["chatml"]), messages) == ["\U00030000 five<|im_end|>"]


def test_a_template_that_compares_a_text_still_sees_it(chat_with):
    picky = TEMPLATES["chatml"].replace(
        "{{ m.content | trim }}", "{% if m.content == 'yes' %}{{ '<sure/>' }}{% endif %}"
        "{{ m.content | trim }}",
    )  # fmt: skip
    messages = [TWO_ROUNDS[0], {"role": "assistant", "content": "yes"}, *TWO_ROUNDS[2:]]
    assert learned(chat_with(picky), messages) == ["<sure/>yes<|im_end|>", "4<|im_end|>"]
    with pytest.raises(DataError, match=r"text of message 2 \(user\), which stands there more"):
        learned(chat_with(picky.replace("yes", "user")), TWO_ROUNDS)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "n": 7}}}
CALLS = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "wind"},
    {"role": "assistant", "content": "It rains."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLING = (
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}" + HEAD + "<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}END"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Bern", "n": 7}'),
        ("{{ c.function.arguments | string }}", '{"city": "Bern", "n": 7}'),
        ("{{ c.function.arguments + '' }}", '{"city": "Bern", "n": 7}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
         "city=Bern;n=7;"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["<|end|>", ""])
def test_tool_calls_are_learned_with_their_end_however_a_template_reads_them(
    chat_with, way, arguments, end
):
    chat = chat_with(CALLING.replace("ARGUMENTS", way).replace("END", end))
    call = f"<call>weather {arguments}</call>"
    ends = (end, end) if end else ("<|tool|>", "<|user|>")
    assert learned(chat, CALLS, TOOLS) == [call + call + ends[0], "It rains." + ends[1]]


def test_a_call_without_arguments_is_learned(chat_with):
    chat = chat_with(CALLING.replace("ARGUMENTS", "").replace("END", "<|end|>"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [CALLS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert learned(chat, messages, TOOLS) == ["<call>weather </call><|end|>"]


def test_a_dropped_argument_is_an_error_and_ignored_tools_are_counted(chat_with):
    chat = chat_with(CALLING.replace("ARGUMENTS", "").replace("END", "<|end|>"))
    with pytest.raises(DataError, match="drops a tool call's argument of message 2 .Bern"):
        learned(chat, CALLS, TOOLS)
    told = CALLING.replace("ARGUMENTS", "{{ c.function.arguments }}").replace("END", "<|end|>")
    assert chat_with(told).render("a:1", CALLS, TOOLS).remarks == {}
    deaf = chat_with(told[told.index("{% endfor %}") + len("{% endfor %}") :])
    assert deaf.render("a:1", CALLS, TOOLS).remarks == {"ignored_tools": 1}, "though calls name it"
    blind = chat_with(TEMPLATES["chatml"])
    assert blind.render("a:1", TWO_ROUNDS, TOOLS).remarks == {"ignored_tools": 1}


@pytest.mark.parametrize("value", [3, 2.5, True, [1, 2], {"deep": 7}])
@pytest.mark.parametrize(("written", "is_kept"), [
    ("{{ v | tojson }}", True), ("{{ v }}", True), ("{{ v if v is string }}", False),
    ("{{ v if v is string or v is mapping }}", None),
])  # fmt: skip
def test_an_argument_that_is_no_text_is_proved_too(chat_with, value, written, is_kept):
    items = "{% for k, v in c.function.arguments.items() %}{{ k }}=" + written + "{% endfor %}"
    chat = chat_with(CALLING.replace("ARGUMENTS", items).replace("END", "<|end|>"))
    call = {"function": {"name": "move", "arguments": {"steps": value}}}
    messages = [CALLS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    if is_kept or (is_kept is None and isinstance(value, dict)):
        (said,) = learned(chat, messages)
        assert "steps=" in said
        return
    with pytest.raises(DataError, match="drops .* of a tool call of message 2"):
        learned(chat, messages)


def test_calls_without_their_name_are_counted(chat_with):
    template = CALLING.replace("{{ c.function.name }} ", "").replace("END", "<|end|>")
    chat = chat_with(template.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"))
    assert chat.render("a:1", CALLS, None).remarks == {"unnamed_calls": 2}


def test_an_empty_turn_is_not_learned(chat_with):
    messages = [TWO_ROUNDS[0], {"role": "assistant", "content": " "}, *TWO_ROUNDS[2:]]
    assert learned(chat_with(TEMPLATES["chatml"]), messages) == ["4<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant(chat_with):
    first = "{% if messages[0].role == 'x' %}{% endif %}"  # as many templates look at it
    chat = chat_with(first + TEMPLATES["chatml"])
    assert learned(chat, TWO_ROUNDS[1:]) == ["user<|im_end|>", "4<|im_end|>"]


def test_two_turns_of_the_assistant_in_a_row_are_both_learned_without_a_header(chat_with):
    messages = [TWO_ROUNDS[0], TWO_ROUNDS[1], TWO_ROUNDS[3]]
    assert learned(chat_with(TEMPLATES["chatml"]), messages) == ["user<|im_end|>", "4<|im_end|>"]


def test_a_developer_is_a_system_where_the_template_knows_no_developer(chat_with):
    strict = "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('who?') }}" \
        "{% endif %}{% endfor %}"  # fmt: skip
    messages = [{"role": "developer", "content": "Be brief."}, *TWO_ROUNDS]
    text = chat_with(strict + TEMPLATES["chatml"]).render("a:1", messages, None).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_conversation_is_written_alike_whatever_came_before_it(chat_with):
    picky = "{% if tools is not none %}Tools: {{ tools }}\n{% elif messages[0].content == 'x' %}" \
        "{{ raise_exception('no tools') }}{% endif %}"  # fmt: skip
    chat = chat_with(picky + TEMPLATES["chatml"])
    before = chat.render("a:1", TWO_ROUNDS, None)
    assert (
        "Tools" in chat.render("a:2", [{"role": "user", "content": "x"}, TWO_ROUNDS[1]], None).text
    )
    assert chat.render("a:3", TWO_ROUNDS, None) == before


def test_what_a_template_refuses_is_told_in_its_own_words(chat_with):
    refusing = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"^a:1: .*\(System role not supported\)"):
        learned(chat_with(refusing), TWO_ROUNDS)


def test_a_template_is_told_the_date_of_the_settings(chat_with):
    chat = chat_with("{{ strftime_now('%d %b %Y') }}\n" + TEMPLATES["chatml"], date="2026-01-31")
    assert chat.render("a:1", TWO_ROUNDS, None).text.startswith("31 Jan 2026\n")


def test_a_template_of_a_file_takes_the_place_of_the_models(chat_with, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATES["next role ends"])
    chat = chat_with(TEMPLATES["chatml"], file=file)
    assert learned(chat, TWO_ROUNDS) == ["user<|user|>", "4<|user|>"]


def test_of_named_templates_the_one_for_tools_is_taken_where_there_are_tools(chat_with):
    chat = chat_with(TEMPLATES["chatml"])
    chat.load()
    chat._tokenizer.chat_template = {
        "default": TEMPLATES["chatml"],
        "tool_use": CALLING.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}").replace(
            "END", "<|end|>"
        ),
    }
    assert learned(chat, TWO_ROUNDS) == ["user<|im_end|>", "4<|im_end|>"]
    assert learned(chat, json.loads(json.dumps(CALLS)), TOOLS)[1] == "It rains.<|end|>"


def test_what_people_wrote_is_known_to_the_character(chat_with):
    rendered = chat_with(TEMPLATES["chatml"]).render("a:1", TWO_ROUNDS, None)
    assert [rendered.text[a:b] for a, b in rendered.written] == ["4", "user", "user", "4"]


@pytest.mark.parametrize("role", ["client", "Guide", "a b"])
def test_a_role_that_the_template_does_not_name_is_an_error(role):
    messages = [{"role": role, "content": "one"}, {"role": "bard", "content": "two"}]
    match = f"a:1: message 1 is from {role}, message 2 is from bard, which the chat template"
    with pytest.raises(DataError, match=match):
        check_roles("a:1", messages, TEMPLATES["chatml"])
    named = TEMPLATES["chatml"].replace("{{ m.role }}", "{{ m.role if m.role != 'ROLE' else 5 }}")
    check_roles("a:1", [messages[0], TWO_ROUNDS[1]], named.replace("ROLE", role))


def test_turns_that_begin_otherwise_than_the_last_are_counted(chat_with):
    empty = "{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content | trim }}"
    chat = chat_with(TEMPLATES["chatml"].replace("{{ m.content | trim }}", empty))
    assert chat.render("a:1", TWO_ROUNDS, None).remarks == {"uneven_turns": 1}
    assert chat.render("a:1", TWO_ROUNDS, None, is_asked=True).remarks == {}
    assert chat.render("a:1", TWO_ROUNDS[:2], None).remarks == {}


@pytest.mark.parametrize("text", ["True", "Four"])
def test_a_text_that_a_template_writes_small_is_dropped_whatever_it_says(chat_with, text):
    lower = TEMPLATES["chatml"].replace("{{ m.content | trim }}", "{{ m.content | trim | lower }}")
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": text}]
    with pytest.raises(DataError, match=f"drops text of message 2 .{text}"):
        learned(chat_with(lower), messages)


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
)
THINKS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize("asks", ["", THINKS])
def test_a_first_turn_of_the_assistant_comes_behind_the_templates_own_system_turn(chat_with, asks):
    template = DEFAULT_SYSTEM + TEMPLATES["chatml"]
    if asks:
        template = template[: template.index("{% if add_generation")] + asks
    messages = [{"role": "assistant", "content": "Welcome!"}, *TWO_ROUNDS]
    made = chat_with(template).render("a:1", messages, None, learned=[0], is_asked=True)
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"
    opened = "<think>\n" if asks else ""
    assert made.text == head + opened + "Welcome!<|im_end|>"
    assert [made.text[a:b] for a, b in made.learned] == ["Welcome!<|im_end|>"]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_template_that_is_no_jinja_is_named_with_its_line(chat_with, tmp_path, is_own):
    odd = TEMPLATES["chatml"].replace("{{ m.role }}", "\n{{ m.role }")
    (tmp_path / "odd.jinja").write_text(odd)
    template, file = (odd, None) if is_own else (TEMPLATES["chatml"], tmp_path / "odd.jinja")
    chat = chat_with(template, file=file)
    who = "the model's chat template" if is_own else f"data.chat_template={file}"
    with pytest.raises(ConfigError, match=f"^{who}: line 2 is no Jinja .*; correct it$"):
        chat.load()


def test_a_template_copied_with_the_escapes_of_json_is_told_what_it_is(chat_with, tmp_path):
    (tmp_path / "own.jinja").write_text(json.dumps(TEMPLATES["chatml"] + '{{ "" }}'))
    with pytest.raises(ConfigError, match="is no Jinja .*; it looks like JSON, such as"):
        chat_with(TEMPLATES["chatml"], file=tmp_path / "own.jinja").load()


def test_white_space_of_a_person_makes_no_turn_begin_otherwise(chat_with):
    chat = chat_with(TEMPLATES["chatml"].replace(" | trim", ""))
    spaced = [TWO_ROUNDS[0], {"role": "assistant", "content": " one"}, *TWO_ROUNDS[2:]]
    assert chat.render("a:1", spaced, None).remarks == {}


@pytest.mark.parametrize(("reads", "content", "is_stray"), [
    (False, "hm</think>4", True), (False, "<think>hm</think>4", False), (False, "4", False),
    (True, "hm</think>4", False),
])  # fmt: skip
def test_turns_that_close_a_thought_that_nothing_opens_are_counted(
    chat_with, reads, content, is_stray
):
    """As the answer of a model whose generation prompt opens the thought."""
    said = (
        "{{ m.content if '</think>' in m.content or m.role == 'user' else '</think>' + m.content }}"
    )
    said = said if reads else said.replace("'</think>' in", "'<think>' in")
    opened = "{{ '<think>' if m.role == 'assistant' and '<think>' not in m.content }}"
    template = TEMPLATES["chatml"].replace("{{ m.content | trim }}", opened + said)
    template = template.replace("assistant\\n'", "assistant\\n<think>'")
    messages = [TWO_ROUNDS[0], {"role": "assistant", "content": content}]
    remarks = chat_with(template).render("a:1", messages, None).remarks
    assert remarks.get("stray_ends", 0) == is_stray


@pytest.mark.parametrize(("thought", "uneven"), [("loop.last", 1), ("m.role == 'assistant'", 0)])
def test_calls_that_begin_without_the_empty_thought_of_inference_are_counted(
    chat_with, thought, uneven
):
    """As Qwen3 writes one in front of the last turn alone."""
    empty = f"{{{{ '<think></think>' if {thought} and m.role == 'assistant' }}}}"
    template = CALLING.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
    template = template.replace("END", "<|end|>").replace(
        "{{ m.content }}", empty + "{{ m.content }}"
    )
    remarks = chat_with(template).render("a:1", json.loads(json.dumps(CALLS)), TOOLS).remarks
    assert remarks.get("uneven_turns", 0) == uneven
