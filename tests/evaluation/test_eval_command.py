"""python -m trainstack eval: the numbers of the run, of other data, and of any model's folder."""

import json
import math
import shutil
import subprocess
import sys

import pytest

import tiny
from trainstack.storage import layout


@pytest.fixture(scope="module")
def home(home, tmp_path_factory):
    """A run of 20 steps that kept two checkpoints."""
    own = tmp_path_factory.mktemp("evaluated") / "home"
    shutil.copytree(home, own, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    tiny.train(own, 1, "run.name=r", "checkpoint.save_steps=10", "eval.prompts=[one, two, three]")
    return own


def evaluate(home, *arguments, processes: int = 1) -> dict:
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launch, "trainstack", "eval", *arguments, "--home", home, "--json"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=tiny.ROOT, timeout=300,
        env=tiny.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def measured(home, step: int) -> dict:
    keys = ("loss", "perplexity", "token_accuracy", "bits_per_byte", "tokens")
    return {f"eval_{key}": tiny.metrics(home, "r", f"eval_{key}")[step] for key in keys}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_checkpoint_has_the_numbers_and_the_words_that_the_run_had_at_that_step(home, processes):
    found = evaluate(home, "r@10", processes=processes)
    assert {key: found[key] for key in measured(home, 10)} == measured(home, 10)
    events = (home / "runs/r/events.jsonl").read_text().splitlines()
    said = [event for event in map(json.loads, events) if event["event"] == "sample"]
    said = [(event["prompt"], event["text"]) for event in said if event["step"] == 10]
    assert [(one["prompt"], one["text"]) for one in found["samples"]] == said
    assert [prompt for prompt, _ in said] == ["one", "two", "three"]


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """Those of a file, tmp_path/other.jsonl."""
    made = [" ".join(tiny.WORDS[n % 10] for n in range(s, s + 25)) for s in range(9)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in made)
    (tmp_path / "other.jsonl").write_text(lines)
    return made


def test_other_data_is_evaluated_whole_and_as_transformers_itself_does(home, tmp_path, texts):
    """Also the last tokens, which fill no sample; its tokens are made on the way."""
    import torch
    import transformers

    found = evaluate(home, "r", f"data.name={tmp_path / 'other.jsonl'}", "eval.prompts=[]")
    folder = layout.run_folder(home, "r") / "checkpoints" / "checkpoint-20"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [n for text in texts for n in [*tokenizer(text)["input_ids"], 0]]
    nats, hits, targets = 0.0, 0, len(ids) - 1
    for start in range(0, targets, tiny.SEQ_LEN):
        row = torch.tensor([ids[start : start + tiny.SEQ_LEN + 1]])
        with torch.no_grad():
            output = model(row, labels=row)
        nats += output.loss.item() * (row.shape[1] - 1)
        hits += int((output.logits[:, :-1].argmax(-1) == row[:, 1:]).sum())
    assert found["eval_tokens"] == targets and targets % tiny.SEQ_LEN
    assert found["eval_perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert found["eval_token_accuracy"] == pytest.approx(hits / targets)
    size = sum(map(len, texts)) * targets / len(ids)  # of the first token no loss is known
    assert found["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_folder_of_any_model_is_evaluated_as_a_checkpoint_is(home, tmp_path, texts):
    folder = shutil.copytree(
        layout.run_folder(home, "r") / "checkpoints" / "checkpoint-20", tmp_path / "exported",
        ignore=shutil.ignore_patterns("training", "manifest.json"),
    )  # fmt: skip
    data = (f"data.name={tmp_path / 'other.jsonl'}", "data.eval_fraction=0.5")
    found = evaluate(home, folder, "--config", home / "config.yaml", *data)
    run = evaluate(home, "r@20", *data)
    assert 0 < found["eval_tokens"] < 150 and found["samples"][0]["text"].startswith("one")
    for key in measured(home, 20):
        assert found[key] == run[key]


WRONG = {
    "r@11": "run r has no checkpoint 11; it has steps 10, 20",
    "r@best": "run r has no best checkpoint (eval.keep_best); it has steps 10, 20",
    "nothing": "no run nothing in .*; there are: r",
}


@pytest.mark.parametrize("model", WRONG)
def test_what_cannot_be_evaluated_is_one_line(home, model):
    done = tiny.run_command("eval", model, "--home", home, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert WRONG[model].replace(".*", str(home / "runs")) in line


def test_for_people_it_prints_lines_and_names_what_is_not_here(home):
    path = layout.run_folder(home, "r") / "checkpoints" / "checkpoint-10"
    done = tiny.run_command("eval", path, "--home", home, "eval.sample_tokens=2")
    assert done.stdout.startswith(f"{path} on tiny\nloss ")
    assert "token accuracy" in done.stdout and "(eval.sample_tokens=2)" in done.stdout
    far = tiny.run_command("eval", "r", "--home", home, "data.name=org/far", check=False)
    assert far.returncode == 1
    assert "data set org/far is not here; run: bash download_data_model.sh" in far.stderr
    assert far.stderr.count("\n") == 1
