"""Whole runs of an adapter: the promises, and what other programs make of its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny
from trainstack.config.load import load
from trainstack.data.corpus import not_used, open_corpus
from trainstack.errors import Refused
from trainstack.job.inputs import check_progress, input_problem, not_needed
from trainstack.monitor.clean import needs_of
from trainstack.run.folder import RunFolder
from trainstack.storage import files, layout, manifest

LORA = ("model.init=pretrained", "adapter.type=lora", "adapter.r=4", "adapter.alpha=8")
WEIGHTS = "model.safetensors"


def give_weights(home: Path, seed: int) -> Path:
    """Random weights for the tiny model, as a download would bring them."""
    folder = layout.model_folder(home, "tiny")
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    made.save_pretrained(folder / "made")
    data = (folder / "made" / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "made")
    entries = manifest.read_manifest(folder)["files"]
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / manifest.MANIFEST).unlink()
    entries[WEIGHTS] = files.write_file(folder / WEIGHTS, data)
    facts = {"source": "test", "revision": "main", "commit": "c0ffee", "kind": "model"}
    manifest.write_manifest(folder, entries, **facts, has_weights=True)
    return folder


@pytest.fixture(scope="module")
def base(home, tmp_path_factory) -> Path:
    """A project whose tiny model has weights."""
    folder = tmp_path_factory.mktemp("adapter") / "home"
    shutil.copytree(home, folder, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    give_weights(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def reference(base):
    return tiny.train(base, 2, "run.name=reference", *LORA)


def checkpoint(home: Path, run: str, step: int = 20) -> Path:
    return home / "runs" / run / "checkpoints" / f"checkpoint-{step}"


def content(home: Path, run: str) -> dict[str, bytes]:
    """What counts of the last checkpoint, whatever attempt wrote it."""
    folder = checkpoint(home, run)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.name: p.read_bytes() for p in paths if p.name not in ("state.json", "manifest.json")}


def test_it_learns_and_says_what_learns(base, reference):
    losses = tiny.metrics(base, "reference")
    assert losses[20] < losses[1] - 0.3, losses
    assert "frozen but for LoRA of" in reference.stdout
    assert "peft.PeftModel.from_pretrained(AutoModelForCausalLM" in reference.stdout
    assert "sample  one" in reference.stdout


def test_a_checkpoint_holds_the_adapter_alone_and_no_path(base, reference):
    names = {*content(base, "reference")}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not names & {"config.json", WEIGHTS}
    settings = json.loads(content(base, "reference")["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "tiny" and settings["revision"] == "c0ffee"
    assert str(base) not in json.dumps(settings)
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_pefts_own_loader_gives_the_logits_of_the_run(base, reference):
    folder = layout.model_folder(base, "tiny")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(1, 17).unsqueeze(0)
    before = plain(tokens).logits
    loaded = PeftModel.from_pretrained(plain, checkpoint(base, "reference")).eval()
    weights = load_file(checkpoint(base, "reference") / "adapter_model.safetensors")
    state = loaded.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor), name
    assert len(weights) == sum("lora_" in name for name in state)
    moved = (loaded(tokens).logits - before).abs().max()
    assert moved > 0.1, "the adapter says something"
    AutoTokenizer.from_pretrained(checkpoint(base, "reference"))


def test_three_kills_change_no_byte_of_it(base, reference):
    kills = ("kill:rank=1,step=7", "kill:rank=0,step=13", "kill:rank=1,step=17")
    for kill in kills:
        broken = tiny.train(base, 2, "run.name=killed", *LORA, f"--fault={kill}", check=False)
        assert broken.returncode, "it was killed"
        drop_lease(base, "killed")
    tiny.train(base, 2, "run.name=killed", *LORA)
    assert content(base, "killed") == content(base, "reference")
    assert tiny.metrics(base, "killed") == tiny.metrics(base, "reference")


def drop_lease(home: Path, run: str) -> None:
    """As if Slurm had said that the job is gone."""
    shutil.rmtree(home / "runs" / run / "lease")


def test_the_number_of_processes_changes_nothing_but_the_speed(base):
    exact = (*LORA, "train.precision=fp64", "train.micro_batch_size=1")
    for processes, steps in ((2, 5), (1, 10), (4, 20)):
        tiny.train(base, processes, "run.name=moving", *exact, f"train.max_steps={steps}",
                   "optim.lr_scheduler_type=constant", "optim.lr_scheduler_kwargs={}")  # fmt: skip
    tiny.train(base, 1, "run.name=one", *exact, "optim.lr_scheduler_type=constant",
               "optim.lr_scheduler_kwargs={}")  # fmt: skip
    one, moved = (tiny.metrics(base, run) for run in ("one", "moving"))
    assert moved == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=bf16", "train.activation_checkpointing=true", "adapter.dropout=0.1"),
        ("train.precision=fp16", "adapter.target_modules=[q_proj, v_proj]"),
    ],
)
def test_precisions_and_settings_run_and_resume(base, settings):
    name = settings[0].rpartition("=")[2]
    made = ("train.max_steps=6", "optim.warmup_steps=1", "checkpoint.save_steps=3")
    tiny.train(base, 2, f"run.name={name}", *LORA, *settings, *made)
    tiny.train(base, 2, f"run.name={name}-2", *LORA, *settings, *made)
    shutil.rmtree(checkpoint(base, f"{name}-2", 6))
    again = tiny.train(base, 2, f"run.name={name}-2", *LORA, *settings, *made)
    assert "resume" in again.stdout
    kept = load_file(checkpoint(base, name, 6) / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in kept.values()} == {"torch.float32"}
    last = load_file(checkpoint(base, f"{name}-2", 6) / "adapter_model.safetensors")
    assert all(torch.equal(tensor, last[key]) for key, tensor in kept.items())


def test_its_checkpoint_is_evaluated_exported_and_merged(base, reference, tmp_path):
    lines = (base / "runs/reference/metrics.jsonl").read_text().splitlines()
    known = [line for line in map(json.loads, lines) if "eval_loss" in line][-1]
    measured = tiny.run_command("eval", "reference", "--home", base, "--json")
    found = json.loads(measured.stdout)
    assert [found[key] for key in ("eval_loss", "eval_token_accuracy")] == [
        known[key] for key in ("eval_loss", "eval_token_accuracy")
    ]
    for name, *options in (["alone"], ["merged", "--merge"]):
        tiny.run_command("export", "reference", "--home", base, "--to", tmp_path / name, *options)
    model = layout.model_folder(base, "tiny")
    ids = torch.arange(1, 21).reshape(1, 20)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "alone"
    )
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(
            whole(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits, atol=1e-3
        )


def test_another_model_under_its_name_is_neither_evaluated_nor_merged(base, reference, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(base, home, symlinks=True)
    give_weights(home, seed=7)
    for command in (["eval", "reference"], ["export", "reference", "--to", tmp_path / "out"]):
        done = tiny.run_command(*command, "--home", home, check=False)
        assert done.returncode in (1, 2) and not (tmp_path / "out").exists()
        assert "has other weights than the adapter learned beside" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_that_was_written_over_since_is_noticed_before_it_is_used(
    base, reference, tmp_path
):
    home = tmp_path / "home"
    shutil.copytree(base, home, symlinks=True)
    weights = layout.model_folder(home, "tiny") / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = tiny.train(home, 1, "run.name=reference", "train.max_steps=21", *LORA, check=False)
    measured = tiny.run_command("eval", "reference", "--home", home, check=False)
    for done, said in ((again, again.stdout), (measured, measured.stderr)):
        assert done.returncode == 2
        assert "is another than when it was brought (model.safetensors: hash differs)" in said


def test_a_run_that_may_resume_needs_its_model_and_no_other(base, reference, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(base, home, symlinks=True)
    config = load(home / "config.yaml", ["run.name=reference", *LORA])
    folder, run = layout.model_folder(home, "tiny"), RunFolder(home / "runs" / "reference")
    assert folder in needs_of(home)["reference"]
    give_weights(home, seed=1)
    with pytest.raises(Refused, match="its adapter learned beside other weights of model.name"):
        check_progress(run, config, open_corpus(home, config, run.checkpoints))
    refused = tiny.train(home, 1, "run.name=reference", *LORA, check=False)
    assert refused.returncode == 78 and "other weights of model.name" in refused.stdout
    shutil.rmtree(folder)
    problem = input_problem(home, config, "bash fetch", run.checkpoints)
    assert problem == "model tiny is not in the project's folder yet; run: bash fetch"
    assert not [line for line in not_needed(home, config, run.checkpoints) if "model" in line]


def test_settings_of_an_adapter_that_is_not_there_are_said(home):
    def lines(*overrides: str) -> list[str]:
        config = load(home / "config.yaml", [*overrides])
        return [line for line in not_used(config, open_corpus(home, config)) if "adapter" in line]

    assert lines("adapter.r=4") == ["adapter.r is not used: adapter.type is null"]
    assert not lines() and not lines(*LORA)
