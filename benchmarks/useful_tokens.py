"""Training on documents of many lengths: our packing beside Trainer's padding and TRL's packing.

Documents of log-normal lengths from 16 to 512 tokens, as conversations have, train a Llama of 3.4M
parameters in fp32, by one thread: forward, backward, clipping, fused AdamW. Targets per second of
steps count; padding is no target. A step has about as many for all: 4 samples of 512 tokens,
packed, or 16 documents. Trainer pads to the longest of a batch. TRL packs by bfd and takes the 4
samples at once or one by one; the better one counts. The limit ("floor") is our step on samples
that are full and one document each. For information: Trainer with batches of similar lengths, which
begins with the longest.
"""

import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trainstack import distributed
from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data.corpus import open_corpus
from trainstack.data.feed import StepSampler, micro_batches
from trainstack.data.split import Split
from trainstack.model.ddp import DataParallel
from trainstack.model.loss import CausalLMLoss
from trainstack.prepare import prepare
from trainstack.storage import files, layout, manifest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS, MEDIAN, SIGMA, SHORTEST, SEQ_LEN = 4000, 90, 0.9, 16, 512  # the lengths in tokens
SAMPLES, DOCUMENTS_A_STEP = 4, 16
WARM_UP, STEPS, ROUNDS = 1, 6, 3
LEAST_PADDED, LEAST_PACKED = 2.2, 1.1
END, PADDING, VOCAB_SIZE = "<end>", "<pad>", 8192
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE,
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
SETTINGS = [
    "model.name=llama", "data.name=lengths", f"data.seq_len={SEQ_LEN}", "data.packing=best_fit",
    "data.eval_fraction=0", f"train.global_batch_size={SAMPLES}",
    f"train.micro_batch_size={SAMPLES}",
]  # fmt: skip


def main() -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU
    torch.set_num_threads(1)  # two wait for each other if the machine is not quiet
    disable_progress_bars()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as name:
        home = Path(name)
        config, tokenizer = load(ROOT / "config.yaml", SETTINGS), make_home(home)
        prepare.prepare(home, config, force=False)
        store = open_corpus(home, config).train
        dropped = len(store.ids) - len(store.stops) - int(store.row_targets.sum())
        loops = with_trainers(home, store, tokenizer)
        loops |= with_trainstack(home, config, store)
        rounds = [{n: loop() for n, loop in loops.items()} for _ in range(ROUNDS)]
    for loop in loops:
        speed, useful = (statistics.median(r[loop][i] for r in rounds) for i in (0, 1))
        print(f"{loop:26} {speed:7,.0f} targets/s, {useful:6,.0f} a step")
    padded = times_faster(rounds, "Trainer, padded")
    packed = times_faster(rounds, "TRL, at once", "TRL, one by one")
    print(f"ours: {times_faster(rounds, 'floor'):.2f} of the floor")
    holds = padded >= LEAST_PADDED and packed >= LEAST_PACKED and dropped == 0
    print(f"useful_tokens: target {LEAST_PADDED} times Trainer with padding, {LEAST_PACKED} times "
          f"TRL's packing, nothing dropped, measured {padded:.2f}, {packed:.2f}, {dropped}, "
          f"{'holds' if holds else 'falls short'}")  # fmt: skip
    return 0 if holds else 1


def times_faster(rounds: list[dict], *peers: str) -> float:
    return statistics.median(r["ours"][0] / max(r[n][0] for n in peers) for r in rounds)


def with_trainstack(home: Path, config: Config, store: Split) -> dict:
    """Model, optimizer and sampler, as train.py builds and uses them."""
    world, plan = distributed.start(1), config.batch_plan(1)
    causal_lm = new_llama(home)
    loss_model = CausalLMLoss(causal_lm, config.train, world.device, config.data.packing)
    strategy = DataParallel(loss_model, config.optim, "fp32", plan, world)
    is_bad = torch.zeros(())
    sampler = StepSampler(store.num_samples, SAMPLES, 0, 1, config.run.seed)
    numbers = itertools.count()
    full = torch.randint(VOCAB_SIZE, (SAMPLES, SEQ_LEN + 1))

    def step(batches, targets: int) -> int:
        _, norm = strategy.gradients(batches, targets)
        strategy.update(is_bad, norm, config.optim.max_grad_norm)
        return targets

    def packed() -> int:
        samples = sampler.samples_at(next(numbers))
        batches = micro_batches(samples, SAMPLES, store, world.device)
        return step(batches, store.target_tokens(samples))

    def dense() -> int:
        return step([(full[:, :-1], full[:, 1:])], SAMPLES * SEQ_LEN)

    return {"floor": lambda: timed(dense), "ours": lambda: timed(packed)}


