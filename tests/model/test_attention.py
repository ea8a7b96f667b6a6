"""Attention without masks gives what transformers' masks give, and makes none."""

import logging

import numpy as np
import pytest
import torch
from test_architectures import CPU, EXPERTS, MLA, SMALL, TRAIN, build
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING

from trainstack.checkpoint.snapshot import small_files
from trainstack.config.schema import TrainSection
from trainstack.data.packing import document_bounds
from trainstack.model import attention
from trainstack.model.loss import CausalLMLoss
from trainstack.model.small_copy import small_configs

LENGTHS = ((9, 1, 30, 16), (5, 51))  # of documents, in rows of 56 tokens
SHAPES = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 6},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {**SMALL, **MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1,
                    "first_k_dense_replace": 1},
    "qwen3_moe": {**SMALL, **EXPERTS},
}  # fmt: skip


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and positions of packed rows."""
    generator = torch.Generator().manual_seed(3)
    inputs, labels = torch.randint(3, 90, (2, 2, sum(LENGTHS[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return inputs, labels, positions


def loss_model(causal_lm, packing: str, precision: str = "fp32") -> CausalLMLoss:
    return CausalLMLoss(causal_lm, TrainSection(**{**TRAIN, "precision": precision}), CPU, packing)


def learned(model_type: str, is_ours: bool, batch: tuple, precision: str = "fp64"):
    """Loss and gradients of a batch, with our attention or with masks."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    causal_lm = build(model_type, SHAPES[model_type], dtype)
    wrapped = loss_model(causal_lm, "best_fit" if len(batch) > 2 else "concat", precision)
    assert causal_lm.config._attn_implementation == attention.OURS
    if not is_ours:
        causal_lm.set_attn_implementation(attention.THEIRS)
    loss = wrapped(*batch)
    loss.backward()
    return loss, {name: p.grad for name, p in causal_lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("model_type", SHAPES)
def test_loss_and_gradients_are_those_of_the_masks(model_type, is_packed):
    batch = rows() if is_packed else rows()[:2]
    (loss, ours), (expected, theirs) = (learned(model_type, own, batch) for own in (True, False))
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-9, atol=1e-12), name


def test_in_bf16_they_are_as_near_to_the_exact_ones_as_with_masks():
    exact = learned("llama", False, rows(), "fp32")[1]

    def error(is_ours: bool) -> float:
        found = learned("llama", is_ours, rows(), "bf16")[1]
        return sum(float((found[n] - g).norm() / g.norm()) for n, g in exact.items()) / len(exact)

    assert 0 < error(True) <= 1.2 * error(False) < 0.05


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all tensors that are made within it."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, _, arguments=(), more=None):
        made = function(*arguments, **(more or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return made


@pytest.mark.parametrize("is_ours", [True, False])
def test_no_mask_of_a_row_is_made(is_ours):
    causal_lm = build("llama", SMALL)
    wrapped = loss_model(causal_lm, "best_fit")
    if not is_ours:
        causal_lm.set_attn_implementation(attention.THEIRS)
    with Shapes() as shapes:
        wrapped(*rows()).backward()
    length = sum(LENGTHS[0])
    masks = {shape for shape in shapes.seen if shape[-2:] == (length, length)}
    assert bool(masks) == (not is_ours), "what this test looks for is made with masks"


def test_compiled_it_is_one_graph_and_other_documents_compile_nothing():
    causal_lm, graphs = build("llama", SMALL), []
    attention.use(causal_lm.eval(), is_packed=True)

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    body = torch.compile(causal_lm.model, backend=keep)
    inputs, labels, positions = rows()
    for number, row in enumerate((positions, positions.flip(0), torch.arange(56).repeat(2, 1))):
        bounds = torch.from_numpy(document_bounds(row.numpy(), labels.numpy(), 8))
        assert len(bounds) == 9
        arguments = attention.apart(causal_lm, inputs, row, bounds)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            hidden = body(**arguments, use_cache=False).last_hidden_state
        assert torch.equal(hidden, causal_lm.model(**arguments, use_cache=False).last_hidden_state)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("doge", "it masks more than documents and windows, or is not told of them"),
     ("falcon", "its code does not let it be chosen")],
)  # fmt: skip
def test_a_model_with_masks_of_its_own_keeps_them_which_is_said(model_type, reason, caplog, capfd):
    causal_lm = build(model_type, SMALL)
    with caplog.at_level(logging.INFO, "trainstack"):
        loss_model(causal_lm, "concat")
    assert f"model: attention has masks, which are slower ({reason})" in caplog.messages
    assert causal_lm.config._attn_implementation == attention.THEIRS
    assert "support" not in capfd.readouterr().err


