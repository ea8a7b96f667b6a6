"""What the loop writes of its steps, and when it saves and evaluates."""

import math
import re
import shutil
from pathlib import Path

import pytest

import tiny
from trainstack.checkpoint.names import checkpoints
from trainstack.config.load import load
from trainstack.data import corpus
from trainstack.train.attempt import Attempt

STEPS = ("train.max_steps=12", "eval.prompts=[]")
RARE = ("log.logging_steps=5", "checkpoint.save_steps=4")


@pytest.fixture(scope="module")
def losses(home) -> dict[int, float]:
    """Of each step."""
    tiny.train(home, 1, "run.name=each", *STEPS)
    return tiny.metrics(home, "each")


def resumed_from(home: Path, run: str, *settings: str, step: int) -> None:
    """Train to the end, then once more from a checkpoint on."""
    tiny.train(home, 1, f"run.name={run}", *settings)
    for later, folder in checkpoints(home / "runs" / run / "checkpoints"):
        if later > step:
            shutil.rmtree(folder)
    assert f"from checkpoint-{step}:" in tiny.train(home, 1, f"run.name={run}", *settings).stdout


def test_the_mean_is_of_the_steps_since_the_last_line_also_over_a_restart(home, losses):
    assert tiny.metrics(home, "each", "mean_loss") == losses
    resumed_from(home, "rare", *STEPS, *RARE, step=8)  # between the lines of steps 5 and 10
    means = tiny.metrics(home, "rare", "mean_loss")
    parts = {1: [1], 5: range(2, 6), 10: range(6, 11), 12: (11, 12)}
    assert means == {s: sum(losses[i] for i in part) / len(part) for s, part in parts.items()}


def test_a_loss_that_is_not_finite_is_in_no_mean(home, losses):
    skip = ("guard.on_divergence=skip", "--fault=nan:rank=0,step=3")
    tiny.train(home, 1, "run.name=skips", *STEPS, *RARE, *skip)
    means = tiny.metrics(home, "skips", "mean_loss")
    assert all(map(math.isfinite, means.values()))
    # The loss of step 4 is what it would have been at step 3: that update did not happen.
    assert means[5] == pytest.approx((losses[2] + losses[3] + losses[4]) / 3, rel=0.05)
    tiny.train(home, 1, "run.name=blind", *STEPS, *skip)
    assert [step for step, mean in tiny.metrics(home, "blind", "mean_loss").items()
            if not math.isfinite(mean)] == [3], "a line with no other loss"  # fmt: skip


def test_the_log_is_a_table_that_80_columns_hold(home, losses):
    said = tiny.train(home, 1, "run.name=each", *STEPS, "train.max_steps=20").stdout
    lines = said.splitlines()
    head = next(n for n, line in enumerate(lines) if line.lstrip().startswith("step "))
    row = next(line for line in lines[head:] if re.match(r" *13/20 ", line))
    ends = [[m.end() for m in re.finditer(r"\S+", line)] for line in (lines[head], row)]
    names = lines[head].replace("mem GB", "mem_GB").split()
    assert names == ["step", "epoch", "loss", "mean", "lr", "grad", "tokens/s", "mem_GB", "left"]
    assert len(names) == len(row.split()) and len(row) <= 68
    ends[0].remove(lines[head].index(" GB"))  # two words of one name
    assert ends[0][:-1] == ends[1][:-1], "each number ends below the name of its column"


def attempt(samples: int, batch: int, max_steps: int) -> Attempt:
    config = load(tiny.ROOT / "config.yaml", [f"train.global_batch_size={batch}",
                  "train.micro_batch_size=1"])  # fmt: skip
    return Attempt(config, None, config.batch_plan(1), None, None, None, max_steps, samples)


@pytest.mark.parametrize(
    ("samples", "batch", "due"),
    [
        (10, 4, [3, 5, 8, 10, 13, 15, 17]),  # 12, 20, 32, 40, 52, 60 samples: 10, 20, 30, ...
        (8, 4, [2, 4, 6, 8, 10, 12, 14, 16, 17]),
        (4, 4, list(range(1, 18))),
        (7, 4, [2, 4, 6, 7, 9, 11, 13, 14, 16, 17]),
        (100, 4, [17]),
    ],
)
def test_an_epoch_ends_with_the_first_step_that_has_seen_all_of_it(samples, batch, due):
    assert batch <= samples
    last = 17
    it = attempt(samples, batch, last)
    assert [step for step in range(1, last + 1) if it.is_due(step, "epoch")] == due
    ends = [-(-epoch * samples // batch) for epoch in range(1, last * batch // samples + 1)]
    assert due == sorted({*ends, last})


def test_a_run_saves_and_evaluates_at_the_end_of_each_epoch_and_of_itself(own_home):
    words = ["train.max_steps=null", "train.num_train_epochs=2.4", "train.global_batch_size=64",
             "checkpoint.save_steps=epoch", "eval.eval_steps=epoch", "eval.prompts=[]",
             "checkpoint.save_total_limit=9", "run.name=epochs"]  # fmt: skip
    said = tiny.train(own_home, 2, *words).stdout
    epochs = tiny.metrics(own_home, "epochs", "epoch")
    last = max(epochs)
    ends = [next(step for step in epochs if epochs[step] >= epoch) for epoch in (1, 2)]
    assert 2.4 <= epochs[last] < 2.5
    assert sorted(tiny.metrics(own_home, "epochs", "eval_loss")) == [*ends, last]
    saved = [step for step, _ in checkpoints(own_home / "runs/epochs/checkpoints")]
    assert sorted(saved) == [*ends, last]
    told = f"checkpoint.save_steps and eval.eval_steps=epoch: every {ends[0]} steps, which a kill"
    assert told in said


def test_settings_as_shipped_that_have_no_effect_are_not_told(home):
    shipped = load(tiny.ROOT / "config.yaml", [])
    assert shipped.train.num_train_epochs == corpus.EPOCHS_AS_SHIPPED
    assert shipped.optim.warmup_steps == corpus.WARMUP_AS_SHIPPED
    ratio, own = "optim.warmup_ratio=0.1", "optim.warmup_steps is not used: optim.warmup_ratio"
    shipped = load(tiny.ROOT / "config.yaml", [ratio])
    opened = corpus.open_corpus(home, load(home / "config.yaml", []))
    assert not any("warmup" in line for line in corpus.not_used(shipped, opened))
    asked = load(home / "config.yaml", [ratio])  # which has 10 steps
    assert any(own in line for line in corpus.not_used(asked, opened))
