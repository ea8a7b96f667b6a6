"""Each format from its file to trained weights, and the promises for documents packed whole."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from records import TEMPLATE, record

import tiny
from trainstack.data.report import bar
from trainstack.data.store import TokenStore
from trainstack.run.folder import RunFolder
from trainstack.storage import layout
from trainstack.storage.manifest import damage, hash_file, read_manifest, write_manifest

PACKED = ("data.packing=best_fit", "data.name=messages")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project folder with a chat model and a data set of each format."""
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder, template=TEMPLATE)
    for name in ("text", "messages", "prompt_completion", "alpaca", "sharegpt"):
        generator = random.Random(3)
        lines = [json.dumps(record(name, generator)) for _ in range(200)]
        content = {"train.jsonl": "\n".join(lines) + "\n"}
        tiny.publish(layout.dataset_folder(folder, name, None), content, kind="dataset")
    tiny.write_config(folder, eval__eval_samples=None)
    prepare(folder, *PACKED)
    return folder


def prepare(home, *settings) -> str:
    arguments = ["--home", home, "--config", home / "config.yaml", *settings]
    return tiny.run_command("prepare", *arguments).stderr


def store_of(home, **settings) -> TokenStore:
    """The store that was made with some settings."""
    for folder in (home / "tokens").iterdir():
        meta = json.loads((folder / "meta.json").read_bytes())
        made = {"data": meta["data"], **meta["settings"]}
        if all(made.get(key) == value for key, value in settings.items()):
            return TokenStore(folder, tiny.SEQ_LEN)
    raise AssertionError(f"no store with {settings}")


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("text", "best_fit"),
        ("messages", "none"),
        ("prompt_completion", "concat"),
        ("alpaca", "best_fit"),
        ("sharegpt", "concat"),
    ],
)
def test_each_format_trains_from_a_file(home, name, packing):
    settings = [f"data.name={name}", f"data.packing={packing}", f"run.name={name}"]
    said = prepare(home, *settings)
    assert f"documents ({name})" in said
    tiny.train(home, 1, *settings, "train.max_steps=12")
    losses = tiny.metrics(home, name)
    assert losses[12] < losses[1] - 0.5
    ledger = tiny.run_command("ledger", name, "--home", home)
    assert "repeated = 0, skipped = 0" in ledger.stdout
    held_out = store_of(home, data=name, packing=packing).eval
    labels = held_out.read(np.arange(held_out.num_samples))[1]
    assert tiny.metrics(home, name, "eval_tokens")[12] == (labels != -100).sum()


@pytest.fixture(scope="module")
def reference(home):
    return tiny.train(home, 2, "run.name=two", *PACKED, "train.precision=fp64")


def test_packed_runs_lose_alike_and_evaluate_each_token_once_at_1_2_and_4_processes(
    home, reference
):
    held_out = store_of(home, data="messages", packing="best_fit").eval
    for processes, run in ((1, "one"), (2, "two"), (4, "four")):
        if run != "two":
            name = f"run.name={run}"
            tiny.train(home, processes, name, *PACKED, "train.precision=fp64", "train.max_steps=10")
        counted = tiny.metrics(home, run, "eval_tokens")[10]
        assert counted == held_out.row_targets.sum()
        for key in ("loss", "eval_loss", "token_accuracy", "eval_token_accuracy"):
            expected = tiny.metrics(home, "two", key)
            for step, value in tiny.metrics(home, run, key).items():
                assert value == pytest.approx(expected[step], abs=1e-12), (run, key, step)
    hashes = [tiny.metrics(home, run, "samples_hash") for run in ("one", "two", "four")]
    assert hashes[0] == hashes[2]
    assert hashes[0].items() <= hashes[1].items()


def test_the_first_loss_is_the_mean_over_the_targets_of_the_step(home, reference):
    """Recomputed from the store with transformers alone, document by document."""
    import torch
    import transformers

    from trainstack.data.feed import StepSampler

    split = store_of(home, data="messages", packing="best_fit").train
    torch.manual_seed(1234)
    config = transformers.AutoConfig.from_pretrained(layout.model_folder(home, "tiny"))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    loss, targets = 0.0, 0
    for sample in StepSampler(split.num_samples, 8, 0, 1, 1234).samples_at(0):
        first, last = split.rows[sample : sample + 2]
        for start, slots in split.pieces[first:last]:
            ids = torch.from_numpy(split.ids[start : start + slots + 1].astype(np.int64))
            labels = ids.clone()
            positions = np.arange(start, start + slots + 1)
            labels[torch.from_numpy(split.targets_in(positions, positions + 1) == 0)] = -100
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            loss += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            targets += int((labels[1:] != -100).sum())
    assert tiny.metrics(home, "two")[1] == pytest.approx(loss / targets, rel=1e-9)


def test_a_packed_run_that_is_cut_short_resumes_to_the_last_bit(home, reference):
    shutil.copytree(home / "runs/two", home / "runs/cut")
    shutil.rmtree(home / "runs/cut/checkpoints/checkpoint-20")
    config = home / "runs/cut/config.yaml"
    config.write_text(config.read_text().replace("name: two", "name: cut"))
    tiny.train(home, 2, "run.name=cut", *PACKED, "train.precision=fp64")
    assert RunFolder(home / "runs/cut").status()["state"] == "DONE"
    weights = [
        hashlib.sha256(
            (home / f"runs/{run}/checkpoints/checkpoint-20/model.safetensors").read_bytes()
        )
        for run in ("two", "cut")
    ]
    assert weights[0].digest() == weights[1].digest()
    assert tiny.metrics(home, "two") == tiny.metrics(home, "cut")