def test_a_model_that_is_not_told_of_documents_keeps_them_apart_by_masks(caplog):
    with caplog.at_level(logging.INFO, "trainstack"):
        wrapped = loss_model(build("stablelm", SMALL), "best_fit")
    assert "model: attention has masks, which are slower (it masks more" in caplog.text
    inputs, labels, positions = rows()
    alone = wrapped(inputs[:1, :9], labels[:1, :9], torch.arange(9).unsqueeze(0))
    labels[:, 9:] = -100
    assert torch.allclose(wrapped(inputs[:1], labels[:1], positions[:1]), alone, rtol=1e-5)


def test_a_checkpoint_names_no_attention_of_ours(tmp_path):
    causal_lm = build("llama", SMALL)
    loss_model(causal_lm, "concat")
    files = small_files(causal_lm, tmp_path, [1], None, set())
    assert not any(attention.OURS.encode() in content for content in files.values())


def test_bounds_are_where_documents_begin_and_what_fills_a_row_up_is_one():
    positions = np.array([[0, 1, 2, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]])
    labels = np.array([[5, 5, 5, 5, 5, 5, -100, -100], [5, 5, 5, -100, -100, -100, -100, -100]])
    # The documents of one token, at 3, 8 and 9, have targets: what fills up begins at 6 and 12.
    found = document_bounds(positions, labels, 12)
    assert found.tolist() == [0, 3, 4, 6, 8, 9, 10, 12, *[16] * 5]
    assert found.dtype == np.int32
    every = [0, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16]
    assert document_bounds(positions).tolist() == every


def reference(query, key, value, bounds, scale, is_causal, window):
    """Documents of [tokens, heads, head_size], one by one."""
    parts = []
    for first, last in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        own = [t[first:last].transpose(0, 1) for t in (query, key, value)]
        mask = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        assert is_causal
        if window >= 0:
            mask = mask.triu(-window)
        parts.append(scaled_dot_product_attention(*own, mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return reference(query, key, value, cu_seq_q, None, is_causal, -1)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
            window_size=(-1, -1)):  # fmt: skip
    assert key.shape[1] == query.shape[1]
    return reference(query, key, value, cu_seq_q, scale, window_size[1] == 0, window_size[0])


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
            window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert enable_gqa
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                   window_size=window_size)  # fmt: skip


@pytest.mark.parametrize("kernel", [of_2_10, of_2_11, of_2_13])
def test_the_kernel_of_each_release_is_given_what_it_takes(kernel, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key, value = (torch.randn(2, heads, 56, 8) for heads in (4, 2, 2))
    bounds = torch.from_numpy(document_bounds(rows()[2].numpy(), most=9))
    for window in (0,) if kernel is of_2_10 else (0, 6):
        expected, _ = attention.on_cpu(query, key, value, bounds, 0.2, window)
        found = attention.on_gpu(query, key, value, bounds, 0.2, window)
        assert torch.allclose(found, expected, atol=1e-6)


def test_where_no_kernel_knows_documents_a_mask_does():
    query, key, value = (torch.randn(2, heads, 56, 8) for heads in (4, 2, 2))
    bounds = torch.from_numpy(document_bounds(rows()[2].numpy()))
    for window in (0, 6):
        expected, _ = attention.on_cpu(query, key, value, bounds, 8**-0.5, window)
        mask = attention.dense_mask(bounds, 2, 56, window)
        found = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_sample_is_generated_as_with_masks():
    made = []
    for kind in (attention.OURS, attention.THEIRS):
        causal_lm = build("gemma3_text", SHAPES["gemma3_text"]).eval()
        causal_lm.set_attn_implementation(kind)
        made.append(causal_lm.generate(
            torch.arange(20).unsqueeze(0), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            attention_mask=torch.ones(1, 20), pad_token_id=0,
        ).tolist())  # fmt: skip
    assert made[0] == made[1]


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "minimax_m3_vl_text", "gpt2"])
def test_the_trial_leaves_every_setting_of_a_model_as_it_was(model_type):
    config = CONFIG_MAPPING[model_type]()
    for values in small_configs(config.to_dict()):
        causal_lm = build(model_type, {k: v for k, v in values.items() if k != "model_type"})
        break
    before = causal_lm.config.to_dict()
    attention.use(causal_lm.eval(), is_packed=False)
    assert causal_lm.config.to_dict() == before
    is_ours = causal_lm.config._attn_implementation == attention.OURS
    assert is_ours == (model_type != "minimax_m3_vl_text")  # masks blocks, if its name is sdpa
