"""Several data sets by weight: shares, order, resume, evaluation; each sample once per epoch."""

import json
import os
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from trainstack.config.load import load
from trainstack.data.corpus import enough_samples, open_corpus
from trainstack.data.feed import StepSampler
from trainstack.data.order import BLOCK, Mixture, Permutation, samples_hash, stream
from trainstack.errors import ConfigError
from trainstack.storage import layout

SIZES = {"one": 120, "two": 60, "three": 25}  # documents
WEIGHTS = {"one": 0.5, "two": 0.3, "three": 0.2}
BATCH = 8


def mixed(*names: str, weighted: bool = True) -> str:
    entries = [{"name": name, "weight": WEIGHTS[name] if weighted else None} for name in names]
    return f"data.mixture={json.dumps(entries)}"


MIXTURE = ("data.name=one", "data.weight=0.5", mixed("two", "three"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder)
    for name, documents in SIZES.items():
        tiny.make_dataset(folder, name, documents)
    path = tiny.write_config(folder, train__max_steps=60)
    said = tiny.run_command("prepare", "--home", folder, "--config", path, *MIXTURE)
    for name in SIZES:
        assert f"prepare: {name}: " in said.stderr
    return folder


@pytest.fixture(scope="module")
def corpus(home):
    return open_corpus(home, load(home / "config.yaml", list(MIXTURE)))


weights = st.lists(st.floats(0.001, 1000), min_size=2, max_size=32)


@settings(deadline=None, max_examples=40)
@given(weights, st.integers(0, 2**62), st.integers(0, 10**9), st.data())
def test_each_data_set_has_its_share_and_its_own_samples_follow_one_another(w, seed, block, draw):
    sizes = draw.draw(st.lists(st.integers(1, 50), min_size=len(w), max_size=len(w)))
    mixture = Mixture(sizes, w, seed)
    shares = [Fraction(str(weight)) / sum(Fraction(str(x)) for x in w) for weight in w]
    before, after = mixture.drawn_before(block), mixture.drawn_before(block + 1)
    assert after.sum() == (block + 1) * BLOCK
    assert (after >= before).all()
    off = [d - (block + 1) * BLOCK * s for d, s in zip(after.tolist(), shares, strict=True)]
    assert abs(off.pop(shares.index(max(shares)))) < len(w)
    assert all(abs(difference) < 1 for difference in off)
    positions = np.arange(block * BLOCK, (block + 1) * BLOCK)
    samples = mixture.at(positions)
    first = 0
    for number, size in enumerate(sizes):
        own = samples[(samples >= first) & (samples < first + size)] - first
        expected = stream(np.arange(before[number], after[number]), size, seed, f"{number}/")
        assert own.tolist() == expected.tolist()
        first += size
    assert ((samples >= 0) & (samples < first)).all()


def test_the_report_begins_with_the_share_of_each_data_set(home, corpus):
    """60 steps of 8 sequences: 240 of the first, which has as many samples as the corpus says."""
    settings = ("--config", home / "config.yaml", *MIXTURE)
    shown = tiny.run_command("data_report", "--home", home, *settings).stdout.splitlines()
    assert shown[0] == "share of the sequences, and epochs of each data set in 60 steps"
    epochs = [f"{480 * w / n:.2f}" for w, n in zip(WEIGHTS.values(), corpus.sizes, strict=True)]
    assert [line.split() for line in shown[1:4]] == [
        [f"{100 * weight:.1f}%", "#" * round(20 * weight), count, "epochs", name]
        for (name, weight), count in zip(WEIGHTS.items(), epochs, strict=True)
    ]


@pytest.mark.parametrize("number", [2, 3, 7, 31, 32])
def test_equal_weights_are_equal_shares_of_each_block(number):
    mixture = Mixture([1000] * number, [1] * number, 5)
    for block in range(50):
        drawn = mixture.drawn_before(block + 1) - mixture.drawn_before(block)
        assert abs(drawn - BLOCK / number).max() <= 2


def test_any_position_is_the_same_alone_and_among_others():
    mixture = Mixture([7, 1000, 30], [1, 2, 0.01], 5)
    positions = np.random.default_rng(1).integers(0, 10**13, 300)
    together = mixture.at(positions)
    alone = [
        Mixture([7, 1000, 30], [1, 2, 0.01], 5).at(positions[i : i + 1])[0] for i in range(300)
    ]
    assert together.tolist() == alone
    sampler = StepSampler(1037, BATCH, 1, 2, 5, mixture=mixture)
    both = [StepSampler(1037, BATCH, r, 2, 5, mixture=mixture).samples_at(9) for r in (0, 1)]
    assert sorted(np.concatenate(both)) == sorted(sampler.all_samples_at(9))


def test_turns_have_no_pattern():
    """Neighbours are independent: of 1,000 blocks, as many pairs alike as chance makes."""
    mixture = Mixture([10**6, 10**6], [1, 1], 3)
    samples = mixture.at(np.arange(1000 * BLOCK)).reshape(1000, BLOCK) // 10**6
    alike = (samples[:, 1:] == samples[:, :-1]).mean()
    assert abs(alike - 511 / 1023) < 0.005
    assert abs(samples.mean(axis=0) - 0.5).max() < 0.1


def test_a_mixture_reads_each_sample_from_its_own_store(corpus):
    splits = [store.train for store in corpus.stores.values()]
    assert corpus.train.num_samples == sum(split.num_samples for split in splits)
    chosen = np.random.default_rng(2).permutation(corpus.train.num_samples)
    batch = corpus.train.read(chosen)
    expected = np.concatenate([s.read(np.arange(s.num_samples)) for s in splits], axis=1)
    assert (batch == expected[:, chosen]).all()
    assert corpus.train.target_tokens(chosen) == (expected[1] != -100).sum()
    assert corpus.key == "+".join(store.folder.name for store in corpus.stores.values())


def by_hand(sizes: list[int], seed: int, positions: int) -> list[int]:
    """The samples of a mixture by the rule of doc/data.md, one after the other."""
    shares = [Fraction("0.5"), Fraction("0.3"), Fraction("0.2")]
    samples, drawn = [], [0, 0, 0]
    for block in range(-(-positions // 1024)):
        points = [Fraction(1, 6), Fraction(3, 6), Fraction(5, 6)]
        counts = [int((block + 1) * 1024 * s + p) for s, p in zip(shares, points, strict=True)]
        counts[0] = (block + 1) * 1024 - counts[1] - counts[2]
        turns = [s for s in range(3) for _ in range(counts[s] - drawn[s])]
        order = Permutation(1024, seed, f"mixture/{block}")(np.arange(1024))
        for turn in order:
            data_set = turns[turn]
            epoch, index = divmod(drawn[data_set], sizes[data_set])
            permute = Permutation(sizes[data_set], seed, f"{data_set}/{epoch}")
            samples.append(sum(sizes[:data_set]) + int(permute(np.array([index]))[0]))
            drawn[data_set] += 1
    return samples[:positions]


KILLS = {"once": [(1, 31)], "five times": [(1, 7), (1, 13), (4, 22), (4, 31), (2, 44)]}


@pytest.mark.parametrize(
    "how_often", ["once", pytest.param("five times", marks=pytest.mark.matrix)]
)
def test_killed_and_moved_from_1_to_4_to_2_processes_it_uses_every_sample_once(
    home, corpus, how_often
):
    name, kills = how_often.replace(" ", "-"), KILLS[how_often]
    common = (*MIXTURE, f"run.name={name}")
    for processes, step in kills:
        fault = ("--fault", f"kill:rank={random.Random(step).randrange(processes)},step={step}")
        assert tiny.train(home, processes, *common, *fault, check=False).returncode
    tiny.train(home, 2, *common)
    told = tiny.run_command("ledger", name, "--home", home)
    assert f"attempts: {len(kills) + 1}" in told.stdout
    assert "repeated = 0, skipped = 0" in told.stdout

    sizes = [store.train.num_samples for store in corpus.stores.values()]
    due = by_hand(sizes, 1234, 60 * BATCH)
    hashes = tiny.metrics(home, name, "samples_hash")
    for step in range(1, 61):
        own = due[(step - 1) * BATCH : step * BATCH]
        assert hashes[step] == f"{samples_hash(np.array(own)):013x}", step
    firsts = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    source_tokens = tiny.metrics(home, name, "source_tokens")
    source_epochs = tiny.metrics(home, name, "source_epochs")
    for number, label in enumerate(SIZES):
        own = [sample for sample in due if firsts[number] <= sample < firsts[number + 1]]
        assert source_tokens[60][label] == len(own) * tiny.SEQ_LEN
        assert source_epochs[60][label] == len(own) / sizes[number]
        assert len(own) > sizes[number], "at least one whole epoch of each"
        for epoch in range(len(own) // sizes[number]):
            used = own[epoch * sizes[number] : (epoch + 1) * sizes[number]]
            assert len(set(used)) == sizes[number]

    if how_often == "once":
        return
    tiny.train(home, 2, *MIXTURE, "run.name=whole")
    assert tiny.metrics(home, "whole", "samples_hash") == hashes
    assert tiny.metrics(home, "whole", "source_tokens") == source_tokens
    expected = tiny.metrics(home, "whole")
    for step, loss in tiny.metrics(home, name).items():
        assert loss == pytest.approx(expected[step], rel=1e-3)


def test_without_weights_an_epoch_is_all_samples_of_all_data_sets_once(home, corpus):
    settings = ("data.name=one", mixed("two", "three", weighted=False), "run.name=natural")
    result = tiny.train(home, 1, *settings, "train.max_steps=8", "eval.eval_samples=null")
    total = corpus.train.num_samples
    due = Permutation(total, 1234, 0)(np.arange(8 * BATCH))
    hashes = tiny.metrics(home, "natural", "samples_hash")
    for step in range(1, 9):
        own = due[(step - 1) * BATCH : step * BATCH]
        assert hashes[step] == f"{samples_hash(own):013x}"
    share = corpus.stores["two"].train.num_samples / total
    assert f"{100 * share:.1f}% from two: " in result.stdout
    by_data_set = tiny.metrics(home, "natural", "source_eval_loss")[8]
    counts = [store.eval for store in corpus.stores.values()]
    held_out = [(split.read(np.arange(split.num_samples))[1] != -100).sum() for split in counts]
    whole = sum(by_data_set[label] * n for label, n in zip(SIZES, held_out, strict=True))
    assert tiny.metrics(home, "natural", "eval_tokens")[8] == sum(held_out)
    assert tiny.metrics(home, "natural", "eval_loss")[8] == pytest.approx(whole / sum(held_out))


def test_another_weight_is_another_run(home):
    changed = MIXTURE[2].replace("0.2", "0.25")
    common = ("run.name=refused", "train.max_steps=2")
    tiny.train(home, 1, *MIXTURE, *common)
    refused = tiny.train(home, 1, *MIXTURE[:2], changed, *common, check=False)
    assert refused.returncode
    assert "run refused cannot continue with data.mixture=" in refused.stdout


def others(**own) -> str:
    return f"data.mixture={json.dumps([{'name': 'two', 'weight': None, **own}])}"


PROBLEMS = [
    (["data.name=./a", others(name=f"{os.getcwd()}/a")], "/a is repeated"),
    (["data.name=two", "data.revision=v1", others(split="more")], "two in revisions v1 and main;"),
    (["data.eval_split=train"], "data.eval_split=train: tiny is trained on that split too"),
    (["data.name=two", "data.eval_split=test", others(split="test")], "data.eval_split=test: two"),
    (["data.weight=1"], "data.weight=1: there is no other data set to weigh it against"),
    ([mixed("two")], "data.weight is set for some data sets only (tiny: None, two: "),
    ([mixed("two", "two", weighted=False)], "data.mixture: two is repeated"),
    (["data.mixture=[{weight: 1}]"], "data.mixture[0].name: missing; each data set of a mixture"),
    (["data.mixture=[{name: two, weight: 0}]"], "write a number more than 0"),
    (["data.mixture=[{name: two, wieght: 1}]"], "did you mean data.weight?"),
    (["data.mixture=two"], "not a list; write [{name: two, weight: null}]"),
]


@pytest.mark.parametrize(("overrides", "problem"), PROBLEMS, ids=lambda value: str(value)[:40])
def test_a_wrong_mixture_is_one_clear_line(home, overrides, problem):
    with pytest.raises(ConfigError) as raised:
        load(home / "config.yaml", overrides)
    assert problem in str(raised.value), str(raised.value)
    print(raised.value)


def test_what_an_entry_leaves_out_is_as_in_data_and_the_kept_settings_say_it(home, tmp_path):
    overrides = [mixed("two"), "data.weight=1", "data.text_field=body", "data.subset=small"]
    loaded = load(home / "config.yaml", overrides)
    (second,) = loaded.data.mixture
    assert (second.text_field, second.subset, second.revision) == ("body", None, "main")
    (tmp_path / "kept.yaml").write_text(loaded.to_yaml())
    assert load(tmp_path / "kept.yaml", []) == loaded
    assert [source.name for source in loaded.data.sources] == ["tiny", "two"]


def test_a_data_set_without_a_sample_is_named(home):
    content = {"train.jsonl": '{"text": "one two"}\n'}
    tiny.publish(layout.dataset_folder(home, "short", None), content, kind="dataset")
    arguments = ["--home", home, "--config", home / "config.yaml", "data.eval_fraction=0"]
    arguments += ["data.name=one", "data.mixture=[{name: short, weight: null}]"]
    tiny.run_command("prepare", *arguments)
    loaded = load(home / "config.yaml", list(map(str, arguments[4:])))
    with pytest.raises(ConfigError, match="data set short has less than one sequence of 32"):
        enough_samples(loaded, open_corpus(home, loaded))
    arguments += ["data.packing=none", "data.seq_len=2", "data.too_long=drop"]
    tiny.run_command("prepare", *arguments)
    loaded = load(home / "config.yaml", list(map(str, arguments[4:])))
    with pytest.raises(ConfigError, match="has only documents longer than data.seq_len; set data."):
        enough_samples(loaded, open_corpus(home, loaded))


def test_a_fault_in_a_file_names_the_data_set_of_a_mixture(home):
    tiny.publish(layout.dataset_folder(home, "void", None), {"train.jsonl": ""}, kind="dataset")
    arguments = ["--home", home, "--config", home / "config.yaml", "data.eval_fraction=0"]
    mixed_in = "data.mixture=[{name: void, weight: null}]"
    result = tiny.run_command("prepare", *arguments, "data.name=one", mixed_in, check=False)
    assert "prepare: error: void: train.jsonl: is empty" in result.stderr
