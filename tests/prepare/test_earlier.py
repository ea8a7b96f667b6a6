"""Stores of the rules before: runs that began with them go on, plain texts have one store."""

import json
import random

import pytest
from records import TEMPLATE, record

import tiny
from trainstack.config.load import load
from trainstack.data.store import (
    EARLIER_VERSION,
    LAST_VERSION,
    TokenStore,
    find_store,
    store_folder,
)
from trainstack.prepare import prepare
from trainstack.storage import layout
from trainstack.storage.manifest import damage, remove_folder

EOS, TOKENIZER = "eos_token_id", "PreTrainedTokenizerFast"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder, template=TEMPLATE)
    for name in ("text", "messages"):
        generator = random.Random(3)
        lines = [json.dumps(record(name, generator)) for _ in range(50)]
        content = {"train.jsonl": "\n".join(lines) + "\n"}
        tiny.publish(layout.dataset_folder(folder, name, None), content, kind="dataset")
    tiny.write_config(folder)
    return folder


def made(home, *settings) -> tuple:
    """The section of a data set that was prepared, and its places by the new and earlier rules."""
    common = ["--home", str(home), "--config", str(home / "config.yaml"), "--processes", "1"]
    assert prepare.main([*common, *settings]) == 0
    section = load(home / "config.yaml", [*settings]).data
    places = [store_folder(home, "tiny", section, *v) for v in ((), (EARLIER_VERSION,))]
    return section, *places


def test_a_run_goes_on_with_the_store_that_it_began_with_and_a_new_one_does_not(home):
    section, now, before = made(home, "data.name=messages", "data.packing=best_fit")
    assert not now.is_symlink() and not before.exists()
    now.rename(before)
    assert find_store(home, "tiny", section, [before.name]) == before
    assert find_store(home, "tiny", section, ["another"]) == now
    other = section.model_copy(update={"learn": "last"})
    assert find_store(home, "tiny", other, [before.name]).name != before.name


@pytest.mark.parametrize("name", ["text", "messages"])
def test_a_store_of_the_last_rules_is_kept_by_its_runs_and_by_new_ones_if_it_is_plain(home, name):
    settings = [f"data.name={name}", "data.packing=best_fit", "data.seq_len=64"]
    section, now, _ = made(home, *settings)
    last = store_folder(home, "tiny", section, LAST_VERSION)
    now.resolve().rename(last)
    remove_folder(now)
    assert find_store(home, "tiny", section, [last.name]) == last
    made(home, *settings)
    assert (now.resolve() == last) == (name == "text")
    assert find_store(home, "tiny", section, ()) == (last if name == "text" else now)
    assert find_store(home, "tiny", section, [last.name]) == last


def test_plain_texts_have_the_store_that_both_rules_make_and_it_is_not_written_twice(home, capsys):
    section, now, before = made(home, "data.name=text")
    assert now.is_symlink() and now.resolve() == before
    assert find_store(home, "tiny", section, ()) == before
    now.unlink()  # as an earlier version left it
    meta = before / "meta.json"
    written = meta.stat().st_mtime_ns
    made(home, "data.name=text")
    assert now.resolve() == before and meta.stat().st_mtime_ns == written
    capsys.readouterr()
    made(home, "data.name=text")
    assert "are here" in capsys.readouterr().err


def test_a_store_of_the_rules_before_is_made_anew_if_a_document_spells_a_special_token(home):
    line = json.dumps({"text": f"one {tiny.END} two"})
    content = {"train.jsonl": "\n".join([line] * 50) + "\n"}
    tiny.publish(layout.dataset_folder(home, "spelled", None), content, kind="dataset")
    settings = ["data.name=spelled", "data.eval_fraction=0"]
    _, now, before = made(home, *settings, "data.special_tokens=tokens")
    now.rename(before.with_name(store_folder_name(home, settings)))
    _, now, before = made(home, *settings)
    assert before.exists() and now.is_dir() and not now.is_symlink()


def test_models_of_one_tokenizer_and_two_end_tokens_have_a_store_each(own_home):
    """Where config.json alone names the end, which the key of the rules before does not hold."""
    folder, ends = layout.model_folder(own_home, "tiny"), {}
    names = ("config.json", "tokenizer.json")
    content = {name: (folder / name).read_text() for name in names}
    content["tokenizer_config.json"] = json.dumps({"tokenizer_class": TOKENIZER})
    for end in (0, 3):
        content["config.json"] = json.dumps({**json.loads(content["config.json"]), EOS: end})
        remove_folder(folder)
        tiny.publish(folder, content, kind="model", weight_bytes=0)
        section, now, _ = made(own_home, "data.name=text", "data.seq_len=48")
        train = TokenStore(now, section.seq_len).train
        ends[end] = {int(train.ids[stop - 1]) for stop in train.stops}
    assert ends == {0: {0}, 3: {3}}


def test_only_the_link_to_a_store_is_removed_with_it(home):
    _, now, before = made(home, "data.name=text")
    remove_folder(now)
    assert not now.is_symlink() and not list(damage(before))


def store_folder_name(home, settings) -> str:
    section = load(home / "config.yaml", settings).data
    return store_folder(home, "tiny", section, EARLIER_VERSION).name
