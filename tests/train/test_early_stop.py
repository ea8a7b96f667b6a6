"""The best checkpoint, and the end by eval.patience: right, also if ranks are killed on the way."""

import hashlib
import json
import random
import shutil

import pytest
import torch
import transformers

import tiny
from trainstack.checkpoint.names import BEST, LATEST, checkpoints, linked
from trainstack.checkpoint.state import STATE, TrainState, read_state
from trainstack.config.load import load
from trainstack.data.corpus import enough_samples, not_used, open_corpus
from trainstack.errors import ConfigError
from trainstack.run.folder import RunFolder, lines_until
from trainstack.storage import layout
from trainstack.storage.manifest import hash_file, write_manifest
from trainstack.train.ending import best_before

# Words at random, again and again: the held-out loss falls, and then only wavers.
SETTINGS = [
    "train.max_steps=40", "optim.learning_rate=0.02", "optim.warmup_steps=2",
    "optim.lr_scheduler_type=constant_with_warmup", "optim.lr_scheduler_kwargs={}",
    "eval.eval_steps=3", "eval.eval_samples=null", "eval.keep_best=true", "eval.patience=3",
    "eval.prompts=[]", "checkpoint.save_steps=10", "checkpoint.save_total_limit=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A project of 30 documents, of which half are held out."""
    folder, generator = tmp_path_factory.mktemp("few"), random.Random(5)
    tiny.make_model(folder)
    texts = [" ".join(generator.choice(tiny.WORDS) for _ in range(60)) for _ in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    data = layout.dataset_folder(folder, "tiny", None)
    tiny.publish(data, {"train.jsonl": lines}, kind="dataset")
    config = tiny.write_config(folder, data__eval_fraction=0.5)
    tiny.run_command("prepare", "--home", folder, "--config", config)
    return folder


def train(home, name: str, *settings: str, processes: int = 1) -> RunFolder:
    tiny.train(home, processes, f"run.name={name}", *SETTINGS, *settings)
    return RunFolder(home / "runs" / name)


@pytest.fixture(scope="module")
def stopped(few):
    return train(few, "stopped", processes=2)


def weights(run: RunFolder) -> dict[str, str]:
    files = sorted(run.checkpoints.glob("checkpoint-*/**/*.safetensors"))
    return {str(f.relative_to(run.checkpoints)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files}  # fmt: skip


def events(run: RunFolder, *names: str) -> list[dict]:
    return [event for event in run.events() if event["event"] in names]


def test_a_run_whose_held_out_loss_rises_ends_early_and_says_why(stopped):
    status, losses = stopped.status(), stopped.eval_losses()
    best, last = min(losses, key=losses.get), max(losses)
    assert (status["state"], status["step"]) == ("DONE", last) and last < 40
    assert last == best + 9, "three evaluations without a lower loss"
    (event,) = events(stopped, "early_stop")
    assert (event["step"], event["best_step"], event["evaluations"]) == (last, best, 3)
    assert status["cause"] == f"stopped early: {event['cause']}"
    assert f"3 evaluations without a held-out loss below {losses[best]:.4f} of" in event["cause"]
    assert status["next_action"].endswith("/checkpoints/best")
    assert linked(stopped.checkpoints, LATEST).name == f"checkpoint-{last}"
    tiny.run_command("ledger", stopped.path)


def held_out_loss(home, checkpoint) -> float:
    """By transformers alone, over all that is held out."""
    config = load(home / "config.yaml", SETTINGS)
    (store,) = open_corpus(home, config).stores.values()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    total, targets = 0.0, 0
    for sample in range(store.eval.num_samples):
        rows = torch.from_numpy(store.eval.read(torch.tensor([sample]).numpy())[:2, 0].copy())
        with torch.no_grad():
            logits = model(input_ids=rows[:1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, rows[1], reduction="sum")
        total, targets = total + loss.item(), targets + int((rows[1] != -100).sum())
    return total / targets


def test_the_best_checkpoint_is_the_best_of_all_that_were_saved(few):
    run = train(few, "all", "checkpoint.save_steps=3", "checkpoint.save_total_limit=20")
    found = {step: held_out_loss(few, path) for step, path in checkpoints(run.checkpoints)}
    assert linked(run.checkpoints, BEST).name == f"checkpoint-{min(found, key=found.get)}"
    assert {
        step: pytest.approx(loss, rel=1e-4) for step, loss in found.items()
    } == run.eval_losses()


@pytest.mark.parametrize("fault", [
    *(f"kill:rank=0,step={step}" for step in (4, 13, 16)), "crash:rank=0,op=24",
])  # fmt: skip
def test_whoever_is_killed_the_decision_and_every_byte_are_the_same(few, stopped, fault):
    name = "killed-" + fault.translate(str.maketrans(":=,", "---"))
    options = ["--fault", fault]
    result = tiny.train(few, 2, f"run.name={name}", *SETTINGS, *options, check=False)
    assert result.returncode != 0, "the fault did not happen"
    run = RunFolder(few / "runs" / name)
    broken = [p for p in run.checkpoints.iterdir() if p.is_symlink() and not p.exists()]
    assert not broken
    tiny.train(few, 2, f"run.name={name}", *SETTINGS)
    assert run.eval_losses() == stopped.eval_losses()
    assert weights(run) == weights(stopped)
    mine, theirs = (events(r, "early_stop")[-1] for r in (run, stopped))
    assert all(mine[key] == theirs[key] for key in ("step", "best_step", "evaluations", "cause"))
    assert linked(run.checkpoints, BEST).name == linked(stopped.checkpoints, BEST).name


def rewrite_state(checkpoint, *without: str, **changes) -> None:
    """Give a checkpoint another state.json, sealed, without some keys."""
    path, sealed = checkpoint / STATE, json.loads((checkpoint / "manifest.json").read_bytes())
    values = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({key: values[key] for key in values if key not in without}))
    (checkpoint / "manifest.json").unlink()
    entries = sealed["files"] | {STATE: hash_file(path)}
    write_manifest(checkpoint, entries, kind="checkpoint", step=sealed["step"])


def test_an_attempt_that_died_between_the_last_save_and_done_decides_alike(few, stopped):
    run = RunFolder(shutil.copytree(stopped.path, few / "runs/undone", symlinks=True))
    run.set_status("RUNNING")
    train(few, "undone", processes=2)
    assert run.status()["state"] == "DONE" and run.status()["cause"] == stopped.status()["cause"]
    assert run.eval_losses() == stopped.eval_losses() and weights(run) == weights(stopped)


def test_an_evaluation_that_a_stop_cut_short_is_made_first_and_decides_alike(few, stopped):
    last = stopped.status()["step"]
    run = RunFolder(shutil.copytree(stopped.path, few / "runs/cut", symlinks=True))
    cut = {"is_evaluated": False, "evaluations_without_better": 2}
    rewrite_state(run.checkpoints / f"checkpoint-{last}", **cut)
    (run.path / "metrics.jsonl").write_bytes(
        b"".join(
            line for r, line in lines_until(run.path / "metrics.jsonl", last)
            if not ("eval_loss" in r and r["step"] == last)
        )
    )  # fmt: skip
    (run.checkpoints / BEST).unlink()
    train(few, "cut", processes=2)
    assert run.status()["cause"] == stopped.status()["cause"]
    assert run.eval_losses() == stopped.eval_losses() and weights(run) == weights(stopped)
    assert linked(run.checkpoints, BEST).name == linked(stopped.checkpoints, BEST).name


def test_what_nothing_held_out_makes_impossible_is_told_before_the_queue(few):
    settings = [*SETTINGS, "data.eval_fraction=0"]
    tiny.run_command("prepare", "--home", few, "--config", few / "config.yaml", settings[-1])
    config = load(few / "config.yaml", settings)
    corpus = open_corpus(few, config)
    with pytest.raises(ConfigError, match="eval.patience=3: there are no held-out documents; "):
        enough_samples(config, corpus)
    assert any(line.startswith("eval.keep_best is not used") for line in not_used(config, corpus))


def test_more_patience_continues_where_it_stopped(few, stopped):
    shutil.copytree(stopped.path, few / "runs" / "further", symlinks=True)
    last = stopped.status()["step"]
    run = train(few, "further", "eval.patience=5", processes=2)
    assert run.status()["state"] == "DONE" and run.status()["step"] > last
    whole = train(few, "whole", "eval.patience=5", processes=2)
    assert whole.eval_losses() == run.eval_losses()
    assert weights(whole) == weights(run)


def test_an_equal_loss_and_a_nan_are_not_better():
    state = TrainState.at_start({}, {}, [], data_sets=1)
    seen = []
    for state.step, loss in enumerate([float("nan"), float("inf"), 2.0, 2.0, float("nan"), 1.5], 1):
        seen.append((state.take_in(loss), state.best_step, state.evaluations_without_better))
    assert seen == [(False, 0, 1), (False, 0, 2), (True, 3, 0), (False, 3, 1), (False, 3, 2),
                    (True, 6, 0)]  # fmt: skip
    assert TrainState.from_json(state.to_json(), "x") == state


def test_a_lower_held_out_loss_of_before_is_told_with_its_checkpoint(tmp_path):
    state = TrainState.at_start({}, {}, [], data_sets=1)
    assert best_before(state, tmp_path) == "", "of a run that evaluated nothing"
    state.step = 20
    state.take_in(3.5)
    assert best_before(state, tmp_path) == ""
    state.step = 30
    state.take_in(3.75)
    said = "the held-out loss was lowest at step 20, 3.5000: "
    assert best_before(state, tmp_path) == f"{said}not kept (eval.keep_best=true keeps it)"
    (tmp_path / "checkpoint-20").mkdir()
    assert best_before(state, tmp_path) == f"{said}kept in {tmp_path / 'checkpoint-20'}"


def test_a_run_of_the_version_before_resumes(few):
    """Its state.json has nothing of the best loss: that begins with the next evaluation."""
    run = train(few, "old", "train.max_steps=9", "eval.patience=null", "checkpoint.save_steps=9")
    newest = run.checkpoints / "checkpoint-9"
    rewrite_state(newest, "best_step", "best_loss", "evaluations_without_better")
    assert read_state(newest).best_loss is None
    run = train(few, "old", "train.max_steps=12", "eval.patience=null")
    assert run.status()["step"] == 12
    assert read_state(run.checkpoints / "checkpoint-12").best_step == 12
