"""Peers' training loops: the same model, the same samples in the same order, AdamW, a clip.

One loop a process, started as a person would start it, alone or under torchrun:
``loops.py LOOP FOLDER --steps N [--best] [--compile] [--done N]``. FOLDER holds the model (weights
too), ``samples.npy``, int64 [steps, samples of a step, seq_len + 1], and ``settings.json``. Rank 0
prints one JSON line: when each step ended (seconds since 1970), the losses, and its peak of memory.

With fewer steps than there are samples for, Trainer saves at the end; --done: so many of an earlier
call.

default: as the peer's own documentation has it; ``--best``: with what it offers to be faster.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

MOST_NORM = 1e6  # a clip that never acts, so that the floor, which has none, learns the same
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ends(list):
    """When steps ended. The host waits for the step before: else this would be when it queued."""

    event = None

    def note(self) -> None:
        if DEVICE == "cuda":
            before, self.event = self.event, torch.cuda.Event()
            self.event.record()
            if before:
                before.synchronize()
        self.append(time.time())


class Samples(torch.utils.data.Dataset):
    """Sample number n of this rank, in the order of the steps."""

    def __init__(self, steps: np.ndarray, rank: int = 0, world_size: int = 1):
        self.each = steps.shape[1] // world_size
        own = torch.from_numpy(steps[:, rank * self.each : (rank + 1) * self.each]).flatten(0, 1)
        self.inputs, self.targets = own[:, :-1].contiguous(), own[:, 1:].contiguous()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, numbers) -> dict[str, torch.Tensor]:
        return arguments(self.inputs[numbers], self.targets[numbers])

    def micro_batches(self, micro: int) -> list[dict[str, torch.Tensor]]:
        """All of them, in memory."""
        return [self[first : first + micro] for first in range(0, len(self), micro)]


def arguments(inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a causal LM of transformers; labels that are shifted already win over others."""
    return {"input_ids": inputs, "labels": inputs, "shift_labels": targets}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--done", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    options.settings = json.loads((options.folder / "settings.json").read_text())
    steps = np.load(options.folder / "samples.npy")
    if options.loop != "trainer":  # which skips, when it is resumed, what it has used
        steps = steps[: options.steps]
    options.rank = int(os.environ.get("RANK", "0"))
    options.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ended, losses = LOOPS[options.loop](options, steps)
    if options.rank == 0:
        # Not getrusage: it counts who started this process, too.
        peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
        told = {"ended": ended, "losses": losses, "peak_gb": int(peak) * 1024 / 1e9}
        print(json.dumps(told), flush=True)
    os._exit(0)


def new_model(options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    if not (rank := options.settings["lora"]):
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.settings["seed"])
    asked = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, **asked))


def autocast(options):
    if options.settings["precision"] == "bf16":
        return torch.autocast(DEVICE, torch.bfloat16)
    return contextlib.nullcontext()


def bare(options, steps: np.ndarray):
    """The floor: tensors that are there, forward, backward, fused AdamW, and nothing else.

    --best: no whole logits in fp32 either.
    """
    model, ended, losses = new_model(options).to(DEVICE), Ends(), []
    if options.world_size > 1:
        torch.distributed.init_process_group("gloo")
        ddp = nn.parallel.DistributedDataParallel(model)
    else:
        ddp = model
    if options.compile:
        ddp = torch.compile(ddp)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.settings["rate"], betas=(0.9, 0.95), weight_decay=0.0,
        fused=True,
    )  # fmt: skip
    model.train()
    micro = options.settings["micro"]
    samples = Samples(steps, options.rank, options.world_size)
    samples.inputs, samples.targets = samples.inputs.to(DEVICE), samples.targets.to(DEVICE)
    each, total = samples.each // micro, 0.0
    for number, batch in enumerate(samples.micro_batches(micro), start=1):
        is_last = number % each == 0
        is_sent = is_last or options.world_size == 1
        with contextlib.nullcontext() if is_sent else ddp.no_sync():
            with autocast(options):
                loss = ddp(**batch, use_cache=False).loss / each
            loss.backward()
        total = total + loss.detach()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
            ended.note()
            losses.append(total)
            total = 0.0
    return ended, mean_over_ranks(losses, options)


def mean_over_ranks(losses, options) -> list[float]:
    losses = torch.stack(losses).double()
    if options.world_size > 1:
        torch.distributed.all_reduce(losses)
    return (losses / options.world_size).tolist()


