"""What a checkpoint costs training: ours, overlapped, beside torch.save of the same on rank 0.

Two processes train a Llama of 40M parameters with AdamW on the CPU. In turns a step is followed by
nothing, by torch.save on rank 0 while the other waits, and by the start of our save. Stall: how
long the loop waited, on the rank that waited longest. Slowdown: the steps while our save was under
way, against the quiet ones around them.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from trainstack import distributed
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import Snapshot
from trainstack.config.load import load
from trainstack.model.causal_lm import count_parameters
from trainstack.model.ddp import DataParallel
from trainstack.model.loss import CausalLMLoss

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, QUIET_STEPS = 5, 3
MOST_STALL, MOST_SLOWDOWN = 0.05, 1.10


def main() -> int:
    if "RANK" in os.environ:
        return measure(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", __file__, folder]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode or int(not (Path(folder) / "holds").exists())


class Trainer:
    """The loop's parts, as train.py builds them."""

    def __init__(self, world: distributed.World):
        self.config = load(ROOT / "config.yaml", ["train.global_batch_size=4", "data.seq_len=256",
                                                  "train.micro_batch_size=2"])  # fmt: skip
        self.plan, self.world = self.config.batch_plan(world.world_size), world
        shape = LlamaConfig(
            vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(1)
        self.causal_lm = LlamaForCausalLM(shape).float()
        loss_model = CausalLMLoss(self.causal_lm, self.config.train, world.device)
        self.strategy = DataParallel(loss_model, self.config.optim, "fp32", self.plan, world)
        tokens = torch.randint(0, 16384, (2, 257))
        self.batch = [(tokens[:, :-1], tokens[:, 1:])]

    def step(self, before_update) -> tuple[float, float]:
        """One step; its seconds, and those it waited for a save."""
        started = time.perf_counter()
        _, norm = self.strategy.gradients(self.batch, self.plan.tokens_per_step)
        waited = before_update()
        self.strategy.update(torch.zeros(()), norm, 1.0)
        dist.barrier()
        return time.perf_counter() - started, waited

    def snapshot(self, step: int) -> Snapshot:
        return Snapshot(step, self.strategy.share(), b"{}", {"config.json": b"{}"})


def measure(folder: Path) -> int:
    world = distributed.start(2)
    trainer = Trainer(world)
    saver = Saver(folder, world, 2, "benchmark.1", lambda: None)
    peers, stalls, slowdowns, durations = [], [], [], []
    for number in range(ROUNDS + 1):
        quiet = [trainer.step(saver.before_update)[0] for _ in range(QUIET_STEPS)]
        peers.append(save_with_torch(trainer, folder / "peer.pt"))
        quiet += [trainer.step(saver.before_update)[0] for _ in range(QUIET_STEPS)]
        started = time.perf_counter()
        saver.start(trainer.snapshot(number + 1))
        stall, busy = time.perf_counter() - started, []
        while saver.is_busy and (busy == [] or not is_over(saver, world)):
            seconds, waited = trainer.step(saver.before_update)
            stall += waited
            busy.append(seconds)
        saved = saver.wait()
        assert saved.problem is None, saved.problem
        stalls.append(longest(stall))
        durations.append(saved.seconds)
        slowdowns.append(statistics.median(busy) / statistics.median(quiet))
    peers, stalls, slowdowns = peers[1:], stalls[1:], slowdowns[1:]  # the first allocates memory
    if world.is_main:
        ratio = statistics.median(s / p for s, p in zip(stalls, peers, strict=True))
        slowdown = statistics.median(slowdowns)
        parameters = count_parameters(trainer.causal_lm)
        print(f"{parameters / 1e6:.1f}M parameters, {saved.size / 1e6:.0f} MB a checkpoint, step "
              f"{statistics.median(quiet):.2f} s, a save of ours published after "
              f"{statistics.median(durations[1:]):.2f} s")  # fmt: skip
        print("torch.save on rank 0 stalls, s:", *(f"{x:.3f}" for x in peers))
        print("ours stalls, s:                ", *(f"{x:.4f}" for x in stalls))
        print("steps during ours / quiet steps:", *(f"{x:.3f}" for x in slowdowns))
        holds = ratio <= MOST_STALL and slowdown <= MOST_SLOWDOWN
        print(f"save_stall: target stall {MOST_STALL:.0%} of torch.save's and steps at most "
              f"{MOST_SLOWDOWN:.2f} times as long, measured {ratio:.1%} and {slowdown:.3f}, "
              f"{'holds' if holds else 'falls short'}", flush=True)  # fmt: skip
    else:
        holds = True
    dist.barrier()
    shutil.rmtree(folder / "peer.pt", ignore_errors=True)
    if world.is_main and holds:
        (folder / "holds").touch()
    os._exit(0)  # torchrun would print forty lines about a benchmark that falls short


def save_with_torch(trainer: Trainer, path: Path) -> float:
    """Seconds for which both ranks wait while rank 0 saves weights and optimizer."""
    dist.barrier()
    started = time.perf_counter()
    if trainer.world.is_main:
        state = {
            "model": trainer.causal_lm.state_dict(),
            "optimizer": trainer.strategy.optimizer.state_dict(),
        }
        torch.save(state, path)
    dist.barrier()
    return longest(time.perf_counter() - started)


def is_over(saver: Saver, world: distributed.World) -> bool:
    """Whether the save has ended on both ranks."""
    return not distributed.any_rank(saver._thread.is_alive(), world)


def longest(seconds: float) -> float:
    return max(distributed.gather(seconds))


if __name__ == "__main__":
    sys.exit(main())
