"""A model and a data set small enough to train in seconds, and ways to run ours on them."""

import functools
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from trainstack.storage import files, layout, manifest

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN = 32
END = "<|end|>"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SETTINGS = {
    "model.name": "tiny",
    "data.name": "tiny",
    "data.seq_len": SEQ_LEN,
    "data.eval_fraction": 0.1,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.max_steps": 20,
    "optim.learning_rate": 0.01,
    "optim.warmup_steps": 10,
    "optim.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "checkpoint.save_steps": 5,
    "eval.eval_steps": 10,
    "eval.eval_samples": 16,
    "eval.sample_tokens": 4,
    "eval.prompts": ["one"],
    "log.logging_steps": 1,
    "log.report_to": [],
}
SINGLE_FILES = ("train.slurm", "train.py")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def make_model(home: Path, name: str = "tiny", template: str | None = None) -> Path:
    """A word-level tokenizer and a Llama configuration of 20,000 parameters, published."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {END: 0, **{word: i + 1 for i, word in enumerate(WORDS)}}
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    content = {
        "config.json": json.dumps({**CONFIG, "vocab_size": len(vocabulary)}),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        ),
    }
    if template:
        content["chat_template.jinja"] = template
    return publish(layout.model_folder(home, name), content, kind="model", weight_bytes=0)


def byte_tokenizer():
    """One token for each byte: it writes any text, and changes none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def make_dataset(home: Path, name: str = "tiny", documents: int = 300) -> Path:
    """Counting with a pattern to learn, as jsonl."""
    generator = random.Random(5)
    lines = []
    for number in range(documents):
        start = generator.randrange(len(WORDS))
        words = [WORDS[(start + i) % len(WORDS)] for i in range(generator.randrange(20, 90))]
        lines.append(json.dumps({"text": " ".join([f"w{number % 64}", *words])}))
    content = {"train.jsonl": "\n".join(lines) + "\n"}
    return publish(layout.dataset_folder(home, name, None), content, kind="dataset")


def publish(folder: Path, content: dict[str, str], **facts) -> Path:
    """Write a folder as a download would leave it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    entries = {n: files.write_file(temporary / n, t.encode()) for n, t in content.items()}
    manifest.publish_folder(temporary, folder, entries, source="test", revision=None, **facts)
    return folder


def write_config(folder: Path, **changes) -> Path:
    """config.yaml with SETTINGS, then ``changes`` (``section__key=value``), as a file."""
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in {**SETTINGS, **changed}.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_checkout(folder: Path, shared: Path, **changes) -> None:
    """A copy of this checkout with a small config.yaml, and its environment ready in ``shared``.

    The environment is the Python of these tests, marked as setup.sh would mark it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.txt"), *(ROOT / name for name in SINGLE_FILES)]:
        if path.name != "env.sh":
            shutil.copy2(path, folder / path.name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trainstack", folder / "trainstack", ignore=ignored)
    write_config(folder, **changes)
    pins = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()[:12]
    python = shared / "trainstack" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (python.parent.parent / ".pins").write_text(f"{pins}\n")
    (python.parent.parent / ".summary").write_text("the Python of the tests\n")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def run_command(name: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """``python -m trainstack NAME ...`` with its output captured."""
    command = [sys.executable, "-m", "trainstack", name, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert not check or result.returncode == 0, result.stderr
    return result


def train_command(home: Path, processes: int, *overrides: str, config: Path | None = None) -> list:
    """The torchrun command of a run on this machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", ROOT / "train.py", "--home", home,
        "--config", config or home / "config.yaml", *overrides,
    ]  # fmt: skip


def train(home: Path, processes: int, *overrides: str, check: bool = True, **options):
    """Train to the end, the ranks as torchrun would start them; the output is in stdout.

    They are forked from a process that has imported torch and train.py already: half of the time of
    a small run is imports. Runs that need torchrun itself use ``train_command`` or submit.sh.
    """
    started = time.monotonic()
    arguments = ["--home", home, "--config", home / "config.yaml", *overrides]
    with tempfile.NamedTemporaryFile("r") as output, socket.create_server(("", 0)) as probe:
        port = str(probe.getsockname()[1])
        probe.close()
        ranks = [
            forkserver().Process(
                target=run_rank,
                args=(
                    [*map(str, arguments)],
                    environment(**options, **torchrun_names(rank, processes, port)),
                    output.name,
                ),
            )
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        codes = wait_for_all(ranks, seconds=600)
        stdout = output.read()
    code = next((code for code in codes if code), 0)
    assert not check or code == 0, stdout[-4000:]
    result = subprocess.CompletedProcess(arguments, code, stdout)
    result.seconds = time.monotonic() - started
    return result


@functools.cache
def forkserver():
    """Where ranks are forked; it begins with the environment that torch reads at its import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "train"])
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def torchrun_names(rank: int, processes: int, port: str) -> dict[str, str]:
    """The variables by which torchrun tells a process of one node who it is."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    names |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def run_rank(arguments: list[str], variables: dict[str, str], output: str) -> None:
    """``python train.py ARGUMENTS`` in this process, which does not return."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["train.py", *arguments]
    import train

    train.run_and_explain()


def wait_for_all(ranks: list, seconds: float) -> list[int]:
    """Exit codes. Like torchrun, what is left is killed once a rank has failed."""
    deadline = time.monotonic() + seconds
    while any(rank.is_alive() for rank in ranks):
        has_failed = any(rank.exitcode for rank in ranks)
        if has_failed:
            deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.exitcode for rank in ranks]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a job: one thread per process, so that results do not depend on cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def metrics(home: Path, run: str, key: str = "loss") -> dict[int, float]:
    """A measurement by step, from metrics.jsonl; fails if a step is repeated."""
    lines = (home / "runs" / run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if key in record]
    steps = [record["step"] for record in records]
    assert len(set(steps)) == len(steps), f"steps that are repeated in metrics.jsonl: {steps}"
    return {record["step"]: record[key] for record in records}
