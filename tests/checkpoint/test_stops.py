"""A saved model stops where what it learned stops: the folder alone tells transformers so."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import tiny
from trainstack.checkpoint.names import newest_checkpoint
from trainstack.checkpoint.snapshot import small_files
from trainstack.config.load import load
from trainstack.data.corpus import Corpus, open_corpus
from trainstack.model.causal_lm import notes_on, special_tokens

PROMPT = torch.tensor([[5, 6, 7]])


def tiny_llama(**settings) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = {**tiny.CONFIG, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, **settings}
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )


def make_tokenizer(folder) -> None:
    """Words w1 to w90 as tokens 1 to 90, but for 5 and 6: special ones, as is 0, the end."""
    own = {0: "<end>", 5: "<a>", 6: "<b>"}
    made = Tokenizer(models.WordLevel({own.get(n, f"w{n}"): n for n in range(91)}, "<end>"))
    made.add_special_tokens([*own.values()])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(
        folder
    )


def said(model) -> list[int]:
    """What it says next, greedily, 20 tokens at most."""
    return model.generate(PROMPT, max_new_tokens=20, do_sample=False)[0, 3:].tolist()


def save(model, folder, stop_ids: list[int]) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    found = small_files(model, folder, stop_ids, None)
    for name, content in found.items():
        (folder / name).write_bytes(content)
    return found


def test_generation_ends_where_turns_end_and_at_the_models_own_end(tmp_path):
    model = tiny_llama()
    whole = said(model)
    assert len(whole) == 20
    stop = whole[3]
    save(model, tmp_path, [0, stop])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert said(loaded) == whole[: whole.index(stop) + 1]
    assert loaded.generation_config.eos_token_id == [0, stop]


@pytest.mark.parametrize(
    ("own", "learned", "expected"),
    [
        (0, [0, 6], [0, 6]),
        ([0, 6], [6, 5], [0, 6, 5]),
        (None, [6, 5], [6, 5]),
        ([5, 0], [0], [5, 0]),
        (7, [0], [0]),  # w7, a word of the tokenizer
        ([0, 7, 95], [0, 6], [0, 6]),  # 95: a row of the model that the tokenizer does not have
        ([7, -1], [0], [0]),
    ],
)
def test_the_models_own_ends_come_first_none_twice_and_no_words(
    tmp_path, own, learned, expected, caplog
):
    make_tokenizer(tmp_path)
    ends, _ = special_tokens(tiny_llama(eos_token_id=own), tmp_path, learned)
    assert ends == expected
    is_odd = not {*(own if isinstance(own, list) else [own])} <= {None, 0, 5, 6}
    assert ("7, which is 'w7'" in caplog.text) == is_odd
    notes = notes_on(tiny_llama(eos_token_id=own), tmp_path)
    assert ["7, which is 'w7'" in note for note in notes] == [True] * is_odd


@pytest.mark.parametrize(
    ("row", "is_told"),
    [(0, True), (5, False), (7, True), (-1, False), (None, False)],
)
def test_a_row_of_the_embedding_that_is_not_learned_is_told_if_texts_use_it(tmp_path, row, is_told):
    make_tokenizer(tmp_path)
    model = tiny_llama(pad_token_id=row, tie_word_embeddings=False)
    tokens = torch.tensor([[0, 5, 7, 95, 1]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    still = [n for n in (0, 5, 7, 95) if not model.get_input_embeddings().weight.grad[n].any()]
    assert still == ([] if row is None else [row % 96])
    assert any("no gradient" in note for note in notes_on(model, tmp_path)) == is_told


def test_what_is_no_number_is_no_end(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["7", null, 8]}')
    (note,) = notes_on(tiny_llama(), tmp_path)
    assert "eos_token_id 8, which is 'w8' to its tokenizer" in note


KEYS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("own", "said"), [(6, None), (7, "'w7'"), (95, "no token"), (-1, "no")])
def test_of_other_special_tokens_a_word_is_left_out_too_and_that_is_said_once(
    tmp_path, caplog, key, own, said
):
    make_tokenizer(tmp_path)
    model = tiny_llama(**{key: own})
    told = [note for note in notes_on(model, tmp_path) if "its settings name" in note]
    ends, odd = special_tokens(model, tmp_path, [0])
    settings = json.loads(small_files(model, tmp_path, ends, None, odd)["generation_config.json"])
    assert (ends, settings.get(key)) == ([0], None if said else own)
    assert len(told) == caplog.text.count("its settings name") == bool(said)
    if said:
        assert f"its settings name as {key} {own}, which is {said}" in told[0]
        assert f"as {key} {own}, which is {said}" in caplog.text


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_no_file_of_a_checkpoint_stops_at_a_word(tmp_path, name):
    found = small_files(tiny_llama(eos_token_id=7), tmp_path, [0], None)
    assert json.loads(found[name])["eos_token_id"] == [0]


def test_a_resumed_run_writes_the_same_bytes(tmp_path):
    first = save(tiny_llama(), tmp_path, [7, 5])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert small_files(loaded, tmp_path, [7, 5], None) == first


def test_where_nothing_has_to_change_nothing_does(tmp_path):
    model, names = tiny_llama(), ("generation_config.json", "config.json")
    model.save_pretrained(tmp_path)
    found = small_files(model, tmp_path, [0], None)
    assert [found[name] for name in names] == [(tmp_path / name).read_bytes() for name in names]


def test_settings_that_contradict_each_other_are_saved_all_the_same(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    odd = {"temperature": 0.9, "do_sample": False, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = json.loads(small_files(model, tmp_path, [0, 7], None)["generation_config.json"])
    assert (settings["temperature"], settings["eos_token_id"]) == (0.9, [0, 7])


def test_a_run_takes_the_ends_of_turns_from_all_its_token_stores(tmp_path):
    tiny.make_model(tmp_path)
    tiny.make_dataset(tmp_path, documents=60)
    config = tiny.write_config(tmp_path, train__max_steps=2)
    tiny.run_command("prepare", "--home", tmp_path, "--config", config)
    corpus = open_corpus(tmp_path, load(config, []))
    (store,) = corpus.stores.values()
    assert corpus.ends == [store.meta["end_id"]] == [0]  # as of a store without turns
    (store.folder / "meta.json").write_text(json.dumps({**store.meta, "stop_ids": [9, 4]}))
    other = open_corpus(tmp_path, load(config, []))
    other.stores["tiny"].meta["stop_ids"] = [4, 11]
    both = open_corpus(tmp_path, load(config, [])).stores | {"other": other.stores["tiny"]}
    assert Corpus(both).ends == [0, 9, 4, 11]
    tiny.train(tmp_path, 1, "run.name=stops")
    _, newest = newest_checkpoint(tmp_path / "runs/stops/checkpoints")
    settings = json.loads((newest / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 9, 4]


def test_a_checkpoint_has_all_templates_of_the_model_and_one_of_the_users_in_its_place(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    own = {"chat_template.jinja": b"one", "additional_chat_templates/tool_use.jinja": b"two"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    found = small_files(tiny_llama(), tmp_path, [], None)
    assert {name: found[name] for name in own} == own
    inline = {"chat_template": "four", "eos_token": "ü", "auto_map": {"AutoTokenizer": "mine.T"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(inline))
    found = small_files(tiny_llama(), tmp_path, [], None)
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "ü"}
    (tmp_path / "chat_template.jinja").unlink()
    found = small_files(tiny_llama(), tmp_path, [], None)
    assert json.loads(found["tokenizer_config.json"]) == {"chat_template": "four", "eos_token": "ü"}
    found = small_files(tiny_llama(), tmp_path, [], "three")
    assert found["chat_template.jinja"] == b"three"
    assert "additional_chat_templates/tool_use.jinja" not in found
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "ü"}


def test_a_checkpoint_names_no_code_that_is_not_in_it(tmp_path):
    model = tiny_llama(auto_map={"AutoConfig": "configuration_tiny.TinyConfig"})
    save(model, tmp_path, [0])
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
