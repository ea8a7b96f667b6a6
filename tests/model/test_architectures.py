"""Every architecture: its own loss, all of its weights, or a reason why it cannot be."""

import logging
import re

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainstack.config.schema import ModelSection, TrainSection
from trainstack.distributed import World
from trainstack.errors import ConfigError
from trainstack.evaluation.held_out import evaluate
from trainstack.model.causal_lm import build_causal_lm, saved_weights
from trainstack.model.ddp import wrap
from trainstack.model.loss import CausalLMLoss

CPU = torch.device("cpu")
TRAIN = {
    "global_batch_size": 4, "micro_batch_size": 4, "num_train_epochs": 1.0, "max_steps": 1,
    "precision": "fp32", "torch_compile": False, "deterministic": False,
    "activation_checkpointing": False,
}  # fmt: skip
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
CAPPED = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}
KINDS = {  # model type, configuration, whether its head is plain
    "plain": ("llama", SMALL, True),
    "soft cap": ("gemma2", {**CAPPED, "final_logit_softcapping": 30.0}, False),
    "no soft cap": ("gemma2", {**CAPPED, "final_logit_softcapping": None}, True),
    "logit_scale": ("cohere", {**SMALL, "logit_scale": 0.0625}, False),
    "logits_scaling": ("granite", {**SMALL, "logits_scaling": 1.01}, False),
    "logits_scaling of one": ("granite", {**SMALL, "logits_scaling": 1.0}, True),
    "scaled hidden states": ("minicpm3", {**SMALL, **MLA}, False),
    "a bias": ("phi", SMALL, False),
    "layers of the head": ("modernbert-decoder", {
        **{key: value for key, value in SMALL.items() if "key_value" not in key},
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2}, False),
    "logits in fp32": ("mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
                                 "state_size": 4}, True),
    "projected": ("opt", {
        "vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}, True),
    "experts": ("qwen3_moe", {**SMALL, **EXPERTS}, True),
}  # fmt: skip


def build(model_type: str, settings: dict, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**settings), dtype=dtype, experts_implementation="eager"
    )


