"""Whether a model can be trained as configured is known before the queue, by name and reason."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from trainstack.config.load import load
from trainstack.errors import ConfigError
from trainstack.model import proof, rehearsal
from trainstack.model.causal_lm import build_causal_lm
from trainstack.model.loss import CausalLMLoss
from trainstack.model.small_copy import small_configs
from trainstack.model.trial import TOKENS, logits_of, some_tokens

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {
    **GROUPED, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": 96}
BAMBA = {
    **SMALL, "num_key_value_heads": 2, "num_hidden_layers": 10, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, max_position_embeddings=48),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "codegen": lambda: transformers.CodeGenConfig(**GPT2, rotary_dim=8),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=48
    ),
    "mpt": lambda: transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=48, vocab_size=96
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, query_pre_attn_scalar=8),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=8),
    "mamba": lambda: transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4
    ),
    "lfm2": lambda: transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**LINEAR),
    "qwen3_5 with vision": lambda: transformers.Qwen3_5Config(
        text_config=LINEAR, vision_config={**VISION, "out_hidden_size": 32}
    ),
    "bert": lambda: transformers.BertConfig(**SMALL),
    "bert decoder": lambda: transformers.BertConfig(**SMALL, is_decoder=True),
    "bart": lambda: transformers.BartConfig(d_model=32, vocab_size=96),
    "t5": lambda: transformers.T5Config(d_model=32, num_layers=2, vocab_size=96),
    "vit": lambda: transformers.ViTConfig(hidden_size=32),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=GROUPED, vision_config={**VISION, "out_hidden_size": 32}
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, max_window_layers=0
    ),
    "bamba": lambda: transformers.BambaConfig(**BAMBA, attn_layer_indices=[9]),
    "bamba without attention": lambda: transformers.BambaConfig(**BAMBA),
    "emu3": lambda: transformers.Emu3Config(),
    "gemma3n": lambda: transformers.Gemma3nConfig(),
}
SHIPPED = ("model.attn_implementation=auto", "data.seq_len=32")


def rehearse(folder: Path, name: str, *overrides: str, **changes) -> rehearsal.Rehearsal:
    """Of a configuration by its name in CONFIGS, with ``changes`` in its config.json."""
    values = {**CONFIGS[name]().to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    words = [f"model.name={folder}", *SHIPPED, *overrides]
    return rehearsal.rehearse(folder, load(tiny.ROOT / "config.yaml", words))


def refusal(folder: Path, name: str, *overrides: str, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        rehearse(folder, name, *overrides, **changes)
    (line,) = caught.value.problems
    head = f"model {folder} cannot be trained as configured: "
    assert line.startswith(head) and "\n" not in line
    return line.removeprefix(head)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "encoder-decoder model"),
        ("bart", "encoder-decoder model"),
        ("bert", "BertLMHeadModel is not causal: a token sees the tokens behind it"),
        ("vit", "is no causal LM"),
        ("qwen2_5_vl", "is made of several parts, .*; choose the text-only model"),
    ],
)
def test_what_is_no_causal_lm_is_refused_with_the_reason(tmp_path, name, reason):
    line = refusal(tmp_path, name)
    assert re.search(reason, line) and "choose " in line.rpartition("; ")[2]


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForSequenceClassification", "LlamaForTokenClassification", "OwnForRewardModel"],
)
def test_another_head_on_a_language_model_is_refused(tmp_path, architecture):
    line = refusal(tmp_path, "llama", architectures=[architecture])
    assert f"{architecture} has another head" in line


def test_a_model_without_its_head_trains_only_where_its_head_is_its_embedding(tmp_path):
    bare, scratch = {"architectures": ["LlamaModel"]}, "model.init=scratch"
    pretrained = "model.init=pretrained"
    assert "or none" in refusal(tmp_path, "llama", pretrained, **bare)
    rehearse(tmp_path, "llama", scratch, **bare)
    tied = {**bare, "tie_word_embeddings": True}
    values = {**CONFIGS["llama"]().to_dict(), **tied}
    transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**values)
    ).save_pretrained(tmp_path)
    rehearse(tmp_path, "llama", pretrained, **tied)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_quantised_weights_are_refused_and_from_scratch_they_are_not_used(tmp_path, method):
    quantised = {"quantization_config": {"quant_method": method, "bits": 4}}
    line = refusal(tmp_path, "llama", "model.init=pretrained", **quantised)
    assert f"quantised weights ({method})" in line and "name a repository that has them in" in line
    notes = rehearse(tmp_path, "llama", **quantised).notes
    assert any("quantised; from scratch it is not" in note for note in notes)
    section = load(tiny.ROOT / "config.yaml", []).model
    made = build_causal_lm(tmp_path, "scratch", section, "fp32", 0)
    made.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_type_that_transformers_does_not_know_is_told(tmp_path):
    newer = refusal(tmp_path, "llama", model_type="llama9")  # no typing error
    assert "does not know its model_type llama9; if it is newer, set a newer transformers" in newer
    assert refusal(tmp_path, "llama", model_type="unheard_of").endswith("choose another model")


def test_a_package_that_is_missing_is_named(tmp_path):
    if importlib.util.find_spec("timm"):
        pytest.skip("timm is installed")
    line = refusal(tmp_path, "gemma3n")
    assert line.startswith("a package that it needs is missing (") and "timm" in line


@pytest.mark.parametrize("name", ["gpt2", "opt", "codegen"])
def test_more_positions_than_a_table_has_are_refused_with_both_numbers(tmp_path, name):
    rehearse(tmp_path, name, "data.seq_len=48")
    line = refusal(tmp_path, name, "data.seq_len=49")
    assert line == (
        "data.seq_len=49: it has a table of 48 positions, and none beyond; write data.seq_len=48 "
        "or less"
    )


def test_more_positions_than_a_rotary_model_was_made_for_are_a_line(tmp_path):
    assert len(rehearse(tmp_path, "llama", "data.seq_len=48").notes) == 1
    (_, line) = rehearse(tmp_path, "llama", "data.seq_len=65536").notes
    assert "data.seq_len=65536 is beyond the 48 positions" in line


def test_sequences_beyond_those_of_a_model_that_is_told_no_positions_are_tried_whole(tmp_path):
    rehearse(tmp_path, "mpt", "data.seq_len=48")
    assert "a table of 48 positions" in refusal(tmp_path, "mpt", "data.seq_len=64")


@pytest.mark.parametrize("name", ["mamba", "lfm2", "qwen3_5"])
def test_recurrent_and_hybrid_models_take_one_document_a_row_or_all_joined(tmp_path, name):
    for packing in ("none", "concat"):
        rehearse(tmp_path, name, f"data.packing={packing}")
    line = refusal(tmp_path, name, "data.packing=best_fit")
    assert line.endswith("see each other; write data.packing=none or data.packing=concat")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_keep_documents_apart_in_every_precision(tmp_path, precision):
    rehearse(tmp_path, "mixtral", "data.packing=best_fit", f"train.precision={precision}")


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba", "eager")]
)
def test_auto_takes_the_best_attention_that_a_model_has_and_says_it_once(tmp_path, name, attention):
    notes = rehearse(tmp_path, name).notes
    assert sum("attention" in note for note in notes) == 1
    assert f"learns with {attention} attention, fp32, packing concat; not tried: " in notes[0]


def test_attention_that_a_model_does_not_have_is_refused_with_the_way_out(tmp_path):
    line = refusal(tmp_path, "gemma2", "model.attn_implementation=sdpa")
    assert line.endswith("; write model.attn_implementation=auto")
    rehearse(tmp_path, "gemma2", "model.attn_implementation=eager")


def test_flash_attention_is_refused_without_its_package(tmp_path):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    line = refusal(tmp_path, "llama", "model.attn_implementation=flash_attention_2")
    assert "flash-attn is not installed; write model.attn_implementation=auto" in line


def test_a_setting_with_which_its_code_fails_is_named_as_the_way_out(tmp_path, monkeypatch):
    forward = transformers.LlamaModel.forward

    def only_fp32(self, *arguments, **named):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this kernel\nknows no bf16")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(transformers.LlamaModel, "forward", only_fp32)
    line = refusal(tmp_path, "llama", "train.precision=bf16")
    assert "this kernel" in line and line.endswith("; write train.precision=fp32")


WRONG = [  # model and its config.json, and what of it is to be written or corrected
    ("llama", {"num_key_value_heads": 3}, 'write "num_key_value_heads": null in its config.json'),
    ("llama", {"hidden_act": "swiglu"}, 'correct "hidden_act" in its config.json'),
    ("llama", {"rms_norm_eps": "1e-6"}, 'correct "rms_norm_eps" in its config.json'),
    pytest.param(  # half a minute, as the next that is found by what it does to the loss
        "llama", {"rms_norm_eps": -1.0}, 'correct "rms_norm_eps" in its', marks=pytest.mark.matrix
    ),
    ("llama", {"rope_parameters": {"rope_type": "own"}}, 'correct "rope_parameters" in its'),
    ("llama", {"pad_token_id": 96}, 'write "pad_token_id": null or correct'),
    pytest.param(
        "llama",
        {"attention_dropout": 2.0},
        'correct "attention_dropout" in its',
        marks=pytest.mark.matrix,
    ),
    ("llama", {"return_dict": False}, 'write "return_dict": null in its config.json'),
    ("qwen2", {"layer_types": ["full_attention"]}, 'correct "layer_types" in its config.json'),
    (
        "llama",
        {"model_type": "LLaMA"},
        'write "model_type": "llama" in its config.json, or choose another',
    ),
    ("llama", {"architectures": "OwnModel"}, 'write "architectures": ["LlamaForCausalLM"] in its'),
    ("bert", {}, 'write "is_decoder": true in its config.json, or choose a causal LM such as'),
]


@pytest.mark.parametrize(("name", "wrong", "fix"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_of_config_json_is_named_with_what_helps(tmp_path, name, wrong, fix):
    line = refusal(tmp_path, name, **wrong)
    assert fix in line.rpartition("; ")[2]


WINDOWED = {"mistral": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0}}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("window", [0, -1])
def test_what_trains_and_cannot_generate_is_refused_with_the_line_of_config_json(
    tmp_path, monkeypatch, name, window
):
    written = transformers.PreTrainedConfig(model_type=name, **GROUPED, **WINDOWED[name])
    monkeypatch.setitem(CONFIGS, name, lambda: written)  # without what the class makes of it
    line = refusal(tmp_path, name, model_type=name, sliding_window=window)
    assert line.startswith("it trains, but generate() fails with it (RuntimeError: ")
    assert re.search('; .*write "sliding_window": null.* in its config.json$', line)
    for other in (None, 8):
        assert len(rehearse(tmp_path, name, model_type=name, sliding_window=other).notes) == 1


def test_a_model_that_transformers_cannot_ask_is_a_line(tmp_path):
    (*_, line) = rehearse(tmp_path, "bamba without attention").notes
    assert line.startswith("it trains, but generate() fails with it (ValueError: ")
    short = rehearse(tmp_path, "gpt2", "data.seq_len=16", n_positions=16).notes
    assert not any("generate()" in note for note in short)
    assert len(rehearse(tmp_path, "bamba").notes) == 1  # its one layer of attention is the tenth


def test_a_model_that_generates_by_other_logits_than_it_learns_by_is_a_line(tmp_path, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def other(self, *arguments, past_key_values=None, **named):
        output = forward(self, *arguments, past_key_values=past_key_values, **named)
        output.logits = output.logits * (1 if past_key_values is None else 1.5)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", other)
    (*_, line) = rehearse(tmp_path, "llama").notes
    assert line == "it trains, but generate() has other logits than training, by 50%"


def test_of_a_model_with_parts_only_its_text_is_saved_and_that_is_said(tmp_path):
    notes = rehearse(tmp_path, "qwen3_5 with vision").notes
    assert notes[-1].endswith("for text is trained and saved, as Qwen3_5ForCausalLM")


def test_a_part_for_text_that_could_not_be_resumed_is_refused(tmp_path):
    assert "is saved as a model that transformers does not load" in refusal(tmp_path, "emu3")


def test_a_decoder_of_an_encoders_type_is_taken(tmp_path):
    rehearse(tmp_path, "bert decoder")


def test_a_model_of_671_billion_parameters_is_tried_in_no_more_than_a_gigabyte(tmp_path):
    values = transformers.DeepseekV3Config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    code = (
        "import resource, sys, torch, transformers; from pathlib import Path;"
        "from trainstack.config.load import load; from trainstack.model.rehearsal import rehearse;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024;"
        "before = peak();"
        "found = rehearse(Path(sys.argv[1]), load(Path('config.yaml'), []));"
        "print(found.parameters, peak() - before, found.notes[0])"
    )
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.returncode == 0, done.stderr
    parameters, megabytes, summary = done.stdout.split(maxsplit=2)
    assert int(parameters) == 671_026_404_352 and "learns with" in summary
    assert int(megabytes) < 1024


FAMILIES = (
    "bloom", "cohere2", "deepseek_v3", "falcon", "falcon_mamba", "gemma3_text", "glm4_moe", "gpt2",
    "gpt_neox", "gpt_oss", "llama4_text", "mixtral", "modernbert-decoder", "mpt", "nemotron_h",
    "olmo2", "opt", "phi3", "qwen2", "qwen3_moe", "qwen3_next", "smollm3",
)  # fmt: skip
OF_A_KIND = {  # each stands for others of its way of attention, experts, positions or states
    "bloom", "deepseek_v3", "falcon_mamba", "gemma3_text", "gpt2", "gpt_oss", "mixtral",
    "modernbert-decoder", "nemotron_h", "phi3", "qwen2", "qwen3_next",
}  # fmt: skip
NAMES = sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
OTHERS = [pytest.param(n, marks=pytest.mark.matrix) for n in NAMES if n not in OF_A_KIND]


@pytest.mark.parametrize("name", [*sorted(OF_A_KIND), *OTHERS])
def test_every_architecture_has_the_loss_of_its_logits_or_is_refused(tmp_path, name):
    """As its configuration is by default: that of a real model, of up to a trillion parameters."""
    try:
        real = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]()
        CONFIGS[name] = lambda: real
        found = rehearse(tmp_path, name, "train.activation_checkpointing=true")
    except ConfigError as error:
        assert name not in FAMILIES, error
        return
    except Exception:  # a configuration that is not possible by itself, at its first line
        assert name not in FAMILIES and "real" not in locals()
        return
    if "no small copy" in found.notes[0]:
        assert name not in FAMILIES
        return
    small, _ = rehearsal.small_copy(real)
    small.save_pretrained(tmp_path)
    config = load(tiny.ROOT / "config.yaml", [])
    causal_lm = build_causal_lm(tmp_path, "scratch", config.model, "fp32", 0).eval()
    tokens = some_tokens(causal_lm, TOKENS)
    loss_model = CausalLMLoss(causal_lm, config.train, torch.device("cpu")).eval()
    logits = logits_of(causal_lm, tokens).detach().float()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="sum"
    )
    with torch.no_grad():
        loss = loss_model(tokens, tokens)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_a_small_copy_keeps_each_type_of_layer_and_the_size_of_heads():
    real = transformers.Gemma3TextConfig().to_dict()
    small = next(small_configs(real))
    assert {*small["layer_types"]} == {*real["layer_types"]}
    assert len(small["layer_types"]) == small["num_hidden_layers"] < real["num_hidden_layers"]
    assert small["head_dim"] == real["head_dim"]
    assert small["sliding_window"] == real["sliding_window"]
    ratio = real["num_attention_heads"] // real["num_key_value_heads"]
    assert small["num_attention_heads"] // small["num_key_value_heads"] == ratio


def test_what_was_tried_once_is_known_without_torch_until_something_changes(home):
    code = (
        "import sys; from pathlib import Path; from trainstack.config.load import load;"
        "from trainstack.model.proof import prove; home = Path(sys.argv[1]);"
        "prove(home, load(home / 'config.yaml', sys.argv[2:]), home / 'models/tiny', print);"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )

    def run(*overrides: str) -> list[str]:
        command = [sys.executable, "-c", code, home, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    known = run()
    assert known[-1] == "set()" and "a small copy of it learns with" in known[0]
    tried = run("data.seq_len=72")
    assert tried[-1] != "set()" and "that takes some seconds" in tried[0]
    assert "beyond the 64 positions" in tried[2]
    assert run("data.seq_len=72") == [*tried[1:-1], "set()"]


@pytest.mark.parametrize(
    "change",
    [
        "data.packing=none", "data.seq_len=33", "train.precision=bf16", "model.init=pretrained",
        "train.activation_checkpointing=true", "model.attn_implementation=eager",
    ],
)  # fmt: skip
def test_the_answer_depends_on_each_of_these_settings(home, change):
    folder = home / "models" / "tiny"
    keys = [proof.proof_key(folder, load(home / "config.yaml", o)) for o in ([], [change])]
    assert keys[0] != keys[1]
    untouched = load(home / "config.yaml", ["optim.learning_rate=1.0", "train.max_steps=3"])
    assert proof.proof_key(folder, untouched) == keys[0]


def test_a_router_whose_choice_changes_no_weight_is_a_line(tmp_path):
    CONFIGS["experts"] = lambda: transformers.Qwen3MoeConfig(**GROUPED, num_experts=4)
    said = "its router (model.layers.0.mlp.gate.weight) learns nothing from text"
    alone = {"num_experts_per_tok": 1, "norm_topk_prob": True}
    assert any(said in note for note in rehearse(tmp_path, "experts", **alone).notes)
    for others in ({"norm_topk_prob": False}, {"num_experts_per_tok": 2}):
        notes = rehearse(tmp_path, "experts", **{**alone, **others}).notes
        assert not any("router (" in note for note in notes), notes


def test_pretrained_weights_that_are_not_used_are_a_line(tmp_path):
    content = {"config.json": json.dumps(CONFIGS["llama"]().to_dict())}
    folder = tiny.publish(tmp_path / "m", content, kind="model", weight_bytes=0, has_weights=True)
    for init, number in (("scratch", 1), ("pretrained", 0)):
        config = load(tiny.ROOT / "config.yaml", [f"model.init={init}"])
        lines = proof.unused_weights(folder, config)
        assert len(lines) == number
    assert "model.init=pretrained" in proof.unused_weights(
        folder, load(tiny.ROOT / "config.yaml", ["model.init=scratch"])
    )[0]  # fmt: skip


def test_weights_of_another_kind_of_model_are_refused_when_they_are_loaded(tmp_path):
    other = transformers.LlamaForSequenceClassification(CONFIGS["llama"]())
    other.save_pretrained(tmp_path)
    section = load(tiny.ROOT / "config.yaml", []).model
    with pytest.raises(ConfigError, match=r"the weights in .* have no lm_head.weight"):
        build_causal_lm(tmp_path, "pretrained", section, "fp32", 0)


LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
    "original_max_position_embeddings": 32, "factor": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(("rope", "most"), [
    (LONG, 32), ({"rope_type": "dynamic", "factor": 4.0}, 48),
    ({"rope_type": "linear", "factor": 4.0}, None), (None, None),
])  # fmt: skip
def test_positions_that_depend_on_the_longest_sequence_are_refused_or_told(tmp_path, rope, most):
    """Those of a short document would depend on what else is in its micro batch."""
    changes = {"rope_parameters": {"rope_theta": 500.0, **rope}} if rope else {}
    told = "depends on the longest sequence beside it"
    (tmp_path / "packed").mkdir()
    for packing in ("none", "best_fit"):
        long = (f"data.packing={packing}", "data.seq_len=96")
        if most:
            line = refusal(tmp_path / "packed", "llama", *long, **changes)
            assert told in line and f"write data.seq_len={most} or less, or data.packing" in line
            long = (long[0], f"data.seq_len={most}")
        notes = rehearse(tmp_path / "packed", "llama", *long, **changes).notes
        assert not any(told in note for note in notes)
    notes = rehearse(tmp_path, "llama", "data.packing=concat", "data.seq_len=96", **changes).notes
    assert any(told in note for note in notes) == bool(most)
