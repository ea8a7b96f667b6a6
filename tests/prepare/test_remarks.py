"""What cannot be learned as it is meant is told with a count, by prepare and by the report."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

import tiny
from trainstack.data import report
from trainstack.prepare import prepare
from trainstack.storage import layout

UNKNOWN = "<unk>"
JOINED = r"\s*\n+|[^\s]+|\s"  # ends of lines are one token
GPT_2 = r"\s+(?!\S)|\s+|[^\s]+"  # but for the last, which is before what follows
TEXT = "one two three 2023 650841823 one\n\ntwo\n\nthree\n"


def words():
    """A word-level tokenizer, as of tiny's models, with a token for what it does not know."""
    vocabulary = {tiny.END: 0, UNKNOWN: 1, **{word: i for i, word in enumerate(tiny.WORDS, 2)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def lines(pattern: str = JOINED):
    """A byte-level tokenizer that joins the ends of lines."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([f"{TEXT}\n"] * 9, trainer)
    return made


def lines_from(home, capsys, made, records: dict[str, list], *overrides: str, **settings):
    """What prepare and the report say of records, by file, with that tokenizer."""
    made.add_special_tokens([AddedToken(tiny.END, special=True)])
    content = {
        "config.json": json.dumps({**tiny.CONFIG, "vocab_size": made.get_vocab_size()}),
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tiny.END, **settings}
        ),
    }
    tiny.publish(layout.model_folder(home, "m"), content, kind="model", weight_bytes=0)
    texts = {name: "".join(json.dumps(r) + "\n" for r in rs) for name, rs in records.items()}
    splits = {name.partition(".")[0]: [name] for name in records}
    tiny.publish(layout.dataset_folder(home, "d", None), texts, kind="dataset", splits=splits)
    config = tiny.write_config(home, model__name="m", data__name="d")
    arguments = ["--home", str(home), "--config", str(config), *overrides]
    assert prepare.main(arguments) == 0
    told = capsys.readouterr().err.splitlines()
    assert report.main(arguments) == 0
    reported = [x for x in capsys.readouterr().out.splitlines() if x.startswith("remark: ")]
    assert all(any(line.removeprefix("remark: ") in x for x in told) for line in reported)
    return told


def numbered(count: int) -> list[dict]:
    return [{"text": f"{tiny.WORDS[i % 10]} {tiny.WORDS[i // 10]} one"} for i in range(count)]


@pytest.mark.parametrize("text", ["one два two три", "one two"])
def test_tokens_that_the_tokenizer_does_not_know_are_counted(tmp_path, capsys, text):
    records = {"train.jsonl": [{"text": text}] * 30}
    told = lines_from(tmp_path, capsys, words(), records, "data.eval_fraction=0")
    number = 30 * len([word for word in text.split() if word not in tiny.WORDS])
    said = [line for line in told if "for what the tokenizer does not know" in line]
    told_all = [f": {number} tokens are the unknown token" in line for line in said]
    assert told_all == [True] * bool(number)


@pytest.mark.parametrize(("text", "made", "is_changed"), [
    ("one\ntwo three", words, True), ("one two", words, False), ("one\n a\u0301 ", lines, False),
])  # fmt: skip
def test_a_tokenizer_that_changes_texts_is_told(tmp_path, capsys, text, made, is_changed):
    records = {"train.jsonl": [{"text": text}] * 30}
    told = lines_from(tmp_path, capsys, made(), records, "data.eval_fraction=0")
    said = [line for line in told if "its tokenizer changes texts" in line]
    told = [r"('one\ntwo thr' becomes 'one two thr')" in line for line in said]
    assert told == [True] * is_changed


def test_special_tokens_of_a_template_are_no_texts_that_a_tokenizer_changes(tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text(f"{{% for m in messages %}}{{{{ m.content }}}} {tiny.END} {{% endfor %}}")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    records = {"train.jsonl": [{"messages": turns}] * 30}
    options = ("data.eval_fraction=0", f"data.chat_template={template}")
    told = lines_from(tmp_path, capsys, words(), records, *options)
    assert not any("its tokenizer changes texts" in line for line in told)


@pytest.mark.parametrize("said", ["two three", f"two {tiny.END} three"])
def test_conversations_in_which_somebody_wrote_a_special_token_are_counted(tmp_path, capsys, said):
    template = tmp_path / "template.jinja"
    template.write_text(f"{{% for m in messages %}}{{{{ m.content }}}} {tiny.END} {{% endfor %}}")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": said}]
    records = {"train.jsonl": [{"messages": turns}] * 30}
    options = ("data.eval_fraction=0", f"data.chat_template={template}")
    told = lines_from(tmp_path, capsys, lines(), records, *options)
    told_first = [
        line for line in told if "a special token, kept as text, is in 30 documents" in line
    ]
    assert len(told_first) == (tiny.END in said), told
    assert all("in a conversation the template alone writes tokens" in x for x in told_first)


@pytest.mark.parametrize("number", [4, 0])
def test_held_out_documents_that_are_learned_too_are_counted(tmp_path, capsys, number):
    every = numbered(60)
    records = {"train.jsonl": every[:40], "test.jsonl": every[40 - number : 60 - number]}
    told = lines_from(tmp_path, capsys, words(), records, "data.eval_split=test")
    said = [line for line in told if "are in the training split too" in line]
    assert [f": {number} held-out documents" in line for line in said] == [True] * bool(number)


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_held_out_documents_of_which_none_is_left_are_told(tmp_path, capsys, too_long):
    long = [{"text": "one " * 300}] * 4
    options = ("data.eval_split=test", "data.packing=best_fit", f"data.too_long={too_long}")
    for train, what in ((numbered(40), "no evaluation"), (long, "nothing to train on")):
        records = {"train.jsonl": train, "test.jsonl": long}
        told = lines_from(tmp_path / what, capsys, words(), records, *options)
        assert any(f"fits data.seq_len: {what}" in line for line in told) == (too_long == "drop")


@pytest.mark.parametrize("filler", ["", "two three\n" * 900], ids=["short", "long"])
@pytest.mark.parametrize(("pattern", "prompt", "answer", "others"), [
    (JOINED, "one\n", "\ntwo", True), (JOINED, "one", "\n\ntwo", False),
    (JOINED, "one ", "two", False), (JOINED, "one\n\n", "two", False),
    (GPT_2, "one\n\n", "two", True), (GPT_2, "one\n", "two", False),
])  # fmt: skip
def test_prompts_that_end_otherwise_before_an_answer_are_counted(
    tmp_path, capsys, filler, pattern, prompt, answer, others
):
    records = {"train.jsonl": [{"prompt": filler + prompt, "completion": answer}] * 3}
    options = ("data.eval_fraction=0", "data.packing=best_fit")
    made = lines(pattern)
    told = lines_from(tmp_path, capsys, made, records, *options)
    said = [line for line in told if "end with other tokens" in line]
    assert [": 3 prompts" in line for line in said] == [True] * others


@pytest.mark.parametrize(
    ("named", "differs"), [("GPT2Tokenizer", True), ("PreTrainedTokenizerFast", False)]
)
def test_a_class_that_does_not_do_as_tokenizer_json_is_told_with_a_way_out(
    tmp_path, capsys, named, differs
):
    records = {"train.jsonl": [{"text": f"{tiny.END} {TEXT}"}] * 30}
    made = lines(r"\d|\s*\n+|[^\s\d]+|\s")  # each digit apart, which GPT-2 does not
    told = lines_from(
        tmp_path, capsys, made, records, "data.eval_fraction=0", tokenizer_class=named
    )
    said = [line for line in told if "makes other tokens of it than tokenizer.json" in line]
    assert len(said) == differs
    assert all('"tokenizer_class": "PreTrainedTokenizerFast"' in line for line in said)


@pytest.mark.parametrize("more", [{}, {"": 1, "system_prompt": "Be kind.", "id": 7}])
def test_columns_that_nobody_reads_are_named(tmp_path, capsys, more):
    records = {"train.jsonl": [*numbered(90) * 9, {"text": "one", **more}]}
    told = lines_from(tmp_path, capsys, words(), records, "data.eval_fraction=0")
    said = [line for line in told if "nothing reads these columns" in line]
    assert [line.endswith(": '', id, system_prompt") for line in said] == [True] * bool(more)


@pytest.mark.parametrize(("sign", "is_told"), [("###", True), (" two", False), ("line", True)])
def test_a_text_that_nothing_divides_is_told(tmp_path, capsys, sign, is_told):
    records = {"train.jsonl": numbered(30)}
    options = ("data.eval_fraction=0", f"data.split_on='{sign}'")
    told = lines_from(tmp_path, capsys, words(), records, *options)
    assert any("no text holds data.split_on=" in line for line in told) == is_told


@pytest.mark.parametrize(("setting", "is_told"), [("learn=last", True), ("learn=all", False)])
def test_settings_of_turns_are_told_where_there_are_none(tmp_path, capsys, setting, is_told):
    records = {"train.jsonl": numbered(30)}
    options = ("data.eval_fraction=0", f"data.{setting}")
    told = lines_from(tmp_path, capsys, words(), records, *options)
    assert any("data.learn does nothing" in line for line in told) == is_told


@pytest.mark.parametrize(("key", "is_told"), [("mask", True), ("mood", False), ("name", True)])
def test_keys_of_turns_that_nobody_reads_are_named(tmp_path, capsys, key, is_told):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}{{ m.mood }}>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant{{ none }}>{% endif %}"
    )
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    odd = [turns[0], {**turns[1], key: "three"}]
    records = {"train.jsonl": [*[{"messages": turns}] * 300, {"messages": odd}]}
    options = ("data.eval_fraction=0", "data.packing=best_fit", f"data.chat_template={template}")
    told = lines_from(tmp_path, capsys, lines(), records, *options)
    said = [line for line in told if "nothing reads these columns" in line]
    assert [line.endswith(f": turn.{key}") for line in said] == [True] * is_told


@pytest.mark.parametrize(("each_turn", "swap"), [(False, True), (True, True), (False, False)])
def test_conversations_that_nobody_answers_are_told(tmp_path, capsys, each_turn, swap):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}] * 2
    records = {"train.jsonl": [{"messages": turns}] * 30}
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    roles = "{user: assistant, assistant: user}" if swap else "{}"
    options = ("data.eval_fraction=0", f"data.chat_template={template}", f"data.columns={roles}")
    told = lines_from(tmp_path, capsys, lines(), records, *options, f"data.each_turn={each_turn}")
    said = "30 conversations end with a turn that nobody answers; if data.columns swaps user"
    assert any(said in line for line in told) == swap


@pytest.mark.parametrize("is_behind", [True, False])
def test_a_tokenizer_that_puts_its_end_behind_prompts_is_told(tmp_path, capsys, is_behind):
    made = words()
    ends = f" {tiny.END}:0" if is_behind else ""
    made.post_processor = processors.TemplateProcessing(f"$A{ends}", None, [(tiny.END, 0)])
    records = {"train.jsonl": numbered(30)}
    told = lines_from(tmp_path, capsys, made, records, "data.eval_fraction=0")
    said = [line for line in told if "behind a prompt" in line]
    assert [f"puts {tiny.END} behind" in line for line in said] == [True] * is_behind


@pytest.mark.parametrize(("end", "is_told"), [("<|im_end|>", True), (tiny.END, False)])
def test_turns_that_end_with_no_token_of_their_own_are_told(tmp_path, capsys, end, is_told):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}".replace("END", end)
    )
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    records = {"train.jsonl": [{"messages": turns}] * 30}
    options = ("data.eval_fraction=0", "data.packing=best_fit", f"data.chat_template={template}")
    told = lines_from(tmp_path, capsys, lines(), records, *options)
    said = [line for line in told if "which is no token of its own" in line]
    assert [f"30 turns end with {end!r}" in line for line in said] == [True] * is_told


@pytest.mark.parametrize("is_bytes", [True, False])
@pytest.mark.parametrize("alphabet", ["letters", "all"])
def test_characters_that_vanish_are_counted(tmp_path, capsys, is_bytes, alphabet):
    made = Tokenizer(models.BPE())  # without a token for what it does not know
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = split if is_bytes else pre_tokenizers.WhitespaceSplit()
    every = pre_tokenizers.ByteLevel.alphabet() if is_bytes else [*"twoне"]
    trainer = BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=every if alphabet == "all" else []
    )
    made.train_from_iterator(["one two"] * 9, trainer)
    records = {"train.jsonl": [{"text": "one two"}] * 20 + [{"text": "one не two е"}] * 5}
    told = lines_from(tmp_path, capsys, made, records, "data.eval_fraction=0")
    said = [line for line in told if "characters are lost" in line]
    assert [": 15 characters" in line for line in said] == [True] * (alphabet == "letters")


def test_what_a_tokenizer_was_saved_with_cuts_and_fills_nothing(tmp_path, capsys):
    made = words()
    made.enable_truncation(2)
    made.enable_padding(length=40)
    told = lines_from(tmp_path, capsys, made, {"train.jsonl": numbered(90)}, "data.eval_fraction=0")
    assert not any("other tokens" in line for line in told)
    assert any("90 documents (text) -> 360 tokens" in line for line in told)