def batch(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    inputs = torch.randint(3, 96, (rows, 24))
    labels = torch.cat([inputs[:, 1:], torch.full((rows, 1), -100)], 1)
    labels[0, 5:] = -100
    return inputs, labels


def loss_model(causal_lm, seq_len=24, **changes) -> CausalLMLoss:
    return CausalLMLoss(causal_lm, TrainSection(**{**TRAIN, **changes}), CPU, seq_len=seq_len)


def plain_loss(causal_lm, inputs, labels):
    logits = causal_lm(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")


def is_same(before: dict, after: dict) -> bool:
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("factor", [1.0, 1e-4, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_between_hidden_states_and_logits_shows_whatever_the_weights_are(kind, factor):
    model_type, settings, is_plain = KINDS[kind]
    causal_lm = build(model_type, settings)
    with torch.no_grad():
        causal_lm.get_output_embeddings().weight.mul_(factor)
    before = {name: tensor.clone() for name, tensor in causal_lm.state_dict().items()}
    assert loss_model(causal_lm).is_chunked == is_plain
    assert is_same(before, causal_lm.state_dict()), "the trial left something behind"


class WithBias(transformers.LlamaForCausalLM):
    """Adds a bias, which begins as zero, to the logits."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *arguments, labels=None, **settings):
        output = super().forward(*arguments, **settings)
        output.logits = output.logits + self.shift
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def test_a_bias_that_is_still_zero_is_seen():
    assert not loss_model(WithBias(transformers.LlamaConfig(**SMALL))).is_chunked


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own_and_reaches_what_its_own_reaches(kind):
    model_type, settings, _ = KINDS[kind]
    ours, plain = (build(model_type, settings, torch.float64) for _ in range(2))
    wrapped = loss_model(ours, precision="fp64")
    wrapped.eval()
    plain.eval()
    loss, expected = wrapped(*batch()), plain_loss(plain, *batch())
    is_fp32 = expected.dtype == torch.float32  # what mamba makes of its logits itself
    assert torch.allclose(loss, expected.double(), rtol=1e-6 if is_fp32 else 1e-9)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_learns_in_bf16_with_activations_recomputed(kind):
    model_type, settings, _ = KINDS[kind]
    causal_lm = build(model_type, settings)
    loss = loss_model(causal_lm, precision="bf16", activation_checkpointing=True)(*batch())
    loss.backward()
    assert torch.allclose(loss, plain_loss(build(model_type, settings), *batch()), rtol=2e-2)
    assert all(parameter.grad is not None for parameter in causal_lm.parameters())


def test_a_model_without_a_switch_recomputes_its_layers_all_the_same():
    settings = {**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    plain, saving = (build("openai-gpt", settings) for _ in range(2))
    assert not plain.supports_gradient_checkpointing
    loss_model(plain)(*batch()).backward()
    calls = []
    saving.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    wrapped = loss_model(saving, activation_checkpointing=True)
    calls.clear()
    wrapped(*batch()).backward()
    assert len(calls) == 2, "once forward, once again for the backward pass"
    for mine, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert saving.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_dropout_is_on_from_the_first_step_wherever_the_weights_come_from(tmp_path, init):
    build("gpt2", GPT2).save_pretrained(tmp_path)
    section = ModelSection(name="m", revision="main", init=init, attn_implementation="sdpa")
    wrapped, data = loss_model(build_causal_lm(tmp_path, init, section, "fp32", 0)), batch()
    assert wrapped(*data) != wrapped(*data)


# Experts


def balanced(model_type="qwen3_moe", dtype=torch.float32, **changes):
    settings = {**SMALL, **EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    if model_type in ("granitemoe", "mixtral"):
        settings["num_local_experts"] = settings.pop("num_experts")
    if model_type == "granitemoe":
        settings["logits_scaling"] = 4.0
    return build(model_type, {**settings, **changes}, dtype)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe"])
def test_the_balancing_loss_is_in_the_gradient_and_not_in_the_value(model_type):
    ours, own, unbalanced = (balanced(model_type) for _ in range(3))
    wrapped = loss_model(ours)
    assert wrapped.is_chunked == (model_type != "granitemoe")
    inputs, labels = batch()
    targets = (labels != -100).sum()
    loss = wrapped(inputs, labels)
    expected = plain_loss(own, inputs, labels)
    assert torch.allclose(loss, expected, rtol=1e-6), "the loss that is shown"
    with torch.no_grad():
        assert torch.equal(wrapped(inputs, labels), loss), "an evaluation never has it"
    loss.backward()
    (expected + 0.5 * own(input_ids=inputs).aux_loss * targets).backward()
    plain_loss(unbalanced, inputs, labels).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5), name
    routers = [name for name, _ in ours.named_parameters() if "gate.weight" in name
               or "router" in name]  # fmt: skip
    plain = dict(unbalanced.named_parameters())
    assert routers
    assert not any(torch.allclose(ours.get_parameter(n).grad, plain[n].grad) for n in routers)


def test_the_balancing_loss_of_a_step_is_the_mean_over_its_batches_by_their_targets():
    inputs, labels = batch(rows=4)
    own = balanced()
    parts = [slice(0, 1), slice(1, 4)]
    counts = [(labels[part] != -100).sum() for part in parts]
    mean = sum(
        own(input_ids=inputs[part]).aux_loss * count
        for part, count in zip(parts, counts, strict=True)
    ) / sum(counts)
    (plain_loss(own, inputs, labels) / sum(counts) + 0.5 * mean).backward()
    ours = balanced()
    wrapped = loss_model(ours)
    for part in parts:
        (wrapped(inputs[part], labels[part]) / sum(counts)).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe"])
def test_what_fills_samples_up_has_no_part_in_the_balancing_loss(model_type):
    """The gradients are those of the text alone, however much padding stands beside it."""
    inputs, labels = batch()
    positions = torch.arange(inputs.shape[1]).repeat(2, 1)
    made = []
    for padding in (0, 3, 40):
        fill = torch.zeros(2, padding, dtype=torch.int64)
        parts = [(inputs, fill + 7), (labels, fill - 100), (positions, fill)]
        wrapped = loss_model(balanced(model_type))
        wrapped(*(torch.cat(part, 1) for part in parts)).backward()
        made.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    for other in made[1:]:
        for name, gradient in made[0].items():
            assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-5), name
    nothing = loss_model(balanced(model_type))
    loss = nothing(inputs, torch.full_like(labels, -100), torch.zeros_like(positions))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in nothing.parameters())


@pytest.mark.parametrize(
    ("causal_lm", "said"),
    [
        (lambda: balanced(), r"router_aux_loss_coef=0.5: .* is learned too"),
        (lambda: balanced(output_router_logits=False),
         r"router_aux_loss_coef=0.5: is not used; output_router_logits=true"),
        (lambda: build("deepseek_v3", {
            **SMALL, **MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "aux_loss_alpha": 0.001}),
         r"aux_loss_alpha=0.001: is not used: transformers has no balancing loss"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_balancing_coefficient_is_said(caplog, causal_lm, said):
    with caplog.at_level(logging.INFO, "trainstack"):
        loss_model(causal_lm())
    assert len([line for line in caplog.messages if "loss_" in line]) == 1
    assert any(re.search(said, line) for line in caplog.messages), caplog.messages


def test_nothing_is_said_of_a_plain_model(caplog):
    with caplog.at_level(logging.INFO, "trainstack"):
        loss_model(build("llama", SMALL))
    assert not caplog.messages


# Weights that get no gradient


class Chooses(nn.Module):
    """Sends each token to the one expert of a list that its router likes most."""

    def __init__(self, experts: int, size: int):
        super().__init__()
        self.router = nn.Linear(size, experts)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(experts))

    def forward(self, hidden):
        scores = self.router(hidden).softmax(-1)
        best, chosen = scores.max(-1)
        output = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            is_own = chosen == number
            output[is_own] = self.experts[number](hidden[is_own]) * best[is_own].unsqueeze(-1)
        return output


def with_list_of_experts(experts: int = 64) -> nn.Module:
    causal_lm = build("llama", SMALL)
    torch.manual_seed(0)
    causal_lm.model.layers[1].mlp = Chooses(experts, SMALL["hidden_size"])
    return causal_lm


@pytest.fixture
def world():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield World(0, 0, 1, 1, CPU)
    torch.distributed.destroy_process_group()


def indexed():
    """DeepSeek V3.2: what chooses the tokens to look at gets no gradient."""
    return build("deepseek_v32", {
        **SMALL, **MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 8})  # fmt: skip


def with_images():
    """Gemma 3, which also reads images."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    return build("gemma3", {"text_config": {**SMALL, "head_dim": 8}, "vision_config": vision,
                            "mm_tokens_per_image": 4, "image_token_index": 90,
                            "boi_token_index": 91, "eoi_token_index": 92})  # fmt: skip


@pytest.mark.parametrize(
    ("make", "first"), [(indexed, "self_attn.indexer.wq_b"), (with_images, "vision_tower")]
)
def test_what_text_never_reaches_is_frozen_counted_kept_and_ddp_goes_on(make, first, caplog, world):
    causal_lm = make()
    with caplog.at_level(logging.INFO, "trainstack"):
        wrapped = loss_model(causal_lm)
    frozen = [name for name, p in causal_lm.named_parameters() if not p.requires_grad]
    total = len(list(causal_lm.parameters()))
    line = f"model: {len(frozen)} of {total} parameters get no gradient from text and stay"
    assert any(said.startswith(line) and first in said for said in caplog.messages)
    ddp = wrap(wrapped, world)
    for _ in range(3):
        ddp(*batch()).backward()
        ddp.zero_grad(set_to_none=True)
    assert len(saved_weights(causal_lm)) >= total, "what is frozen is saved all the same"


def test_an_evaluation_leaves_the_weights_as_they_are_trained(world):
    causal_lm = build("rwkv", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4,
                               "rescale_every": 2})  # fmt: skip
    wrapped = loss_model(causal_lm)
    before = {name: tensor.clone() for name, tensor in saved_weights(causal_lm).items()}
    evaluate(wrapped, [batch()], 1, world, lambda: False)
    assert wrapped.training and is_same(before, saved_weights(causal_lm))


def test_an_expert_that_gets_no_token_is_not_frozen_and_ddp_goes_on(world):
    causal_lm = with_list_of_experts()
    wrapped = loss_model(causal_lm)
    assert all(parameter.requires_grad for parameter in causal_lm.parameters())
    ddp, (inputs, labels) = wrap(wrapped, world), batch()
    for row in (inputs[:1, :3], inputs[1:, :3]):
        ddp(row, labels[1:, :3]).backward()
        gradients = [expert.weight.grad for expert in causal_lm.model.layers[1].mlp.experts]
        assert sum(bool(gradient.any()) for gradient in gradients) <= 3
        ddp.zero_grad(set_to_none=True)


def test_the_gradients_beside_the_zeros_are_those_of_the_loss_alone():
    ours, plain = with_list_of_experts(), with_list_of_experts()
    loss_model(ours)(*batch()).backward()
    plain_loss(plain, *batch()).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        expected = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
        assert torch.allclose(mine.grad, expected, rtol=1e-4, atol=1e-5), name


# What cannot be


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("bart", {"vocab_size": 96, "d_model": 32, "decoder_layers": 1, "encoder_layers": 1,
                  "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
         "BartForCausalLM learns to name each token, not the next one"),
        ("bamba", {**SMALL, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                   "attn_layer_indices": [1], "z_loss_coefficient": 1e-3},
         r"the loss of BambaForCausalLM itself is \d.* where the next-token loss is \d"),
        ("roberta", {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": None},
         r"RobertaForCausalLM fails on 16 tokens of text \(TypeError: .*; choose another model"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_by_name(model_type, settings, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        loss_model(build(model_type, settings))
    assert "\n" not in str(caught.value)
