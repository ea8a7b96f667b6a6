"""The loss equals the plain one, and the optimizer and its schedule are what they say."""

import pytest
import torch
import transformers

from trainstack.config.schema import TrainSection
from trainstack.errors import ConfigError
from trainstack.model import attention, causal_lm
from trainstack.model import loss as loss_module
from trainstack.model.loss import CausalLMLoss, losses_of

CPU = torch.device("cpu")
TRAIN = {
    "global_batch_size": 4, "micro_batch_size": 4, "num_train_epochs": 1.0, "max_steps": 1,
    "precision": "fp32", "torch_compile": False, "deterministic": False,
    "activation_checkpointing": False,
}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}


def llama(dtype=torch.float32, attn_implementation="sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, **{**SMALL, **changes}
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attn_implementation
    )


def batch():
    torch.manual_seed(1)
    inputs, labels = torch.randint(0, 96, (4, 24)), torch.randint(0, 96, (4, 24))
    labels[1, 5:] = -100
    return inputs, labels


def loss_model(causal_lm, packing="concat", **changes):
    return CausalLMLoss(causal_lm, TrainSection(**{**TRAIN, **changes}), CPU, packing)


def plain_loss(causal_lm, inputs, labels):
    logits = causal_lm(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("multiple", [1, 56])  # of rows of the head; it has 96
@pytest.mark.parametrize("tokens", [7, 256])  # of a chunk; there are 96
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(
    monkeypatch, tied, tokens, multiple, is_fused
):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr(loss_module, "LEAST_TOKENS", tokens)
    monkeypatch.setattr(loss_module, "MULTIPLE", {"cpu": multiple})
    compiled = torch.compile(losses_of, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(loss_module, "fused_losses", lambda: compiled)
    ours = llama(torch.float64, tie_word_embeddings=tied)
    plain = llama(torch.float64, tie_word_embeddings=tied)
    wrapped = loss_model(ours, precision="fp64")
    assert wrapped.is_chunked
    wrapped.is_fused = is_fused
    loss, expected = wrapped(*batch()), plain_loss(plain, *batch())
    (loss * 0.5).backward()
    (expected * 0.5).backward()
    assert torch.allclose(loss, expected, rtol=1e-13)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12), name


def test_a_model_with_capped_logits_keeps_them_whole():
    config = transformers.Gemma2Config(
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0,
        query_pre_attn_scalar=8, **SMALL,
    )  # fmt: skip
    torch.manual_seed(0)
    capped = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        capped.get_output_embeddings().weight.mul_(100)
    wrapped = loss_model(capped)
    assert not wrapped.is_chunked
    assert torch.allclose(wrapped(*batch()), plain_loss(capped, *batch()), rtol=1e-5)


def two_documents():
    """Two documents of 9 and 15 tokens in each of two rows: inputs, labels, positions."""
    inputs, labels = (part[:2] for part in batch())
    labels[:, 8] = -100
    positions = torch.cat([torch.arange(9), torch.arange(15)]).repeat(2, 1)
    return inputs, labels, positions


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_documents_of_a_row_do_not_see_each_other(kind, precision):
    ours = llama(torch.float32, attn_implementation=kind)
    wrapped = loss_model(ours, precision=precision, packing="best_fit")
    inputs, labels, positions = two_documents()
    labels[:, :9] = -100  # the loss is the second documents'
    changed = inputs.clone()
    changed[:, :9] = inputs[:, :9].flip(1)
    assert wrapped(inputs, labels, positions) == wrapped(changed, labels, positions)
    assert wrapped(inputs, labels) != wrapped(changed, labels), "with concat they do"
    arguments = attention.apart(ours, inputs, positions)
    logits = ours(**arguments, use_cache=False).logits
    after = ours(**{**arguments, "input_ids": changed}, use_cache=False).logits
    assert torch.equal(logits[:, 9:], after[:, 9:])
    alone = ours(input_ids=inputs[:, 9:], use_cache=False).logits
    assert torch.allclose(logits[:, 9:], alone, atol=1e-5)


def test_the_loss_of_packed_documents_is_the_sum_of_their_losses_alone():
    wrapped = loss_model(llama(torch.float64), precision="fp64", packing="best_fit")
    inputs, labels, positions = two_documents()
    parts = [wrapped(inputs[:, part], labels[:, part]) for part in (slice(9), slice(9, None))]
    assert torch.allclose(wrapped(inputs, labels, positions), sum(parts), rtol=1e-12)


def test_a_model_that_mixes_documents_is_refused_where_they_share_a_row():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4
    )
    recurrent = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    loss_model(recurrent)
    with pytest.raises(ConfigError, match=r"MambaForCausalLM lets documents .*data.packing=none"):
        loss_model(recurrent, packing="best_fit")


@pytest.mark.parametrize("kind", ["MambaConfig", "LlamaConfig"])
def test_a_document_alone_in_its_row_has_its_own_loss_in_every_model(kind):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, num_attention_heads=4
    )
    causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wrapped = loss_model(causal_lm, packing="none")
    inputs, labels = (part[:1] for part in batch())
    labels[:, 9:] = -100
    positions = torch.cat([torch.arange(9), torch.zeros(15, dtype=torch.int64)]).unsqueeze(0)
    padded = inputs.clone()
    padded[:, 9:] = 0
    alone = wrapped(inputs[:, :9], labels[:, :9])
    assert torch.allclose(wrapped(padded, labels, positions), alone, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near_and_keeps_fp32_master_weights(precision):
    causal_lm = llama()
    loss = loss_model(causal_lm, precision=precision)(*batch())
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.dtype for p in causal_lm.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in causal_lm.parameters()} == {torch.float32}
    assert torch.allclose(loss, plain_loss(llama(), *batch()), rtol=1e-2)


def test_activation_checkpointing_changes_no_gradient():
    plain, saving = llama(torch.float64), llama(torch.float64)
    loss_model(plain, precision="fp64")(*batch()).backward()
    wrapped = loss_model(saving, precision="fp64", activation_checkpointing=True)
    wrapped.train()
    assert saving.is_gradient_checkpointing
    wrapped(*batch()).backward()
    for mine, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-12)


def test_bf16_weights_on_disk_become_fp32_master_weights(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)

    class section:
        attn_implementation = "sdpa"

    loaded = causal_lm.build_causal_lm(tmp_path, "pretrained", section, "bf16", 0)
    assert loaded.dtype == torch.float32
