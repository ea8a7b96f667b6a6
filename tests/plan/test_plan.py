"""What a run will need is known before it runs: FLOPs, memory, time, and what to change."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from trainstack.config.load import load
from trainstack.errors import ConfigError
from trainstack.model.causal_lm import build_causal_lm
from trainstack.model.loss import CausalLMLoss
from trainstack.plan import command, cost, estimate, machine
from trainstack.plan.command import line
from trainstack.plan.estimate import Cost, Machines
from trainstack.plan.machine import GPUS, find_gpu, named_gpu

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=96),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "gemma, tied": transformers.GemmaConfig(**GROUPED, tie_word_embeddings=True),
    "gemma 2, whole logits": transformers.Gemma2Config(**GROUPED, query_pre_attn_scalar=8),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
}
SEQ_LEN, ROWS = 32, 4
every_family = pytest.mark.parametrize("name", FAMILIES)


def settings(folder: Path, name: str, *overrides: str):
    """A configuration of a model that lies in ``folder``."""
    (folder / "config.json").write_text(json.dumps(FAMILIES[name].to_dict()))
    words = [f"model.name={folder}", f"data.seq_len={SEQ_LEN}", *overrides]
    return load(tiny.ROOT / "config.yaml", words)


def cost_of(folder: Path, name: str, *overrides: str, is_gpu=False, keeps=True) -> Cost:
    return cost.cost_of(folder, settings(folder, name, *overrides), is_gpu, keeps)


@every_family
def test_flops_are_those_of_the_formulas(tmp_path, name):
    """6 for each weight of a matrix product, 12 L h s for attention (PaLM, appendix B)."""
    config = settings(tmp_path, name)
    model = build_causal_lm(tmp_path, "scratch", config.model, "fp32", 1)
    products = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    weights = sum(weight.numel() for weight in products)
    if name == "mixtral":  # a token sees two of four experts, and the router is no nn.Linear
        experts = [p for n, p in model.named_parameters() if ".experts." in n]
        gates = [p for n, p in model.named_parameters() if "gate.weight" in n]
        weights += sum(p.numel() for p in experts) // 2 + sum(p.numel() for p in gates)
    expected = 6 * weights + 12 * SMALL["num_hidden_layers"] * 32 * SEQ_LEN
    assert cost_of(tmp_path, name).flops_per_token == expected


def test_flops_do_not_count_what_is_computed_again_and_are_known_of_a_real_model(tmp_path):
    plain, again = (
        cost_of(tmp_path, "llama", f"train.activation_checkpointing={value}")
        for value in ("false", "true")
    )
    assert again.flops_per_token == plain.flops_per_token
    made = [sum(flops * count for flops, _, count in found.ops) for found in (plain, again)]
    assert 1.15 < made[1] / made[0] < 1.35
    config = settings(tmp_path, "llama", "train.torch_compile=true")  # not compiled for this
    model = build_causal_lm(tmp_path, "scratch", config.model, "fp32", 1)
    loss_model = CausalLMLoss(model, config.train, torch.device("cpu"))
    before = [parameter.clone() for parameter in model.parameters()]
    assert cost.flops_per_token(loss_model, SEQ_LEN) == plain.flops_per_token
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, value)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, ()) for name in FAMILIES),
        ("llama", ("train.precision=bf16", "train.activation_checkpointing=true")),
        ("mixtral", ("data.packing=best_fit", "train.activation_checkpointing=true")),
        ("gpt2", ("data.packing=best_fit",)),
    ],
)
def test_operations_and_peak_are_those_of_the_real_model(tmp_path, name, overrides):
    config = settings(tmp_path, name, *overrides, f"train.micro_batch_size={ROWS}")
    found = cost.cost_of(tmp_path, config, False, keeps_gradients=False)
    precision, packing = config.train.precision, config.data.packing
    model = build_causal_lm(tmp_path, "scratch", config.model, precision, 1)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    loss_model = CausalLMLoss(model, config.train, torch.device("cpu"), packing, SEQ_LEN)
    tokens = torch.ones(ROWS, SEQ_LEN, dtype=torch.int64)
    batch = [tokens, tokens]
    if packing != "concat":
        positions = torch.arange(SEQ_LEN).repeat(ROWS, 1)
        batch += [positions, SEQ_LEN * torch.arange(ROWS + 1, dtype=torch.int32)]
    with cost.Tracer((96, 32)) as real:
        cost.Pass(loss_model)(*batch)
    counted = [sum(count for *_, count in found.ops), real.ops.total()]
    rel = 0.03 if "gemma 2" in name else 0  # transformers makes a mask that it else leaves out
    assert counted[0] == pytest.approx(counted[1], rel=rel)
    # Of tensors this small, a chunk that goes a moment later is 1%, and on a busy machine 3 do.
    assert found.peak == pytest.approx(sum(real.peak.values()), rel=0.05)
    assert found.logits == real.peak["logits"]


def test_memory_has_what_the_optimizer_keeps_and_less_for_what_is_recomputed(tmp_path):
    config = settings(tmp_path, "llama", "train.micro_batch_size=4")
    found = cost.cost_of(tmp_path, config, True, True)
    parts = estimate.memory_of(found, config, machines(named_gpu("h100"), per_node=8))
    assert [size / found.parameters for size in [*parts.values()][:3]] == [4, 4, 8]
    assert parts["activations"] + parts["logits of the loss"] == found.peak
    less = cost_of(tmp_path, "llama", "train.activation_checkpointing=true", keeps=True)
    assert less.peak < found.peak


def machines(gpu, nodes: int = 1, per_node: int = 1) -> Machines:
    return Machines(nodes, per_node, gpu, 12.5, gpu.memory * 1e9)


def test_what_does_not_fit_is_told_with_a_setting_that_does(tmp_path):
    overrides = ["train.precision=bf16"]
    config = settings(tmp_path, "llama", "train.micro_batch_size=32", *overrides)
    found = cost.cost_of(tmp_path, config, True, True)
    need = sum(estimate.memory_of(found, config, machines(named_gpu("h100"))).values())
    gpu = replace(named_gpu("h100"), memory=(need - 0.6 * found.peak) / 1e9)
    fix = estimate.way_out(found, config, machines(gpu))
    assert re.fullmatch(r"set train\.micro_batch_size=(2|4|8)", fix)
    told = line(config, found, machines(gpu), 100, None)
    assert told.startswith("it seems not to fit: about 1.2 GB per GPU (H100), which has 1; set")
    assert told.endswith(fix)
    changed = settings(tmp_path, "llama", fix.split()[1], *overrides)
    fewer = cost.cost_of(tmp_path, changed, True, True)
    assert estimate.way_out(fewer, changed, machines(gpu)) == ""
    assert "about 1.2 of 1 GB per GPU" in line(changed, fewer, machines(gpu), 100, None)


def test_what_no_batch_can_help_is_told_with_another_way_out(tmp_path):
    config = settings(tmp_path, "llama", "train.micro_batch_size=1")
    found = cost.cost_of(tmp_path, config, True, True)
    need = sum(estimate.memory_of(found, config, machines(named_gpu("h100"))).values())
    ways = {
        0.5: "set train.activation_checkpointing=true",
        1.1: "choose a smaller model, or GPUs of more than 1 GB",
    }
    for share, fix in ways.items():
        gpu = replace(named_gpu("h100"), memory=(need - share * found.peak) / 1e9)
        assert estimate.way_out(found, config, machines(gpu)) == fix


def test_a_model_whose_code_needs_values_is_one_line(tmp_path):
    """In fp64 experts run one by one, as many as tokens chose."""
    with pytest.raises(ConfigError, match="without values .*; run some: train.max_steps=20") as e:
        cost_of(tmp_path, "mixtral", "train.precision=fp64")
    assert "\n" not in str(e.value)


NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100 80GB", "a100_80gb": "A100 80GB", "NVIDIA A100-PCIE-40GB": "A100",
    "a100": "A100", "NVIDIA H100 80GB HBM3": "H100", "nvidia_h100_pcie": "H100 PCIe",
    "h100": "H100", "NVIDIA H200": "H200", "NVIDIA GH200 480GB": "GH200", "NVIDIA B200": "B200",
    "NVIDIA A10": "A10", "NVIDIA A10G": "A10", "l40s": "L40S", "NVIDIA L4": "L4",
    "Tesla V100-SXM2-32GB": "V100 32GB", "v100": "V100", "NVIDIA GeForce RTX 4090": "RTX 4090",
    "rtx3090": "RTX 3090", "AMD Instinct MI300X": "MI300X", "a100_1g.5gb": None,
    "nvidia_a100_3g.39gb": None, "MIG 1g.10gb": None, "tesla": None, "": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_known_by_what_torch_and_slurm_call_it(name):
    assert (found := find_gpu(name)) == next((g for g in GPUS if g.name == NAMES[name]), None)
    assert (found is None) == (NAMES[name] is None)


def test_a_gpu_that_is_not_known_is_one_line_with_the_nearest():
    with pytest.raises(ConfigError, match="--gpu=h10 is no GPU that is known here; did you mean H"):
        named_gpu("h10")
    with pytest.raises(ConfigError, match="write one of GH200, B200"):
        named_gpu("xyz")


def test_an_old_gpu_is_as_fast_in_bf16_as_in_fp32():
    gpu = named_gpu("v100")
    assert gpu.flops("bf16") == gpu.flops("fp32") < gpu.flops("fp16")


PARAMETERS, TOKENS = 10**9, 8192
SYNTHETIC = Cost(  # matrix products alone
    PARAMETERS, PARAMETERS, 6 * PARAMETERS,
    [(6 * PARAMETERS * TOKENS // 10, 10**6, 10)], 10**9, 0, 0, True,
)  # fmt: skip
BATCH = ("data.seq_len=4096", "train.micro_batch_size=2", "train.precision=bf16",
         "train.global_batch_size=1024")  # fmt: skip


def test_a_step_of_matrix_products_has_the_share_of_the_peak_that_is_assumed():
    config = load(tiny.ROOT / "config.yaml", [*BATCH])
    where = machines(named_gpu("h100"), per_node=8)
    pace = estimate.pace_of(SYNTHETIC, config, where, config.batch_plan(8))
    assert pace.micro == pytest.approx(6 * PARAMETERS * TOKENS / (0.7 * 989e12))
    assert pace.step == pytest.approx(64 * pace.micro + pace.update + pace.exposed)
    assert 0.68 < estimate.mfu(config, SYNTHETIC, where, pace) < 0.70


def test_the_sum_of_gradients_hides_behind_a_backward_pass_if_the_network_is_fast():
    """16 nodes of 8 GPUs, 360 GB/s inside and 45 between: 4,500 tokens at 445 TFLOP/s."""
    seconds = estimate.all_reduce(4 * PARAMETERS, 16, 8, 360e9, 45e9)
    assert seconds / (4 * PARAMETERS / 445e12) == pytest.approx(4500, rel=0.01)
    assert estimate.all_reduce(4 * PARAMETERS, 1, 1, 360e9, 45e9) == 0
    config = load(tiny.ROOT / "config.yaml", [*BATCH])
    for network, is_hidden in ((50.0, True), (1.0, False)):
        where = replace(machines(named_gpu("h100"), 16, 8), network=network)
        pace = estimate.pace_of(SYNTHETIC, config, where, config.batch_plan(128))
        assert (pace.exposed < 0.05 * pace.micro) == is_hidden


def test_a_step_on_a_processor_is_made_of_what_was_measured_of_it():
    config = load(tiny.ROOT / "config.yaml", [*BATCH])
    where = replace(machines(named_gpu("h100"), per_node=8), gpu=None)
    assert estimate.pace_of(SYNTHETIC, config, where, config.batch_plan(8)) is None
    measured = replace(SYNTHETIC, measured=[30.0, 5.0])
    pace = estimate.pace_of(measured, config, where, config.batch_plan(8))
    assert pace.step == pytest.approx(64 * 30.0 + 5.0 + pace.exposed, abs=1e-3)
    told = line(config, SYNTHETIC, where, 100, None)
    assert told.endswith('; run: "$TRAINSTACK_PYTHON" -m trainstack plan --calibrate')
    assert "s a step" in line(config, measured, where, 100, None)


def test_goodput_falls_with_failures_and_with_the_time_between_saves():
    words = ["checkpoint.save_steps=auto", "checkpoint.failure_hours=24"]
    config = load(tiny.ROOT / "config.yaml", words)
    interval, hours, share = estimate.goodput(config, SYNTHETIC, 8, 1.0)
    assert interval == pytest.approx((2 * 0.1 * (1 + 12e9 / 200e6) * 24 * 3600) ** 0.5, rel=0.1)
    assert hours == 24 and 0.98 < share < 1
    rare = load(tiny.ROOT / "config.yaml", [words[1], "checkpoint.save_steps=36000"])
    assert estimate.goodput(rare, SYNTHETIC, 8, 1.0)[2] < share - 0.15
    epoch = load(tiny.ROOT / "config.yaml", [words[1], "checkpoint.save_steps=epoch"])
    of_rare = estimate.goodput(rare, SYNTHETIC, 8, 1.0)
    assert estimate.goodput(epoch, SYNTHETIC, 8, 1.0, epoch_steps=36000) == of_rare
    assert estimate.goodput(epoch, SYNTHETIC, 8, 1.0) == (interval, hours, share)


@pytest.fixture
def plan(home, capsys):
    """``python -m trainstack plan`` of the tiny model; what it printed."""

    def run(*arguments: str) -> str:
        config = home / "config.yaml"
        assert command.main(["--home", str(home), "--config", str(config), *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_the_page_has_memory_time_and_what_it_assumes_and_the_second_needs_no_torch(home, plan):
    where = ["--gpu", "h100", "--nodes", "2", "--gpus-per-node", "2"]
    page = plan(*where)
    assert page.startswith("demo: 0.0M parameters on 4 x H100\nglobal batch 8 sequences = 4 proc")
    assert re.search(r"all +1\.20  of 80: fits\nstep: 0\.\d+ s = 1 x 0\.\d+ s, update", page)
    for text in ("tokens/s, 0% MFU", "waiting for the sum of gradients", "checkpoints: ",
                 "goodput: ", "20 steps: 00:0", "assumed:\n  H100: 70% of 67 TFLOP/s in fp32",
                 "100 Gb/s for each GPU"):  # fmt: skip
        assert text in page, text
    code = "import sys; from trainstack.plan.command import main; main(sys.argv[1:])"
    again = [sys.executable, "-c", f"{code}; print('torch' in sys.modules)", "--home", home]
    again += ["--config", home / "config.yaml", *where]
    done = subprocess.run(again, capture_output=True, text=True, cwd=tiny.ROOT, check=True)
    assert done.stdout == f"{page}False\n"


def test_a_model_is_measured_on_request_and_what_was_found_is_used_from_then_on(plan):
    one, unknown = ("--gpus-per-node", "1", "train.micro_batch_size=4"), "step time: not known, for"
    assert f"{unknown} it was not measured on this processor; add --calibrate" in plan(*one)
    measured = plan(*one, "--calibrate")
    assert plan(*one) == measured
    found = re.search(r"step: (\S+) s = 2 x (\S+) s", measured)
    assert 0.0003 < float(found[2]) < float(found[1]) < 0.5
    assert unknown in plan(*one, "data.seq_len=16")


def test_a_model_that_does_not_fit_is_not_measured(plan, monkeypatch):
    monkeypatch.setattr(machine, "memory_here", lambda: 10**6)
    with pytest.raises(ConfigError, match="that does not fit cannot be measured; choose a smaller"):
        plan("--gpus-per-node", "1", "--calibrate")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpu", "h10"], "--gpu=h10 is no GPU that is known here; did you mean H100?"),
        (["--gpus-per-node", "3"], "train.global_batch_size=8 is no multiple of"),
        (["--nodes", "0"], "count from 1"),
        (["--gpu", "h100", "--calibrate"], "--calibrate measures processors, not GPUs"),
        (["model.name=org/none"], "model org/none is not in"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(plan, arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        plan(*arguments)
