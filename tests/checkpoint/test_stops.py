"""A saved model stops where what it learned stops: the folder alone tells transformers so."""

import json

import pytest
import torch
import transformers

import tiny
from trainstack.checkpoint.names import newest_checkpoint
from trainstack.checkpoint.snapshot import small_files
from trainstack.config.load import load
from trainstack.data.corpus import Corpus, open_corpus

PROMPT = torch.tensor([[5, 6, 7]])


def tiny_llama(**settings) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = {**tiny.CONFIG, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 0, **settings}
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
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
    save(model, tmp_path, [stop])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert said(loaded) == whole[: whole.index(stop) + 1]
    assert loaded.generation_config.eos_token_id == [0, stop]


@pytest.mark.parametrize(
    ("own", "stops", "expected"),
    [
        (0, [7], [0, 7]),
        ([3, 7], [7, 5], [3, 7, 5]),
        (None, [7, 5], [7, 5]),
        (7, [7], 7),
        ([3, 7], [7], [3, 7]),
    ],
)
def test_the_models_own_ends_come_first_and_none_twice(tmp_path, own, stops, expected):
    model = tiny_llama(eos_token_id=own)
    settings = json.loads(small_files(model, tmp_path, stops, None)["generation_config.json"])
    assert settings["eos_token_id"] == expected


def test_a_resumed_run_writes_the_same_bytes(tmp_path):
    first = save(tiny_llama(), tmp_path, [7, 5])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert small_files(loaded, tmp_path, [7, 5], None) == first


def test_without_turns_nothing_changes(tmp_path):
    model, name = tiny_llama(), "generation_config.json"
    model.save_pretrained(tmp_path)
    assert small_files(model, tmp_path, [], None)[name] == (tmp_path / name).read_bytes()


def test_settings_that_contradict_each_other_are_saved_all_the_same(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    odd = {"temperature": 0.9, "do_sample": False, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = json.loads(small_files(model, tmp_path, [7], None)["generation_config.json"])
    assert (settings["temperature"], settings["eos_token_id"]) == (0.9, [0, 7])


def test_a_run_takes_the_ends_of_turns_from_all_its_token_stores(tmp_path):
    tiny.make_model(tmp_path)
    tiny.make_dataset(tmp_path, documents=60)
    config = tiny.write_config(tmp_path, train__max_steps=2)
    tiny.run_command("prepare", "--home", tmp_path, "--config", config)
    corpus = open_corpus(tmp_path, load(config, []))
    assert corpus.stop_ids == []  # a store from before there was such a list
    (store,) = corpus.stores.values()
    (store.folder / "meta.json").write_text(json.dumps({**store.meta, "stop_ids": [9, 4]}))
    other = open_corpus(tmp_path, load(config, []))
    other.stores["tiny"].meta["stop_ids"] = [4, 11]
    both = open_corpus(tmp_path, load(config, [])).stores | {"other": other.stores["tiny"]}
    assert Corpus(both).stop_ids == [9, 4, 11]
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
    found = small_files(tiny_llama(), tmp_path, [], "three")
    assert found["chat_template.jinja"] == b"three"