def trainer(options, steps: np.ndarray):
    """HF Trainer."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    settings, ended, losses = options.settings, Ends(), []
    best = {"logging_nan_inf_filter": False, "average_tokens_across_devices": False}
    asked = dict(
        output_dir=str(options.folder / "trainer"), max_steps=options.steps,
        per_device_train_batch_size=settings["micro"],
        gradient_accumulation_steps=steps.shape[1] // settings["micro"] // options.world_size,
        learning_rate=settings["rate"], lr_scheduler_type="constant", adam_beta2=0.95,
        max_grad_norm=MOST_NORM, bf16=settings["precision"] == "bf16", use_cpu=DEVICE == "cpu",
        torch_compile=options.compile, report_to="none", disable_tqdm=True,
        save_strategy="steps" if options.steps < len(steps) else "no", save_steps=options.steps,
        dataloader_pin_memory=DEVICE == "cuda", train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="steps", logging_steps=options.steps,
        **(best if options.best else {}),
    )  # fmt: skip
    known = {field.name for field in dataclasses.fields(TrainingArguments)}  # they come and go
    arguments = TrainingArguments(**{name: asked[name] for name in asked if name in known})

    class Step(TrainerCallback):
        def on_step_end(self, *_, **__):
            ended.note()

    class Loop(Trainer):
        def training_step(self, *arguments, **more):
            loss = super().training_step(*arguments, **more)
            losses.append(loss.detach())
            return loss

    samples = Samples(steps)
    if options.world_size > 1:  # accelerate's shards take turns, batch by batch
        each = steps.shape[1] // options.world_size
        order = np.arange(steps.shape[1]).reshape(options.world_size, -1, settings["micro"])
        order = order.transpose(1, 0, 2).reshape(-1)
        samples = Samples(steps[:, order])
        assert each % settings["micro"] == 0
    loop = Loop(
        new_model(options),
        arguments,
        train_dataset=samples,
        callbacks=[Step()],
    )
    loop.remove_callback(PrinterCallback)
    loop.train(resume_from_checkpoint=options.done > 0)
    each = arguments.gradient_accumulation_steps
    parts = [torch.stack(losses[n : n + each]).sum() for n in range(0, len(losses), each)]
    return ended, mean_over_ranks(parts, options)


def accelerate(options, steps: np.ndarray):
    """accelerate, as its examples write a loop."""
    from accelerate import Accelerator

    settings, ended, losses = options.settings, [], []
    each = steps.shape[1] // settings["micro"] // options.world_size
    accelerator = Accelerator(
        gradient_accumulation_steps=each, cpu=True,
        mixed_precision="bf16" if settings["precision"] == "bf16" else "no",
    )  # fmt: skip
    model = new_model(options)
    if options.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["rate"], betas=(0.9, 0.95), weight_decay=0.0,
        **({"fused": True} if options.best else {}),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Samples(steps), batch_size=settings["micro"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    total = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            total = total + loss.detach() / each
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MOST_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ended.append(time.time())
            losses.append(total)
            total = 0.0
    return ended, mean_over_ranks(losses, options)


def lightning(options, steps: np.ndarray):
    """PyTorch Lightning."""
    import pytorch_lightning

    settings, ended, losses = options.settings, [], []
    each = steps.shape[1] // settings["micro"] // options.world_size

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model(options)
            if options.compile:
                self.model = torch.compile(self.model)

        def training_step(self, batch, _):
            loss = self.model(**batch, use_cache=False).loss
            losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            # Its mixed precision does not clip for a fused one.
            is_fused = options.best and settings["precision"] == "fp32"
            fused = {"fused": True} if is_fused else {}
            return torch.optim.AdamW(
                self.parameters(), lr=settings["rate"], betas=(0.9, 0.95), weight_decay=0.0, **fused
            )

        def on_train_batch_end(self, *_):
            if len(losses) % each == 0:
                ended.append(time.time())

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", devices=options.world_size, max_steps=len(steps), logger=False,
        strategy="ddp" if options.world_size > 1 else "auto",
        accumulate_grad_batches=each, gradient_clip_val=MOST_NORM, enable_checkpointing=False,
        precision="bf16-mixed" if settings["precision"] == "bf16" else "32-true",
        enable_model_summary=False, enable_progress_bar=not options.best,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Samples(steps), batch_size=settings["micro"])
    trainer.fit(Module(), loader)
    parts = [torch.stack(losses[n : n + each]).mean() for n in range(0, len(losses), each)]
    return ended, mean_over_ranks(parts, options)


LOOPS = {"bare": bare, "trainer": trainer, "accelerate": accelerate, "lightning": lightning}

if __name__ == "__main__":
    sys.exit(main())
