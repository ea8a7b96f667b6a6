"""Checks of what keeps a run on a GPU safe: saves, resumes, and how processes end."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from gpu.bench import ROOT, Bench, Run, TimedOut, check
from trainstack.checkpoint.names import newest_checkpoint
from trainstack.job.blame import blame
from trainstack.resilience.faults import SLOW_SECONDS
from trainstack.run.folder import RunFolder
from trainstack.storage import layout
from trainstack.units import seconds_of

EXACT = "train.deterministic=true"
SLOWLY = "optim.learning_rate=3e-4"  # for large models; that of the tiny one would burst them


def four_layers(bench: Bench) -> str:
    hidden = bench.size(256, 32)
    return bench.model(
        "four", num_hidden_layers=4, hidden_size=hidden, intermediate_size=2 * hidden
    )


def m350(bench: Bench) -> str:
    """350M parameters; a small one on a CPU."""
    shape = {"hidden_size": 64, "vocab_size": 512}
    if bench.is_gpu:
        shape = {
            "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50257,
            "max_position_embeddings": 2048,
        }  # fmt: skip
    return bench.model("m350", **shape)


def killed_and_resumed(bench: Bench, *more: str) -> None:
    """Twice alike, then killed and resumed: all losses and the weights are the same bits."""
    settings = [four_layers(bench), "train.precision=bf16", "train.max_steps=30", EXACT, *more]
    first, others = bench.train("first", *settings), {}
    if bench.is_gpu or not more:  # a CPU computes alike anyway
        others["again"] = bench.train("again", *settings)
    bench.train("cut", *settings, fault="kill:rank=0,step=17", code=-9)
    others["resumed"] = bench.train("cut", *settings)
    bench.equal("resumes", len(others["resumed"].events("resume")), 1)
    for name, other in others.items():
        bench.equal(f"losses_{name}", other.values("loss") == first.values("loss"), True)
        bench.equal(f"weights_{name}", other.weights_hash() == first.weights_hash(), True)


@check(seconds=200)
def resume(bench: Bench):
    """Deterministic: two runs, and one killed and resumed, give the same bits."""
    killed_and_resumed(bench)
    if bench.is_gpu:  # what it is without the setting: reported, not judged
        settings = [four_layers(bench), "train.precision=bf16", "train.max_steps=30"]
        one, two = (bench.train(f"as-it-is-{n}", *settings).values("loss") for n in (1, 2))
        spread = max(abs(one[step] / two[step] - 1) for step in one)
        bench.note(as_it_is_equal=one == two, as_it_is_spread=spread)


@check(seconds=300)
def resume_compiled(bench: Bench):
    """The same bits, where the model is compiled."""
    killed_and_resumed(bench, "train.torch_compile=true")


@check(seconds=150)
def snapshot(bench: Bench):
    """What is published is what was there when the save began, though updates follow at once."""
    run = bench.train(
        "saves", m350(bench), "train.global_batch_size=1", "train.micro_batch_size=1",
        "train.max_steps=18", "checkpoint.save_steps=3", "eval.eval_steps=null",
        SLOWLY, "train.precision=bf16", hooks="clones",
    )  # fmt: skip
    saved = [line for line in run.told if "saved" in line]
    bench.equal("saves", [line["saved"] for line in saved], [3, 6, 9, 12, 15, 18])
    bench.equal("different", sum(line["tensors"] - line["equal"] for line in saved), 0)
    bench.note(tensors=saved[0]["tensors"])


@check(seconds=150, needs_gpu=True)
def out_of_memory(bench: Bench):
    """Too large at first, or once AdamW is there: told as that, soon gone; a right size goes on."""
    rows = bench.size(64, 4)
    base = [m350(bench), SLOWLY, "train.precision=bf16", f"train.global_batch_size={rows}",
            "train.max_steps=3", "checkpoint.save_steps=100"]  # fmt: skip
    long = ["data.name=long", f"data.seq_len={bench.size(1024, 32)}"]
    cases = {"activations": [f"train.micro_batch_size={rows}", *long], "adamw": []}
    for name, more in cases.items():
        hooks = f"memory={12 if more else 5}"  # GB
        small = ["train.micro_batch_size=1", *more[1:]]
        run = bench.train(name, *base, *(more or small), hooks=hooks, code=None)
        ended_at, reports = time.time(), run.folder.failures("local", 1)
        if not reports:
            raise RuntimeError(f"{name}: no failure report: {run.output[-500:]}")
        cause = reports[0]["cause"]
        bench.equal(f"{name}_code", run.code, 1)
        bench.equal(f"{name}_told", "out of GPU memory" in cause, True)
        bench.note(**{f"{name}_cause": cause[:160]})
        bench.at_most(f"{name}_gone_s", ended_at - seconds_of(reports[0]["at"]), 30)
        bench.equal(f"{name}_then", bench.train(name, *base, *small).state, "DONE")


@check(seconds=60, needs_gpu=True)
def pinning(bench: Bench):
    """Host memory that cannot be pinned is said, and costs time alone: no save, and not the run."""
    run = bench.train("refused", hooks="no_pinning")
    bench.equal("state", run.state, "DONE")
    bench.equal("refusals", len(run.all_told("refused")), 1)
    bench.equal("said", "could not be pinned" in run.output, True)
    bench.equal("saves_lost", len(run.events("save_failed")), 0)


@check(seconds=240)
def two_ranks(bench: Bench):
    """Two ranks on one GPU over gloo: equality, a kill, a stop, a hang."""
    alone = bench.train("alone").values("loss")
    both = launched(bench, "both").values("loss")
    bench.at_most("apart", max(abs(both[step] / alone[step] - 1) for step in alone), 1e-6)
    a_rank_is_killed(bench, "gloo")
    stopped = launched(bench, "stop", "train.max_steps=100000", stops=True)
    step, newest = newest_checkpoint(stopped.folder.checkpoints)
    bench.equal("stop_state", stopped.state, "PAUSED")
    bench.equal("stop_shares", len([*(newest / "training").glob("optimizer-*")]), 2)
    bench.equal("stop_step", step, stopped.folder.status()["step"])
    a_rank_hangs(bench, "gloo")


@check(seconds=240, needs_gpu=True)
def two_ranks_nccl(bench: Bench):
    """The same over NCCL, which takes them for two hosts; if it refuses, nothing is settled."""
    try:
        with bench.within(90):
            run = launched(bench, "both", backend="nccl", code=None if bench.is_gpu else 0)
    except TimedOut:
        bench.note(settled="no: it hangs")
        return
    if run.code:
        bench.note(settled=f"no: {run.output[-300:]}")
        return
    bench.note(settled="yes")
    a_rank_is_killed(bench, "nccl")
    hung = a_rank_hangs(bench, "nccl")
    records = [*hung.folder.logs.glob("*.collectives.json")]
    bench.at_least("flight_records", len(records), 1)


def a_rank_is_killed(bench: Bench, backend: str) -> None:
    """All are gone soon, and that rank is named."""
    run = launched(bench, "kill", fault="kill:rank=1,step=7", backend=backend, code=None)
    ended_at, named = time.time(), blame(run.folder, job_of(run.folder), 1) or {}
    bench.equal("kill_names", named.get("rank"), 1)
    bench.note(kill_cause=named.get("cause"))
    bench.at_most("kill_gone_s", ended_at - run.steps()[-1]["at"], 15)


def a_rank_hangs(bench: Bench, backend: str) -> Run:
    """It ends as HANG, with its stacks; the other one hangs as well, or loses it before."""
    settings = [f"guard.hang_seconds={bench.size(10, 4)}", "eval.eval_steps=null"]
    run = launched(
        bench, "hang", *settings, fault="sleep:rank=1,step=8", backend=backend, code=None
    )
    reports = run.folder.failures(job_of(run.folder), 1)
    stacks = [p for p in run.folder.logs.glob("*.stacks") if p.stat().st_size]
    states = {report["state"] for report in reports if not report["is_victim"]}
    bench.equal("hang_states", sorted(states), ["HANG"])
    bench.at_least("hang_stacks", len(stacks), 1)
    seen = min((seconds_of(r["at"]) for r in reports), default=float("inf"))
    bench.at_most("hang_found_s", seen - run.steps()[-1]["at"], 25)
    bench.note(hang_cause=(blame(run.folder, job_of(run.folder), 1) or {}).get("cause"))
    return run


@check(seconds=120)
def slow_rank(bench: Bench):
    """One of two ranks sleeps in each step: named by its own time, with the state of its GPU."""
    settings = ["train.max_steps=150", "checkpoint.save_steps=100", "eval.eval_steps=null"]
    fault = "slow:rank=1,step=5"
    run = launched(bench, "slow", *settings, fault=fault, hooks="short_windows=1")
    bench.equal("named", [event["rank"] for event in run.events("slow_rank")], [1])
    others, own = run.folder.rank_seconds().get("seconds", (0, 0))
    bench.at_least("own_s", own, 0.9 * SLOW_SECONDS)
    bench.at_most("others_s", others, 0.5 * SLOW_SECONDS)
    found = run.folder.evidence(job_of(run.folder), 1, 1)
    bench.note(evidence=found)
    if bench.is_gpu:
        bench.equal("gpu_is_read", " MHz of " in found, True)


def job_of(folder: RunFolder) -> str:
    return f"local-{folder.path.name}"


def launched(
    bench: Bench, name: str, *settings: str, fault: str = "", backend: str = "gloo",
    code: int | None = 0, stops: bool = False, hooks: str = "",
) -> Run:  # fmt: skip
    """Two ranks, started as a job does; ``stops``: SIGTERM once some steps are made."""
    run = f"{bench.name}-{name}"
    folder = RunFolder(layout.run_folder(bench.site.home, run))
    folder.create()
    job, stop_file = job_of(folder), folder.logs / "stop"
    command = [sys.executable, "-m", "trainstack.job.launch", "--run", folder.path, "--job", job,
               "--attempt", "1", "--stop-file", stop_file, "--", "--max-restarts=0",
               "--standalone", "--nnodes=1", "--nproc-per-node=2", ROOT / "tests/gpu/inside.py",
               *bench.command(run, *settings, fault=fault), "--job", job, "--attempt", "1",
               "--stop-file", stop_file, "--expect-world-size", "2"]  # fmt: skip
    log, started = bench.folder / f"{run}.log", time.monotonic()
    told = str(bench.site.folder / f"{run}.told")
    variables = bench.environment(
        bench.site.device, PROOF_HOOKS=f"two_on_one={backend};{hooks}".rstrip(";"), PROOF_TOLD=told
    )
    process = bench.start(command, log, variables)
    if stops:
        lines = folder.path / "metrics.jsonl"
        while not lines.exists() or lines.read_bytes().count(b"\n") < 5:
            if process.poll() is not None or time.monotonic() > bench.ends_at:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
    ended = bench.wait(process, log, started)
    if code is not None and ended.code != code:
        raise RuntimeError(f"{run} ended with code {ended.code}: {ended.output[-2000:]}")
    return bench.left(run, ended)


@check(seconds=90, needs_gpu=True)
def leaving(bench: Bench):
    """A process with a full card and a queue of work is gone at once, and its memory free."""
    gigabytes = min(60.0, free_memory() / 2e9) if bench.is_gpu else 0.05
    for how in ("exit", "kill"):
        log, started, before = bench.folder / f"{how}.log", time.monotonic(), free_memory()
        command = [sys.executable, "-m", "gpu.measure", "leave", bench.site.device, how, gigabytes]
        process = bench.start(command, log, bench.environment(bench.site.device))
        while "ready" not in log.read_text():
            if process.poll() is not None or time.monotonic() > bench.ends_at:
                raise RuntimeError(f"leave {how}: {log.read_text()[-1000:]}")
            time.sleep(0.01)
        left_at = time.monotonic()
        if how == "kill":
            process.kill()
        bench.wait(process, log, started)
        bench.at_most(f"{how}_gone_s", time.monotonic() - left_at, 5)
        if bench.is_gpu:
            wanted = before - gigabytes * 0.5e9  # others use the card meanwhile
            while free_memory() < wanted and time.monotonic() < left_at + 20:
                time.sleep(0.1)
            bench.at_most(f"{how}_free_s", time.monotonic() - left_at, 5)


def free_memory() -> float:
    """Bytes of the first GPU by nvidia-smi; 0 without it."""
    ask = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(told) * 2**20
    return 0.0
