"""python -m trainstack eval: the numbers of the run, of other data, and of any model's folder."""

import json
import math
import os
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


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_has_the_numbers_and_the_words_that_the_run_had_at_that_step(home, processes):
    found = evaluate(home, "r@10", processes=processes)
    assert {key: found[key] for key in measured(home, 10)} == measured(home, 10)
    events = (home / "runs/r/events.jsonl").read_text().splitlines()
    said = [event for event in map(json.loads, events) if event["event"] == "sample"]
    said = [(event["prompt"], event["text"]) for event in said if event["step"] == 10]
    assert [(one["prompt"], one["text"]) for one in found["samples"]] == said
    assert [prompt for prompt, _ in said] == ["one", "two", "three"]
