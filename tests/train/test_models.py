"""Whole runs of models that are more than a Llama, resumed to the same bytes."""

import hashlib
import shutil
from pathlib import Path

import pytest

import tiny

STEPS = 4
MODELS = {  # configuration, and what a run and a resumed run say of it, once
    "a soft cap that logits reach later, and dropout": ({
        "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0,
        "final_logit_softcapping": 2.0, "attention_dropout": 0.1,
    }, "model: its logits are more than a linear head"),
    "experts, and an index without a gradient": ({
        "model_type": "deepseek_v32", "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "pad_token_id": 0,
    }, " parameters get no gradient from text and stay as they are: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder)
    tiny.make_dataset(folder, documents=60)
    config = tiny.write_config(
        folder, train__max_steps=STEPS, checkpoint__save_steps=2, eval__eval_steps=None,
        eval__prompts=[], optim__learning_rate=0.03, optim__warmup_steps=1,
        model__attn_implementation="eager",
    )  # fmt: skip
    tiny.run_command("prepare", "--home", folder, "--config", config)
    return folder


def weights_hash(home: Path, run: str) -> str:
    path = home / "runs" / run / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_of_two_processes_ends_in_the_same_bytes(home, monkeypatch, kind):
    settings, said = MODELS[kind]
    monkeypatch.setattr(tiny, "CONFIG", {**tiny.CONFIG, "architectures": None, **settings})
    name = settings["model_type"]
    tiny.make_model(home, name)
    whole = tiny.train(home, 2, f"run.name={name}", f"model.name={name}")
    assert whole.stdout.count(said) == 1, whole.stdout
    shutil.copytree(home / "runs" / name, home / "runs/parted", dirs_exist_ok=True)
    shutil.rmtree(home / f"runs/parted/checkpoints/checkpoint-{STEPS}")
    resumed = tiny.train(home, 2, "run.name=parted", f"model.name={name}")
    assert resumed.stdout.count(said) == 1, resumed.stdout
    assert tiny.metrics(home, "parted") == tiny.metrics(home, name)
    assert weights_hash(home, "parted") == weights_hash(home, name)
    shutil.rmtree(home / "runs/parted")
