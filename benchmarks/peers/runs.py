"""Run a loop, ours or a peer's, in processes of its own, as a person starts it, and measure it.

All train the same model from the same weights on the same samples in the same order, by AdamW at a
constant rate; their losses have to agree.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from trainstack.config.load import load
from trainstack.data.corpus import open_corpus
from trainstack.data.feed import StepSampler
from trainstack.prepare import prepare
from trainstack.storage import files, layout, manifest

ROOT = Path(__file__).resolve().parent.parent.parent
OURS, COMMAND = "ours", "ours, submit.sh"  # train.py alone; all of bash submit.sh --local
ROUNDS = 5
RATE, MOST_NORM = 1e-3, 1e6
COMPARED = 10  # steps
MOST_APART = 2e-3  # of losses, relative; bf16 of another order of operations
END = "<end>"


@dataclass(frozen=True)
class Work:
    """What is trained: a Llama of this shape, so many steps of so many samples."""

    hidden: int
    layers: int
    vocab: int
    seq_len: int
    batch: int  # samples of a step, over all ranks
    micro: int  # samples of a forward pass
    steps: int
    skipped: int  # steps at the start that are not measured
    precision: str = "fp32"
    world_size: int = 1
    is_torchrun: bool = False  # whether it starts a process of one, too
    head: int = 32  # channels of a head of attention
    device: str = "cpu"
    lora: int = 0  # rank of an adapter's matrices, which alone learn; 0: there is none


@dataclass(frozen=True)
class Loop:
    """One way to train it."""

    name: str  # one of ours, or a function of loops.py
    is_best: bool = True
    is_compiled: bool = False

    def __str__(self) -> str:
        kind = "" if self.name in (OURS, COMMAND, "bare") or self.is_best else ", default"
        return f"{self.name}{kind}{', compiled' if self.is_compiled else ''}"


@dataclass(frozen=True)
class Result:
    first_seconds: float  # from the command to the end of the first step
    step_seconds: float  # the mean of the steps that are measured
    losses: dict[int, float]  # by step
    peak: float  # GB of memory that rank 0 had at most


@dataclass(frozen=True)
class Case:
    """Work that ours does beside the floor and peers, and how many times as fast it has to be."""

    name: str
    work: Work
    peers: tuple[str, ...]
    least_floor: float  # of the floor
    least_peers: float  # of each peer, at its best
    is_compiled: bool = False
    has_defaults: bool = False  # peers also as their documentation has them
    is_memory_compared: bool = False
    what: str = "step_seconds"  # of a Result
    ours: str = OURS


def judged(benchmark: str, cases: list[Case]) -> int:
    """Measure each case, print every loop and a verdict; 0 if all hold."""
    holds = True
    for case in cases:
        ours, floor = Loop(case.ours, True, case.is_compiled), Loop("bare", True, case.is_compiled)
        kinds = (False, True) if case.has_defaults else (True,)
        peers = [Loop(peer, is_best, case.is_compiled) for peer in case.peers for is_best in kinds]
        with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as folder:
            found = compare(Path(folder), case.work, [floor, ours, *peers], ROUNDS)
        for loop, results in found.items():
            values = sorted(getattr(result, case.what) for result in results)
            print(f"{case.name}: {loop!s:24} {values[len(values) // 2]:8.4f} s ({values[0]:.4f} to "
                  f"{values[-1]:.4f}), {ratio(found, ours, loop, case.what):.2f} of ours; memory "
                  f"{ratio(found, ours, loop, 'peak'):.2f} of ours", flush=True)  # fmt: skip
        keep(benchmark, case, found)
        of_floor = ratio(found, ours, floor, case.what)
        of_peers = min(ratio(found, ours, peer, case.what) for peer in peers)
        is_met = of_floor >= case.least_floor and of_peers >= case.least_peers
        told = ""
        if case.is_memory_compared:
            memory = min(ratio(found, ours, peer, "peak") for peer in peers)
            told, is_met = f", memory of the leanest peer {memory:.2f}", is_met and memory >= 1
        holds &= is_met
        print(f"{benchmark}: {case.name}: target {case.least_floor:.2f} of the floor's speed, "
              f"{case.least_peers:.2f} of the best peer's, measured {of_floor:.2f}, {of_peers:.2f}"
              f"{told}, {'holds' if is_met else 'falls short'}", flush=True)  # fmt: skip
    return 0 if holds else 1


def keep(benchmark: str, case: Case, found: dict[Loop, list[Result]]) -> None:
    """Write what was measured into the JSON file $RESULTS, for doc/speed_bars.py."""
    if path := os.environ.get("RESULTS"):
        whole = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        values = {
            str(loop): [getattr(r, case.what) for r in results] for loop, results in found.items()
        }
        whole.setdefault(benchmark, {})[case.name] = values
        Path(path).write_text(json.dumps(whole, indent=1) + "\n")


def compare(home: Path, work: Work, loops: list[Loop], rounds: int) -> dict[Loop, list[Result]]:
    """Each loop once a round, in turn; RuntimeError if a loop learned something else at first.

    Later, rounding grows: an update that is not fused is 0.4% apart after 277 steps.
    """
    make(home, work)
    found = {loop: [] for loop in loops}
    for _ in range(rounds):
        for loop in loops:
            found[loop].append(run(home, work, loop))
    expected = found[loops[0]][0].losses
    for loop, results in found.items():
        for step, loss in results[0].losses.items():
            if step <= COMPARED and abs(loss - expected[step]) > MOST_APART * abs(expected[step]):
                raise RuntimeError(f"{loop}: loss {loss} at step {step}, not {expected[step]}")
    return found


def ratio(found: dict, one: Loop, other: Loop, what: str = "step_seconds") -> float:
    """How much more of it ``other`` takes than ``one``: the median over rounds."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(getattr(b, what) / getattr(a, what) for a, b in pairs)


