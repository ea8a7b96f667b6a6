"""Token accuracy, and prompts during training: neither changes what is learned."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.load import load
from trainstack.distributed import World
from trainstack.evaluation.samples import Prompts
from trainstack.model.loss import CausalLMLoss
from trainstack.run.folder import RunFolder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_counted_are_the_targets_with_the_largest_logit_and_no_bit_of_the_loss_changes(
    monkeypatch, is_chunked, precision
):
    monkeypatch.setattr("trainstack.model.loss.LEAST_TOKENS", 7)
    monkeypatch.setattr("trainstack.model.loss.CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr("trainstack.model.loss.MULTIPLE", {"cpu": 64})  # as on a GPU: padded
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**tiny.CONFIG, vocab_size=96, initializer_range=0.3)
    causal_lm = transformers.LlamaForCausalLM(config)
    train = load(tiny.ROOT / "config.yaml", [f"train.precision={precision}"]).train
    loss_model = CausalLMLoss(causal_lm, train, torch.device("cpu"))
    assert loss_model.is_chunked
    loss_model.is_chunked = is_chunked
    if not is_chunked:
        loss_model._body = [causal_lm]
    inputs = torch.randint(96, (2, 33))
    labels = inputs[:, 1:].clone()
    with torch.no_grad(), loss_model.autocast():
        best = causal_lm(inputs[:, :-1]).logits.argmax(-1)
    labels[0, 5:20] = best[0, 5:20]  # else chance alone
    labels[1, :8] = IGNORED_LABEL

    def gradients() -> list[torch.Tensor]:
        loss = loss_model(inputs[:, :-1], labels)
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in loss_model.parameters())]
        loss_model.zero_grad()
        return found

    before = gradients()
    loss_model.count(True)
    counted = gradients()
    assert all(torch.equal(one, other) for one, other in zip(before, counted, strict=True))
    assert loss_model.hits == (best == labels).sum() and loss_model.hits >= 15
    gradients()
    assert loss_model.hits == 2 * (best == labels).sum(), "of all micro steps"


def weights_hash(home: Path, run: str) -> str:
    path = home / "runs" / run / "checkpoints" / "checkpoint-10" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prompts_change_no_bit_of_a_run_with_dropout_and_end_none(own_home, monkeypatch):
    monkeypatch.setitem(tiny.CONFIG, "attention_dropout", 0.2)
    tiny.make_model(own_home, "drops")
    settings = ["model.name=drops", "train.max_steps=10", "eval.eval_steps=4"]
    tiny.train(own_home, 2, "run.name=without", "eval.prompts=[]", *settings)
    long, asked = "one " * 70, "[{role: user, content: two}]"
    prompts = f'eval.prompts=["one", "two", "{long}", {asked}]'
    log = tiny.train(own_home, 2, "run.name=with", prompts, *settings).stdout
    assert weights_hash(own_home, "with") == weights_hash(own_home, "without")
    for key in ("loss", "token_accuracy", "eval_loss", "eval_token_accuracy"):
        assert tiny.metrics(own_home, "with", key) == tiny.metrics(own_home, "without", key)
    run = RunFolder(own_home / "runs" / "with")
    said = [(e["step"], e["prompt"]) for e in run.events() if e["event"] == "sample"]
    assert said == [(step, prompt) for step in (4, 8, 10) for prompt in ("one", "two")]
    assert "could not be made: eval.prompts has 70 of the 64 tokens that the model can read" in log
    assert "could not be made: eval.prompts has messages (two), and the model has no chat" in log
    texts = [e["text"] for e in run.events() if e["event"] == "sample"][-2:]
    assert (run.path / "sample.txt").read_text() == "\n\n".join(texts) + "\n"
    assert run.status()["state"] == "DONE"


def test_a_stop_while_it_speaks_ends_that_and_nothing_drawn_at_random_is_used_up(home):
    torch.manual_seed(2)
    config = load(home / "config.yaml", ["eval.prompts=[one, two]", "eval.sample_tokens=20"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.CONFIG, vocab_size=96))
    loss_model = CausalLMLoss(model, config.train, torch.device("cpu"))
    folder = home / "models" / "tiny"
    prompts = Prompts(config, False, {p.name: p.read_bytes() for p in folder.glob("token*")})
    world, asked, before = World(0, 0, 1, 1, torch.device("cpu")), [], torch.get_rng_state()

    def wants_stop(after: int) -> bool:
        asked.append(len(asked))
        return len(asked) > after

    assert prompts.ask(loss_model, world, lambda: wants_stop(7)) is None
    assert len(asked) < 15, "no more of the first text, and nothing of the second"
    assert loss_model.training and torch.equal(torch.get_rng_state(), before)
