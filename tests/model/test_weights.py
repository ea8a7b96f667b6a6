"""Weights that are not those of config.json are named before the queue, without reading them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import tiny
from trainstack.config.load import load
from trainstack.errors import ConfigError
from trainstack.model import proof, rehearsal
from trainstack.model.causal_lm import build_causal_lm, check_weights

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "llama": transformers.LlamaConfig(**SMALL, **HEADS),
    "tied": transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, **HEADS),
    "mixtral": transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
}


def saved(folder: Path, kind: str = "llama", rename=None, **changes) -> Path:
    """A model of that kind, with ``changes`` in its config.json and its tensors renamed."""
    AutoModelForCausalLM.from_config(KINDS[kind]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if rename:
        weights = load_file(folder / "model.safetensors")
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        renamed.pop(None, None)
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def check(folder: Path) -> list[str]:
    return check_weights(folder, rehearsal.build_whole(AutoConfig.from_pretrained(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_fit_are_no_line(tmp_path, kind):
    assert check(saved(tmp_path, kind)) == []


def test_the_names_of_earlier_releases_and_the_files_of_an_index_are_known(tmp_path):
    folder = saved(tmp_path / "old", "gpt2", lambda name: name.removeprefix("transformer."))
    assert check(folder) == []
    parts = AutoModelForCausalLM.from_config(KINDS["llama"])
    parts.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    assert check(tmp_path / "parts") == []


WRONG = {
    "compiled": ({"rename": lambda name: f"_orig_mod.{name}"}, "without _orig_mod. in front"),
    "wrapped": ({"rename": lambda name: f"module.{name}"}, "save them again without module. in"),
    "compiled and tied": (
        {"kind": "tied", "rename": lambda name: f"_orig_mod.{name}"},
        "they have _orig_mod.model.embed_tokens.weight: save them again without _orig_mod. in",
    ),
    "fewer layers": ({"num_hidden_layers": 4}, "no model.layers.2.input_layernorm.weight"),
    "no head": (
        {"rename": lambda name: None if name == "lm_head.weight" else name},
        "have no lm_head.weight, which would be new and random; they are not those of config.json",
    ),
    "other rows": ({"vocab_size": 116}, "lm_head.weight of shape [96, 32], and config.json asks"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_one_line_before_the_queue_and_in_the_job(tmp_path, name):
    changes, said = WRONG[name]
    folder = saved(tmp_path, **changes)
    config = load(tiny.ROOT / "config.yaml", [f"model.name={folder}", "model.init=pretrained"])
    for tried in (
        lambda: rehearsal.rehearse(folder, config),
        lambda: build_causal_lm(folder, "pretrained", config.model, "fp32", 0),
    ):
        with pytest.raises(ConfigError) as caught:
            tried()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    scratch = load(tiny.ROOT / "config.yaml", [f"model.name={folder}", "model.init=scratch"])
    rehearsal.rehearse(folder, scratch)


def test_tensors_that_are_not_used_are_counted(tmp_path):
    (line,) = check(saved(tmp_path, num_hidden_layers=1))
    assert "9 of the 21 tensors of its weights are not used, such as model.layers.1." in line


@pytest.mark.parametrize(
    ("kind", "more"), [("glm4_moe", "model.layers.46.eh_proj"), ("qwen3_next", "mtp.fc")]
)
def test_layers_that_predict_further_tokens_are_told_though_transformers_is_silent(
    tmp_path, kind, more
):
    config = CONFIG_MAPPING[kind](
        **SMALL, **HEADS, moe_intermediate_size=16, n_routed_experts=4, num_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, num_nextn_predict_layers=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert check(tmp_path) == []
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{more}.weight"] = torch.zeros(4, 4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (line,) = check(tmp_path)
    assert f"1 of the {len(weights)} tensors" in line and more in line
    assert "do not have them, though their config.json says num_nextn_predict_layers=1" in line


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masks_and_tables_of_earlier_releases_are_no_line(tmp_path, kind):
    folder = saved(tmp_path, kind)
    weights = load_file(folder / "model.safetensors")
    name = "h.0.attn.bias" if kind == "gpt2" else "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights[name] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert check(folder) == []


def test_seeds_beyond_32_bits_draw_other_weights(tmp_path):
    folder, section = saved(tmp_path), load(tiny.ROOT / "config.yaml", []).model
    drawn = [
        build_causal_lm(folder, "scratch", section, "fp32", seed).lm_head.weight[0, 0].item()
        for seed in (1, 2**32 + 1, 2**33 + 1, 2**63 - 1)
    ]
    assert len({*drawn}) == 4, drawn


def test_settings_of_generating_that_cannot_be_loaded_are_refused(tmp_path):
    folder = saved(tmp_path)
    assert check(folder) == []
    (folder / "generation_config.json").write_text('{"num_return_sequences": 2}')
    with pytest.raises(ConfigError, match="cannot read its generation_config.json .*; correct it"):
        check(folder)


def test_two_tensors_that_config_json_calls_one_are_a_line(tmp_path):
    folder = saved(tmp_path, "tied")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(96, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (line,) = check(folder)
    assert "lm_head.weight is model.embed_tokens.weight, but its weights have both" in line


def test_the_answer_depends_on_the_weights_only_where_they_are_used(tmp_path):
    def key(init: str, content: str) -> str:
        files = {"config.json": "{}", "model.safetensors": content}
        folder = tiny.publish(tmp_path / init / content, files, kind="model")
        return proof.proof_key(folder, load(tiny.ROOT / "config.yaml", [f"model.init={init}"]))

    assert key("pretrained", "a") != key("pretrained", "b")
    assert key("scratch", "a") == key("scratch", "b")
