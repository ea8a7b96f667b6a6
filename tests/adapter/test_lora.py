"""Adapters beside the layers of many architectures, and what is refused before the queue."""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tiny
from trainstack.adapter import lora
from trainstack.adapter.layer import Layer
from trainstack.config.load import load
from trainstack.config.schema import AdapterSection, Config
from trainstack.errors import ConfigError
from trainstack.model.causal_lm import build_causal_lm, count_parameters, saved_weights
from trainstack.model.loss import CausalLMLoss
from trainstack.model.proof import proof_key
from trainstack.model.rehearsal import rehearse
from trainstack.optim.schedule import odd_rate
from trainstack.plan.cost import cost_of
from trainstack.plan.estimate import Machines, checkpoint_bytes, memory_of
from trainstack.storage import manifest

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip
HEADS = {**SMALL, "head_dim": 8}
KINDS = {
    "llama": SMALL, "qwen2": SMALL, "qwen3": HEADS, "gemma": HEADS, "gemma2": HEADS,
    "mistral": SMALL, "phi3": SMALL, "gpt_neox": SMALL, "granite": SMALL, "olmo2": SMALL,
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3_moe": {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip
SHAPE = {  # of SmolLM2-135M
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LORA = ("model.init=pretrained", "adapter.type=lora", "optim.learning_rate=1e-3")


def section(**changes) -> AdapterSection:
    usual = {"type": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    return AdapterSection(**{**usual, **changes})


def config(*overrides: str) -> Config:
    return load(tiny.ROOT / "config.yaml", [*LORA, *overrides])


def folder_of(folder: Path, kind: str, **changes) -> Path:
    made = CONFIG_MAPPING[kind](**{**KINDS.get(kind, SMALL), **changes})
    made.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(made)].__name__]
    made.save_pretrained(folder)
    return folder


def build(folder: Path, precision: str = "fp32", seed: int = 1, **changes):
    arguments = (config().model, precision, seed, section(**changes))
    return build_causal_lm(folder, "scratch", *arguments)


def losses(causal_lm, settings: Config, steps: int = 12) -> list[float]:
    model = CausalLMLoss(causal_lm, settings.train, CPU, settings.data.packing, 24)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.02)
    tokens = torch.arange(48).remainder(12).view(2, 24)
    position_ids = torch.arange(24).remainder(12).expand(2, 24)
    packed = () if settings.data.packing == "concat" else (position_ids,)
    found = []
    for _ in range(steps):
        loss = model(tokens, tokens.roll(-1, 1), *packed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns_by_its_adapter_alone(tmp_path, kind):
    causal_lm = build(folder_of(tmp_path, kind))
    own = {id(p) for _, p in lora.adapter_of(causal_lm)}
    frozen = {n: p.detach().clone() for n, p in causal_lm.named_parameters() if id(p) not in own}
    found = losses(causal_lm, config("train.precision=fp32"))
    assert found[-1] < 0.98 * found[0]
    after = dict(causal_lm.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
    assert {*saved_weights(causal_lm)} == {*lora.adapter_weights(causal_lm)} and own


@pytest.mark.parametrize(
    "settings",
    [
        ("data.packing=best_fit",),
        ("train.activation_checkpointing=true",),
        ("train.precision=bf16", "data.packing=best_fit"),
        ("train.precision=fp64",),
    ],
)
def test_packing_checkpointing_and_precisions_are_as_for_all_weights(tmp_path, settings):
    used = config(*settings)
    precision = used.train.precision
    causal_lm = build(folder_of(tmp_path, "llama"), precision)
    found = losses(causal_lm, used)
    assert found[-1] < 0.98 * found[0]
    own = {p.dtype for _, p in lora.adapter_of(causal_lm)}
    assert own == {torch.float64 if precision == "fp64" else torch.float32}
    stored = causal_lm.get_input_embeddings().weight.dtype
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert stored == (torch.float64 if precision == "fp64" else half)
    plain = CausalLMLoss(
        build_causal_lm(tmp_path, "scratch", used.model, precision, 1), used.train, CPU,
        used.data.packing, 24,
    )  # fmt: skip
    kind = plain.causal_lm.config._attn_implementation
    assert causal_lm.config._attn_implementation == kind, "the choice of attention"


def test_it_learns_compiled(tmp_path, monkeypatch):
    # Its graphs, forward and backward; not made into C++, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = losses(build(folder_of(tmp_path, "llama")), config("train.torch_compile=true"), 4)
    again = losses(build(folder_of(tmp_path, "llama")), config(), 4)
    assert found == pytest.approx(again, rel=1e-4)


def test_the_matrices_follow_from_the_seed(tmp_path):
    folder = folder_of(tmp_path, "llama")
    first, same, other = (lora.adapter_weights(build(folder, seed=n)) for n in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_a_head_that_stays_gets_no_gradient_and_the_others_are_the_same(tmp_path):
    causal_lm = build(folder_of(tmp_path, "llama"))
    model = CausalLMLoss(causal_lm, config().train, CPU, "concat", 24)
    tokens = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        for _, parameter in lora.adapter_of(causal_lm):
            parameter.normal_(std=0.1)
    own = [p for _, p in lora.adapter_of(causal_lm)]
    assert model.is_chunked
    ours = torch.autograd.grad(model(tokens, tokens.roll(-1)), own)
    logits = causal_lm(input_ids=tokens).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens.roll(-1).flatten(), reduction="sum")
    for mine, theirs in zip(ours, torch.autograd.grad(loss, own), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max())


def test_what_stands_in_a_head_that_stays_is_still_found(tmp_path):
    causal_lm = build(folder_of(tmp_path, "phi"))  # a bias, which has no gradient here
    assert not CausalLMLoss(causal_lm, config().train, CPU, "concat", 24).is_chunked
    capped = build(folder_of(tmp_path / "capped", "gemma2"))
    assert not CausalLMLoss(capped, config().train, CPU, "concat", 24).is_chunked


def test_a_checkpoint_of_a_real_shape_is_below_three_percent():
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
        full = count_parameters(whole)
        lora.add_adapter(whole, section(r=8), 1)
    assert 0.01 < lora.count_saved(whole) / full < 0.03


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        rehearse(folder, config(f"model.name={folder}", "data.seq_len=24", *overrides))
    (line,) = caught.value.problems
    return line


def with_weights(folder: Path, kind: str, **changes) -> Path:
    build_causal_lm(
        folder_of(folder, kind, **changes), "scratch", config().model, "fp32", 1
    ).save_pretrained(folder)
    return folder


def test_names_of_no_layer_are_refused_before_the_queue(tmp_path):
    folder = with_weights(tmp_path, "llama", num_hidden_layers=12)
    line = refusal(folder, "adapter.target_modules=[q_proj, v_prj]")
    assert "adapter.target_modules: no linear layer is named v_prj; it has q_proj, k_proj" in line
    for name in ("lm_head", "embed_tokens", "mlp"):
        assert f"no linear layer is named {name};" in refusal(
            folder, f"adapter.target_modules=[{name}]"
        )
    one = "adapter.target_modules=[layers.11.self_attn.q_proj]"
    found = rehearse(folder, config(f"model.name={folder}", "data.seq_len=24", one))
    assert found.parameters == 8 * (32 + 32)


def test_a_model_that_peft_does_not_take_is_refused_before_the_queue(tmp_path):
    changed = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    folder_of(tmp_path, "mamba", **changed)
    line = refusal(tmp_path, "model.attn_implementation=auto")
    assert "adapter.type=lora: peft does not take this model (" in line


def test_experts_without_an_adapter_are_counted(tmp_path):
    folder = with_weights(tmp_path, "qwen3_moe")
    notes = rehearse(folder, config(f"model.name={folder}", "data.seq_len=24")).notes
    (note,) = [note for note in notes if "of its weights are no linear layers" in note]
    assert 1 < int(note.partition("%")[0].rpartition(" ")[2]) < 99


def test_an_adapter_beside_new_weights_is_refused():
    with pytest.raises(ConfigError, match="adapter.type=lora with model.init=scratch"):
        config("model.init=scratch")


@pytest.mark.parametrize(("rate", "said"), [("2e-5", 1), ("2e-4", 0), ("2e-3", 0), ("1e-2", 1)])
def test_a_rate_that_is_no_adapters_is_said(rate, said):
    told = odd_rate(config(f"optim.learning_rate={rate}"))
    assert len(told) == said and all("an adapter wants" in line for line in told)


def test_a_plan_counts_what_learns_and_a_proof_is_of_the_adapter(tmp_path):
    folder = folder_of(tmp_path, "llama")
    used = config("train.precision=bf16", "data.seq_len=24", "train.micro_batch_size=2")
    cost = cost_of(folder, used, is_gpu=False, keeps_gradients=True)
    assert 0 < cost.trained < cost.parameters / 2
    parts = memory_of(cost, used, Machines(1, 1, None, 1, 1e9))
    assert parts["gradients"] == 4 * cost.trained
    frozen = cost.parameters - cost.trained
    assert parts["weights"] == 2 * frozen + 4 * cost.trained
    assert checkpoint_bytes(cost, used) == 12 * cost.trained
    manifest.write_manifest(folder, {})
    keys = {proof_key(folder, config(f"adapter.r={r}")) for r in (8, 8, 16)}
    assert len(keys) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_gives_what_pefts_own_gives_and_its_gradients(tmp_path, kind, precision, dropout):
    causal_lm = build(folder_of(tmp_path, kind), precision, dropout=dropout)
    layers = [module for module in causal_lm.modules() if type(module) is Layer]
    with torch.no_grad():
        for _, parameter in lora.adapter_of(causal_lm):
            parameter.normal_(std=0.1)
    for layer in layers:
        inputs = torch.randn(2, 5, layer.in_features, dtype=layer.base_layer.weight.dtype)
        inputs.requires_grad_()
        learned = [inputs, *(p for p in layer.parameters() if p.requires_grad)]
        found = []
        for forward in (layer.forward, super(Layer, layer).forward):
            torch.manual_seed(1)  # of dropout
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = forward(inputs)
            found.append([output, *torch.autograd.grad(output.float().square().sum(), learned)])
        for mine, theirs in zip(*found, strict=True):
            assert mine.dtype == theirs.dtype
            size = theirs.float().abs().max().item()
            assert (mine - theirs).abs().max() <= size * (0.02 if precision == "bf16" else 1e-6)
        layer(inputs)  # without autocast, as somebody may call it
        none = inputs[:, :0].detach().requires_grad_()  # an expert that no token chose
        torch.autograd.grad(layer(none).sum(), none)
    assert layers and len(learned) == 3