def run(home: Path, work: Work, loop: Loop, done: int = 0) -> Result:
    """Start a loop, or, if ``done`` steps of it were run and saved, resume it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    if work.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable]
    if work.world_size > 1 or work.is_torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    str(work.world_size)]  # fmt: skip
    folder = home / "peer"
    if loop.name == COMMAND:
        environment |= {"SHARED_DIR": home.parent, "PROJECT_NAME": home.name,
                        "NPROC_PER_NODE": str(work.world_size)}  # fmt: skip
        command = ["bash", ROOT / "submit.sh", "--local"]
    elif loop.name == OURS:
        command += [ROOT / "train.py", "--config", ROOT / "config.yaml", "--home", home]
    if loop.name in (OURS, COMMAND):
        command += settings(work)
        command += [f"train.torch_compile={loop.is_compiled}".lower(), "run.name=benchmark"]
        if not done:
            subprocess.run(["rm", "-rf", home / "runs"], check=True)
    else:
        command += [Path(__file__).with_name("loops.py"), loop.name, folder]
        command += ["--best"] * loop.is_best + ["--compile"] * loop.is_compiled
        command += ["--steps", str(work.steps), "--done", str(done)]
    started = time.time()
    with (home / "log").open("w+") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        output = process.stdout.read()
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{loop}: {log.read()[-2000:]}{output[-2000:]}")
    is_ours = loop.name in (OURS, COMMAND)
    ended, losses, peak = read(home / "runs" / "benchmark") if is_ours else told(output)
    ended = [at for at in ended if at > started]
    seconds = (ended[-1] - ended[work.skipped - 1]) / max(1, len(ended) - work.skipped)
    return Result(ended[0] - started, seconds, losses, peak)


def told(output: str) -> tuple[list[float], dict[int, float], float]:
    """When steps ended, their losses, and the peak of memory, as loops.py prints them."""
    found = json.loads(output.splitlines()[-1])
    return found["ended"], dict(enumerate(found["losses"], start=1)), found["peak_gb"]


def read(run_folder: Path) -> tuple[list[float], dict[int, float], float]:
    """The same of our run, from its own records."""
    steps = [json.loads(line) for line in (run_folder / "samples.jsonl").open()]
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    peak = max(line["peak_memory_gb"] for line in lines if "loss" in line)
    return [line["at"] for line in steps], losses, peak


def settings(work: Work) -> list[str]:
    return [
        "model.name=llama", "model.init=pretrained", "data.name=words", "data.eval_fraction=0",
        f"data.seq_len={work.seq_len}", f"train.global_batch_size={work.batch}",
        f"train.micro_batch_size={work.micro}", f"train.max_steps={work.steps}",
        f"train.precision={work.precision}", f"optim.learning_rate={RATE}",
        "optim.weight_decay=0", f"optim.max_grad_norm={MOST_NORM}", "optim.warmup_steps=0",
        "optim.lr_scheduler_type=constant", "optim.lr_scheduler_kwargs={}",
        "checkpoint.save_steps=100000", "eval.eval_steps=null", "eval.prompts=[]",
        "log.report_to=[]", "log.logging_steps=5",
        *(["adapter.type=lora", f"adapter.r={work.lora}", "adapter.alpha=16"] * (work.lora > 0)),
    ]  # fmt: skip


def make(home: Path, work: Work) -> None:
    """Model, data and tokens as download and prepare leave them, and the peers' folder."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama", architectures=["LlamaForCausalLM"], vocab_size=work.vocab,
        hidden_size=work.hidden, intermediate_size=work.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=work.layers, num_attention_heads=max(2, work.hidden // work.head),
        num_key_value_heads=max(2, work.hidden // work.head), max_position_embeddings=work.seq_len,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    peer = home / "peer"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(peer)
    words = {f"w{number}": number for number in range(1, work.vocab)}
    tokenizer = Tokenizer(models.WordLevel({END: 0, **words}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    generator = np.random.default_rng(1)
    tokens = (work.steps * work.batch + 1) * work.seq_len
    numbers = np.minimum(generator.zipf(1.2, tokens), work.vocab - 1)
    lines = [
        json.dumps({"text": " ".join(f"w{n}" for n in part)})
        for part in np.array_split(numbers, tokens // 1000 + 1)
    ]
    publish(layout.dataset_folder(home, "words", None), "dataset", {"a.jsonl": "\n".join(lines)})
    kept = {path.name: path.read_bytes() for path in peer.iterdir()}
    kept["tokenizer.json"] = tokenizer.to_str()
    kept["tokenizer_config.json"] = json.dumps({"eos_token": END})
    publish(layout.model_folder(home, "llama"), "model", kept)
    (home / "venv").symlink_to(sys.prefix)
    asked = load(ROOT / "config.yaml", settings(work))
    prepare.prepare(home, asked, force=False)
    store = open_corpus(home, asked).train
    sampler = StepSampler(store.num_samples, work.batch, 0, 1, asked.run.seed)
    samples = np.stack([store.read(sampler.samples_at(step)) for step in range(work.steps)])
    rows = np.concatenate([samples[:, 0], samples[:, 1, :, -1:]], axis=2)
    np.save(peer / "samples.npy", rows)
    told = {"precision": work.precision, "micro": work.micro, "rate": RATE}
    told |= {"lora": work.lora, "seed": asked.run.seed}
    (peer / "settings.json").write_text(json.dumps(told))


def publish(folder: Path, kind: str, content: dict[str, str | bytes]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    entries = {
        name: files.write_file(temporary / name, data if isinstance(data, bytes) else data.encode())
        for name, data in content.items()
    }
    manifest.publish_folder(temporary, folder, entries, kind=kind, source="made", revision=None,
                            commit=None, weight_bytes=1)  # fmt: skip