def timed(step) -> tuple[float, float]:
    """Targets per second, and per step."""
    for _ in range(WARM_UP):
        step()
    started = time.perf_counter()
    useful = sum(step() for _ in range(STEPS))
    return useful / (time.perf_counter() - started), useful / STEPS


def with_trainers(home: Path, store: Split, tokenizer) -> dict:
    from trl import SFTConfig, SFTTrainer

    table = Dataset.from_dict({"input_ids": np.split(store.ids, store.stops[:-1])})
    common = {
        "output_dir": str(home / "trainer"), "max_steps": WARM_UP + STEPS, "bf16": False,
        "activation_checkpointing": False, "dataloader_pin_memory": False, "disable_tqdm": True,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
    }  # fmt: skip

    def padded(order: str):
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        arguments = TrainingArguments(
            **common, per_device_train_batch_size=DOCUMENTS_A_STEP, train_sampling_strategy=order
        )
        return Loop(Trainer(new_llama(home), arguments, collator, table))

    def packed(batch: int):
        arguments = SFTConfig(
            **common, per_device_train_batch_size=batch, packing=True, max_length=SEQ_LEN,
            gradient_accumulation_steps=SAMPLES // batch,
        )  # fmt: skip
        return Loop(
            SFTTrainer(new_llama(home), arguments, train_dataset=table, processing_class=tokenizer)
        )

    return {
        "Trainer, padded": padded("random"),
        "Trainer, padded, by length": padded("group_by_length"),
        "TRL, at once": packed(SAMPLES),
        "TRL, one by one": packed(1),
    }


class Loop(TrainerCallback):
    """A trainer's own loop, timed after its warm-up; its targets are counted in its batches."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.collate, self.seeds = trainer, trainer.data_collator, itertools.count()
        trainer.data_collator = self.counted
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)

    def __call__(self) -> tuple[float, float]:
        self.targets, self.ended = [], []
        torch.manual_seed(next(self.seeds))  # other documents in each round
        self.trainer.train()
        each = self.trainer.args.gradient_accumulation_steps
        useful = sum(self.targets[WARM_UP * each : (WARM_UP + STEPS) * each])
        return useful / (self.ended[-1] - self.ended[WARM_UP - 1]), useful / STEPS

    def counted(self, rows: list) -> dict:
        batch = self.collate(rows)
        self.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    def on_step_end(self, *_, **__) -> None:
        self.ended.append(time.perf_counter())


def new_llama(home: Path):
    torch.manual_seed(1)
    folder = layout.model_folder(home, "llama")
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def make_home(home: Path) -> PreTrainedTokenizerFast:
    """A model and documents of these lengths, as a download would leave them; the tokenizer."""
    words = {f"w{number}": number for number in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel({END: 0, PADDING: 1, **words}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    generator = np.random.default_rng(1)
    lengths = generator.lognormal(np.log(MEDIAN), SIGMA, DOCUMENTS).clip(SHORTEST, SEQ_LEN)
    lines = [
        json.dumps({"text": " ".join(f"w{n}" for n in generator.integers(2, VOCAB_SIZE, length))})
        for length in lengths.astype(int) - 1  # the end token is one more
    ]
    publish(layout.dataset_folder(home, "lengths", None), "dataset", {"a.jsonl": "\n".join(lines)})
    special = {"eos_token": END, "pad_token": PADDING}
    publish(layout.model_folder(home, "llama"), "model", {
        "config.json": json.dumps(LLAMA), "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(special),
    })  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def publish(folder: Path, kind: str, content: dict[str, str]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    entries = {n: files.write_file(temporary / n, t.encode()) for n, t in content.items()}
    manifest.publish_folder(temporary, folder, entries, kind=kind, source="made", revision=None)


if __name__ == "__main__":
    sys.exit(main())
