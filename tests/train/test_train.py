"""Whole runs under torchrun on this machine: the promises about world size and interruption."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import decoders

import tiny
from trainstack.checkpoint.names import checkpoints
from trainstack.checkpoint.state import read_state
from trainstack.config.load import load
from trainstack.data import feed, order
from trainstack.errors import ConfigError
from trainstack.evaluation.held_out import Evaluation, overall
from trainstack.evaluation.samples import Prompts
from trainstack.prepare.held_out import is_held_out
from trainstack.run.folder import RunFolder
from trainstack.storage import layout


def weights_hash(home: Path, run: str, step: int = 20) -> str:
    path = home / "runs" / run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def status(home: Path, run: str) -> dict:
    return RunFolder(home / "runs" / run).status()


@pytest.fixture(scope="module")
def reference(home):
    """A run of 20 steps on two processes that nothing disturbed."""
    result = tiny.train(home, 2, "run.name=reference")
    assert status(home, "reference")["state"] == "DONE"
    return result


def test_a_run_learns_evaluates_and_ends_with_a_sample(home, reference):
    losses = tiny.metrics(home, "reference")
    assert sorted(losses) == list(range(1, 21))
    assert losses[20] < losses[1] - 1
    assert sorted(tiny.metrics(home, "reference", "eval_loss")) == [10, 20]
    assert "perplexity" in reference.stdout
    assert "sample  one" in reference.stdout and "was cut, and did not stop" in reference.stdout
    assert "rank 1 on" in reference.stdout


def test_bits_per_byte_are_those_of_the_held_out_text(home, reference):
    data = layout.dataset_folder(home, "tiny", None) / "train.jsonl"
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    held_out = [text for text in texts if is_held_out(text, tiny.SETTINGS["data.eval_fraction"])]
    tokens = sum(len(text.split()) + 1 for text in held_out)  # a word, or the end of a document
    bits = tiny.metrics(home, "reference", "eval_bits_per_byte")
    for step, loss in tiny.metrics(home, "reference", "eval_loss").items():
        expected = loss / math.log(2) * tokens / sum(map(len, held_out))
        assert bits[step] == pytest.approx(expected)
    assert f"   {bits[20]:.4f} bits per byte   (512 held-out tokens)" in reference.stdout


def test_bits_per_byte_of_data_sets_are_joined_and_not_guessed():
    one, other = Evaluation(1.0, 100, 200.0, 40), Evaluation(2.0, 50, 400.0, 5)
    joined = overall([one, other])
    assert joined.bits_per_byte == pytest.approx(200 / math.log(2) / 600)
    assert (joined.loss, joined.targets, joined.token_accuracy) == (200 / 150, 150, 0.3)
    unknown = overall([one, other._replace(bytes=None)])
    assert unknown.bits_per_byte is None and unknown.loss == joined.loss


def asking(home: Path, tokenizer, ends: list[int], *settings: str) -> Prompts:
    config = load(home / "config.yaml", ["eval.sample_tokens=48", *settings])
    prompts = Prompts(config, False, {})
    prompts.tokenizer, prompts.ends = tokenizer, ends
    return prompts


@pytest.mark.parametrize("end", [[], [*range(1, 96)]])
def test_a_sample_is_no_longer_than_the_model_has_positions(home, end):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=8, vocab_size=96)
    model = transformers.GPT2LMHeadModel(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "models/tiny")
    prompts = asking(home, tokenizer, end, "data.seq_len=4")
    ended = prompts.answer(model.eval(), "one").end
    cut = "was cut after 7 tokens: with the prompt they are the 8 it can read"
    assert ended == f"{'stopped by itself, after 1 tokens' if end else cut} (eval.sample_tokens=48)"
    with pytest.raises(ConfigError, match="has 8 of the 8 tokens that the model can read"):
        prompts.answer(model, "one " * 8)


def test_a_sample_heeds_what_a_generation_config_asks_for(home):
    torch.manual_seed(0)
    made = tiny.byte_tokenizer()
    made.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=len(tokenizer))
    model = transformers.GPT2LMHeadModel(config)
    prompts = asking(home, tokenizer, [], "data.seq_len=64")
    torch.manual_seed(0)
    _, whole, ended, _ = prompts.answer(model.eval(), "one")
    assert "was cut" in ended
    stop = whole.removeprefix("one")[9]
    model.generation_config.update(stop_strings=[stop], return_dict_in_generate=True)
    torch.manual_seed(0)
    _, text, ended, _ = prompts.answer(model, "one")
    assert text == whole[: whole.index(stop, len("one")) + 1]
    assert "stopped by itself" in ended


def test_metrics_have_their_stable_keys(home, reference):
    first = json.loads((home / "runs/reference/metrics.jsonl").read_text().splitlines()[0])
    keys = (
        "step loss mean_loss token_accuracy learning_rate grad_norm tokens_seen samples_seen epoch"
    )
    keys += " tokens_per_second step_seconds data_seconds peak_memory_gb samples_hash"
    assert set(keys.split()) == set(first)


def test_every_rank_has_its_log_file(home, reference):
    names = {path.name.split(".")[-2] for path in (home / "runs/reference/logs").glob("*.log")}
    assert names == {"rank0", "rank1"}


def test_transformers_loads_the_checkpoint_and_its_tokenizer(home, reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home / "runs/reference/checkpoints/checkpoint-20"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("one two three four", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "five"


def test_the_logged_hashes_are_those_of_the_samples_that_the_step_had_to_consume(home, reference):
    store = next((home / "tokens").glob("*/meta.json"))
    tokens = json.loads(store.read_bytes())["counts"]["train_tokens"]
    sampler = feed.StepSampler((tokens - 1) // tiny.SEQ_LEN, 8, 0, 1, 1234)
    lines = (home / "runs/reference/samples.jsonl").read_text().splitlines()
    logged = {r["step"]: r["samples_hash"] for r in map(json.loads, lines)}
    wanted = {s: f"{order.samples_hash(sampler.samples_at(s - 1)):013x}" for s in range(1, 21)}
    assert logged == wanted


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp64", 1e-12), pytest.param("bf16", 1e-2, marks=pytest.mark.matrix)],
)
def test_one_two_and_four_processes_consume_the_same_samples_and_lose_alike(
    home, precision, tolerance
):
    losses, hashes = {}, {}
    for processes in (1, 2, 4):
        run = f"{precision}-{processes}"
        tiny.train(
            home, processes, f"run.name={run}", f"train.precision={precision}", "train.max_steps=8"
        )
        losses[processes] = tiny.metrics(home, run)
        hashes[processes] = tiny.metrics(home, run, "samples_hash")
    assert hashes[1] == hashes[2] == hashes[4]
    assert len(set(hashes[1].values())) == 8
    for processes in (2, 4):
        for step, loss in losses[1].items():
            assert losses[processes][step] == pytest.approx(loss, abs=tolerance), (processes, step)


def start(home: Path, run: str, processes: int = 2, *overrides: str) -> subprocess.Popen:
    command = tiny.train_command(home, processes, f"run.name={run}", *overrides)
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=tiny.environment(),
    )  # fmt: skip


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_three_processes_resume_to_the_last_bit(home):
    """Above two ranks the order of summation depends on how DDP groups its buckets."""
    common = ("train.global_batch_size=6", "train.micro_batch_size=1")
    tiny.train(home, 3, "run.name=three", *common)
    tiny.train(home, 3, "run.name=three-stopped", *common, "train.max_steps=20")
    folder = home / "runs/three-stopped"
    shutil.rmtree(folder / "checkpoints/checkpoint-20")
    shutil.rmtree(folder / "checkpoints/checkpoint-15", ignore_errors=True)
    tiny.train(home, 3, "run.name=three-stopped", *common)
    assert "resume" in {event["event"] for event in RunFolder(folder).events()}
    assert tiny.metrics(home, "three-stopped") == tiny.metrics(home, "three")
    assert weights_hash(home, "three-stopped") == weights_hash(home, "three")


@pytest.mark.parametrize(
    "victim", ["model.safetensors", "training/optimizer-1.safetensors", "manifest.json"]
)
def test_one_flipped_bit_is_named_and_the_run_still_ends_bit_identical(home, reference, victim):
    run = f"flipped-{Path(victim).stem}"
    shutil.copytree(home / "runs/reference", home / "runs" / run)
    path = home / "runs" / run / "checkpoints/checkpoint-20" / victim
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 4
    path.write_bytes(broken)
    result = tiny.train(home, 2, f"run.name={run}")
    assert f"checkpoint-20 is damaged ({victim}" in result.stdout
    assert "using checkpoint-15 instead" in result.stdout
    assert tiny.metrics(home, run) == tiny.metrics(home, "reference")
    assert weights_hash(home, run) == weights_hash(home, "reference")


def test_a_warned_stop_saves_pauses_and_costs_nothing(home, reference):
    process = start(home, "paused")
    metrics_file = home / "runs/paused/metrics.jsonl"
    while not (metrics_file.exists() and metrics_file.read_bytes().count(b'"loss"') >= 2):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # torchrun passes it to the ranks
    output, _ = process.communicate(timeout=120)
    paused = status(home, "paused")
    assert paused["state"] == "PAUSED", output[-3000:]
    assert paused["exit_code"] == 75
    assert f"checkpoint-{paused['step']}" == paused["checkpoint"]
    tiny.train(home, 2, "run.name=paused")
    steps = [e["step"] for e in RunFolder(home / "runs/paused").events() if e["event"] == "resume"]
    assert steps == [paused["step"]]
    assert tiny.metrics(home, "paused") == tiny.metrics(home, "reference")
    assert weights_hash(home, "paused") == weights_hash(home, "reference")


def test_another_seed_in_the_same_run_is_refused_and_changes_nothing(home, reference):
    before = weights_hash(home, "reference")
    result = tiny.train(home, 1, "run.name=reference", "run.seed=5", check=False)
    assert "run reference cannot continue with run.seed=5 (the run has 1234)" in result.stdout
    assert result.returncode != 0
    assert weights_hash(home, "reference") == before
    assert status(home, "reference")["state"] == "DONE"
    assert "seed: 1234" in (home / "runs/reference/config.yaml").read_text()


def test_a_new_learning_rate_is_applied_when_a_run_resumes(home, reference):
    shutil.copytree(home / "runs/reference", home / "runs/retuned")
    result = tiny.train(
        home, 2, "run.name=retuned", "train.max_steps=22", "optim.learning_rate=0.001",
        "optim.lr_scheduler_type=constant", "optim.lr_scheduler_kwargs={}",
    )  # fmt: skip
    rates = tiny.metrics(home, "retuned", "learning_rate")
    assert rates[21] == rates[22] == 0.001
    assert rates[20] != 0.001
    assert "resume  optim.learning_rate: 0.01 -> 0.001" in result.stdout
    assert "resume  train.max_steps: 20 -> 22" in result.stdout


def test_a_second_job_on_the_same_run_is_refused_and_the_first_continues(home):
    process = start(home, "shared", 1, "train.max_steps=1000000")
    wait_for(process, (home / "runs/shared/metrics.jsonl").exists)
    second = tiny.train(home, 1, "run.name=shared", check=False)
    assert "train.py: error: job local-" in second.stdout
    assert "works in" in second.stdout
    assert process.poll() is None
    assert status(home, "shared")["state"] == "RUNNING"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert status(home, "shared")["state"] == "PAUSED"


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(home):
    result = tiny.train(
        home, 2, "run.name=diverged", "optim.learning_rate=1e30", "optim.max_grad_norm=null",
        check=False,
    )  # fmt: skip
    assert "DIVERGED at step" in result.stdout
    assert not checkpoints(home / "runs/diverged/checkpoints")
    records = RunFolder(home / "runs/diverged").failures("local", 1)
    assert records[0]["state"] == "DIVERGED"
    assert records[0]["exit_code"] == 79


@pytest.mark.parametrize("precision", ["fp16"])
def test_fp16_trains_with_a_scaler_whose_state_is_kept(home, precision):
    run = f"half-{precision}"
    tiny.train(home, 1, f"run.name={run}", f"train.precision={precision}")
    state = read_state(home / "runs" / run / "checkpoints/checkpoint-20")
    assert state.scaler["scale"] > 1
    losses = tiny.metrics(home, run)
    assert losses[20] < losses[1] - 1


def test_it_trains_without_torchrun_and_alike_if_that_is_asked_of_a_gpu(home, reference):
    asked = ["train.deterministic=true", "train.precision=tf32"]  # of a GPU; this is a CPU's fp32
    command = tiny.train_command(home, 1, "run.name=alone", "train.max_steps=3", *asked)
    command = [command[0], *command[command.index(tiny.ROOT / "train.py") :]]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=tiny.environment()
    )
    assert result.returncode == 0, result.stderr
    losses, plain = tiny.metrics(home, "alone"), tiny.metrics(home, "reference")
    assert sorted(losses) == [1, 2, 3]
    assert all(abs(losses[step] - plain[step]) < 1e-5 for step in losses)


@pytest.mark.parametrize(
    ("names", "message"),
    [({"RANK": "0"}, "RANK is set but LOCAL_RANK is not; start train.py by torchrun")],
)
def test_half_of_torchruns_environment_is_one_clear_line(home, names, message):
    command = tiny.train_command(home, 1)
    command = [command[0], *command[command.index(tiny.ROOT / "train.py") :]]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=tiny.environment(**names)
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"train.py: error: {message}"]


def test_the_compiled_model_learns_the_same_at_each_number_of_processes(home, reference):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on the CPU needs g++, which is not here")
    plain, steps = tiny.metrics(home, "reference"), (1, 2, 3, 4)
    changes = ("train.torch_compile=true", f"train.max_steps={steps[-1]}")
    losses = {}
    for processes in (1, 2):
        run = f"compiled-{processes}"
        told = tiny.train(home, processes, f"run.name={run}", *changes)
        assert "compiling\n" in told.stdout
        losses[processes] = tiny.metrics(home, run)
        assert all(abs(losses[processes][step] - plain[step]) < 1e-3 for step in steps)
    for step in steps:
        assert losses[2][step] == pytest.approx(losses[1][step], rel=1e-6), step