def test_too_few_samples_are_refused_before_the_queue(home):
    """Fewer packed samples than a batch (B32); counted as the job counts them."""
    settings = [*PACKED, "train.global_batch_size=4096", "train.micro_batch_size=4096"]
    result = tiny.train(home, 1, *settings, "run.name=few", check=False)
    assert result.returncode != 0
    assert "sequences of 32 tokens, less than train.global_batch_size=4096" in result.stdout


BAD = [
    '{"text": "one two"}\n',
    '{"text": 5}\n',
    '{"text": "three" "four"}\n',
    '{"text": "a\\u0000b"}\n',
    '{"text": "\\ud800"}\n',
    '{"text": "  "}\n',
    '\ufeff{"text": "five\\u2028six"}\r\n',
    '{"text": "\xff"}\n',
    '{"text": "seven eight"}',
]


def test_bad_records_are_left_out_up_to_a_limit_and_listed(home, tmp_path):
    content = {"a.jsonl": "".join(BAD)}
    tiny.publish(layout.dataset_folder(home, "bad", None), content, kind="dataset")
    path = layout.dataset_folder(home, "bad", None) / "a.jsonl"
    damaged = path.read_bytes().replace("\xff".encode(), b"\xff")
    path.chmod(0o644)
    path.write_bytes(damaged)
    entry = hash_file(path)
    manifest = read_manifest(path.parent)
    manifest["files"]["a.jsonl"] = {"size": entry["size"], "sha256": entry["sha256"]}
    (path.parent / "manifest.json").unlink()
    write_manifest(path.parent, manifest["files"], kind="dataset")
    common = ["--home", home, "--config", home / "config.yaml", "data.name=bad"]
    for limit, problem in ((0, "a.jsonl:2: no string"), (4, "a.jsonl:8: not UTF-8 at byte 10")):
        settings = [*common, "data.eval_fraction=0", f"data.max_bad_records={limit}"]
        refused = tiny.run_command("prepare", *settings, check=False)
        assert refused.returncode == 1
        assert problem in refused.stderr
        assert "Traceback" not in refused.stderr
    said = prepare(home, "data.name=bad", "data.eval_fraction=0", "data.max_bad_records=5")
    assert "3 documents (text) -> " in said
    assert "1 empty dropped" in said
    assert "5 bad records left out: " in said
    store = store_of(home, data="bad")
    listed = (store.folder / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in listed] == [
        "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:8",
    ]  # fmt: skip
    assert not any(damage(store.folder))


def test_the_report_counts_and_shows_what_is_learned(home):
    """A duplicate and a long document among others; marks, for there is no terminal."""
    said = "one two three"
    turns = [{"role": "user", "content": "four five"}, {"role": "assistant", "content": said}]
    long = [{"role": "user", "content": "six " * 70}, *turns[1:]]
    lines = [json.dumps({"messages": each}) for each in (turns, turns, long)]
    content = {"train.jsonl": "\n".join(lines) + "\n"}
    tiny.publish(layout.dataset_folder(home, "few", None), content, kind="dataset")
    settings = ["data.name=few", "data.packing=best_fit", "data.eval_fraction=0"]
    prepare(home, *settings)
    arguments = ["--home", home, "--config", home / "config.yaml", *settings]
    shown = tiny.run_command("data_report", *arguments).stdout
    words = " ".join(shown.split())
    assert "3 documents (messages) -> 92 tokens (13.0% of them learned), 0 held out" in words
    assert re.search(r"packing best_fit: \d+ samples? of \d+ tokens, 0 more held out", words)
    assert "padding; 1 longer document split, 0 dropped" in words
    assert "duplicates: 1 document (33.3%)" in words
    assert "tokens per document of train: median 8, longest 76" in words
    assert "8 to 15 2 66.7% ######" in words
    assert "64 to 127 1 33.3% ####" in words
    assert "four five <|end|>[[ one two three <|end|>]]" in shown
    missing = tiny.run_command("data_report", *arguments, "data.name=no", check=False)
    assert missing.returncode == 2
    assert "not ready" in missing.stderr


@pytest.mark.parametrize("share, length", [(0, 0), (0.0001, 1), (0.03, 1), (0.5, 5), (1, 10)])
def test_a_bar_is_as_long_as_its_share_and_never_empty_for_something(share, length):
    assert bar(share, 10) == "#" * length


def test_on_a_terminal_what_is_learned_is_coloured(home):
    command = [sys.executable, "-m", "trainstack", "data_report", "--home", home]
    command += ["--config", home / "config.yaml", *PACKED]
    ours, terminal = os.openpty()
    variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with subprocess.Popen(list(map(str, command)), stdout=terminal, cwd=tiny.ROOT, env=variables):
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # EIO: the other side has closed it
            os.close(ours)
    assert b"\033[32m" in shown
    assert b" ####" in shown
    assert b"[[" not in shown
