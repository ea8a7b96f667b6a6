"""Checks of what is computed on a GPU: that it runs, and that the numbers are right."""

import math
import sys
import time

from gpu.bench import Bench, Run, check
from trainstack.checkpoint.names import checkpoints
from trainstack.storage import manifest
from trainstack.units import seconds_of

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
QUIET = ["checkpoint.save_steps=100", "eval.eval_steps=null"]  # nothing but steps, up to the end
# What a kernel may be called that computes causal attention without a mask.
FLASH = ("flash", "cudnn")
BY_DOCUMENT = ("varlen", "trainstack::documents")


@check(seconds=120)
def runs(bench: Bench):
    """A run in bf16 ends as DONE, alone and by torchrun; checkpoints verify; it is gone soon."""
    keep = ["train.precision=bf16", "checkpoint.save_total_limit=10"]
    for name, before in (("alone", ()), ("torchrun", TORCHRUN)):
        run = bench.train(name, *keep, before=before)
        ended_at, (done,) = time.time(), run.events("done")
        saved = [path for _, path in checkpoints(run.folder.checkpoints)]
        losses = run.values("loss").values()
        bench.equal(f"state_{name}", run.state, "DONE")
        bench.equal(f"checkpoints_{name}", len(saved), 4)
        bench.equal(f"damage_{name}", [d for path in saved for d in manifest.damage(path)], [])
        bench.equal(f"finite_{name}", all(map(math.isfinite, losses)), True)
        bench.equal(f"evaluations_{name}", len(run.values("eval_loss")), 2)
        bench.at_most(f"leaves_s_{name}", ended_at - seconds_of(done["at"]), 5)
        if bench.is_gpu:
            bench.equal(f"nccl_{name}", ", nccl" in run.output or ":nccl" in run.output, True)


@check(seconds=150, needs_gpu=True)
def same_numbers(bench: Bench):
    """The same run on the CPU and on the GPU: losses to rounding, the same samples; TF32 too."""
    for precision, most in (("fp64", 1e-10), ("fp32", 1e-4)):
        there = bench.train(f"{precision}-gpu", f"train.precision={precision}")
        here = bench.train(f"{precision}-cpu", f"train.precision={precision}", device="cpu")
        bench.at_most(precision, apart(there, here), most)
        hashes = [run.values("samples_hash") for run in (there, here)]
        bench.equal(f"{precision}_samples", hashes[0] == hashes[1], True)
    if bench.is_gpu:
        bench.at_most("tf32", apart(bench.train("tf32", "train.precision=tf32"), here), 1e-2)


def apart(one: Run, other: Run) -> float:
    """The largest relative difference of the losses of a step."""
    a, b = one.values("loss"), other.values("loss")
    return max(abs(a[step] / b[step] - 1) for step in b) if a.keys() == b.keys() else math.inf


@check(seconds=120)
def gradients(bench: Bench):
    """Of the loss, chunked or not, in fp32, bf16, fp16, against fp64 and plain transformers."""
    found = bench.measure("gradients")
    for name, most in {
        "fp64": 1e-6,
        "fp32": 1e-5,
        "bf16": 1.5e-2,
        "fp16": 3e-3,
        "chunks": 1e-2,
    }.items():
        bench.at_most(name, found[name], most)
    for name in ("fp32", "bf16", "fp16"):
        bench.at_most(f"{name}_to_plain", found[f"{name}_to_plain"], 1.2)


@check(seconds=120)
def documents(bench: Bench):
    """Attention by document, its kernel and a whole model, is that of a dense mask."""
    found = bench.measure("documents")
    bench.equal("kernel", found["kernel"], bench.size("varlen_attn", "documents"))
    for name in ("out", "q", "k", "v", "out_window", "q_window", "k_window", "v_window"):
        bench.at_most(name, found[name], bench.size(1e-2, 1e-5))
        bench.at_most(f"{name}_to_dense", found[f"{name}_to_dense"], 1.5)
    bench.at_most("loss", found["loss_ours"], bench.size(1e-3, 1e-6))
    bench.at_most("gradients", found["gradients_ours"], bench.size(1.5e-2, 1e-5))
    bench.at_most("gradients_to_masked", found["gradients_to_masked"], 1.2)


@check(seconds=200)
def which_attention(bench: Bench):
    """Eager and compiled, plain rows and packed ones: a fast kernel, no mask, no scores."""
    found = bench.measure("which_attention")
    for packing, signs in (("concat", FLASH), ("best_fit", BY_DOCUMENT)):
        for kind in ("eager", "compiled"):
            name = f"{packing}_{kind}"
            bench.note(**{name: found[name]})
            is_fast = any(sign in used for used in found[name] for sign in signs)
            bench.equal(f"{name}_fast", is_fast, True)
            bench.equal(f"{name}_masks", found[f"{name}_square"], 0)
        bench.at_most(f"{packing}_loss", found[f"{packing}_compiled_loss"], 2e-3)


@check(seconds=200)
def recompute(bench: Bench):
    """Compiled, recomputed and accumulated gradients are the eager ones, and memory is saved."""
    found = bench.measure("recompute")
    bench.note(**{name: value for name, value in found.items() if "_gb_" in name})
    bench.at_most("gradients", found["gradients"], 5e-2)  # bf16, of 24 layers
    bench.at_most("kept", found["kept"], 0.6)


@check(seconds=120)
def adapter(bench: Bench):
    """LoRA learns the same eager, compiled and in fp64, and its step beside that of all weights."""
    found = bench.measure("adapter")
    for name in ("bf16", "compiled"):
        bench.at_most(name, found[name], 2e-2)
    bench.equal("learned", found["learned"], 2 * 7 * bench.size(12, 2))
    bench.note(step=found["step"])


@check(seconds=120, needs_gpu=True)
def host_syncs(bench: Bench):
    """The host never waits for the GPU within a step."""
    ways = {"concat": [], "best_fit": packed(bench), "guard": ["guard.on_divergence=skip"]}
    if bench.is_gpu:
        ways["compiled"] = ["train.torch_compile=true"]
    for name, more in ways.items():
        settings = ["train.precision=bf16", "train.max_steps=12", *QUIET, *more]
        run = bench.train(name, *settings, hooks="syncs")
        bench.note(**{f"{name}_places": run.all_told("places")[0]})
        bench.equal(f"{name}_a_step", run.all_told("syncs")[0], 0.0)


def packed(bench: Bench) -> list[str]:
    """Whole documents of many lengths."""
    return ["data.name=long", "data.packing=best_fit", f"data.seq_len={bench.size(1024, 64)}"]


@check(seconds=150)
def guard(bench: Bench):
    """A loss that is no number: stopped, skipped to the last bit, or rolled back."""
    fault = "nan:rank=0,step=7"
    stopped = bench.train("stop", "guard.on_divergence=stop", fault=fault, code=None)
    bench.equal("stop_code", stopped.code, 79)
    skipped = bench.train("skip", "guard.on_divergence=skip", hooks="updates", fault=fault)
    bad = [line["is_same"] for line in skipped.told if line["is_bad"]]
    bench.equal("skips", bad, [True])
    bench.equal("skip_state", skipped.state, "DONE")
    bench.train("rollback", "guard.on_divergence=rollback", fault=fault, code=79)
    rolled = bench.train("rollback", "guard.on_divergence=rollback")
    bench.equal("rollback_state", rolled.state, "DONE")
    bench.equal("ledger", ledger(bench, rolled), 0)


def ledger(bench: Bench, run: Run) -> int:
    """The code with which the ledger of a run ends."""
    command = [sys.executable, "-m", "trainstack", "ledger", run.folder.path]
    return bench.call(command, "ledger", "cpu").code


@check(seconds=150)
def fp16(bench: Bench):
    """A scale that is too large: skipped updates change nothing, also over a resume, or it ends."""
    settings = ["train.precision=fp16", "train.deterministic=true", "checkpoint.save_steps=1"]
    whole = bench.train("whole", *settings, hooks="scale=26;updates")
    skipped = [line for line in whole.told if line["then"] < line["scale"]]
    bench.at_least("skips", len(skipped), 3)
    bench.equal("skips_change_nothing", all(line["is_same"] for line in skipped), True)
    bench.equal("halved", all(line["then"] == line["scale"] / 2 for line in skipped), True)
    bench.equal("updates", whole.told[-1]["updates"], 20 - len(skipped))
    bench.train("cut", *settings, hooks="scale=26;updates", fault="kill:rank=0,step=4", code=-9)
    resumed = bench.train("cut", *settings, hooks="scale=26;updates")
    bench.equal("resumed_losses", resumed.values("loss") == whole.values("loss"), True)
    bench.equal("resumed_scale", resumed.told[-1]["then"], whole.told[-1]["then"])
    bench.equal("resumed_weights", resumed.weights_hash() == whole.weights_hash(), True)
    endless = ["train.precision=fp16", "train.max_steps=200", *QUIET]
    ended = bench.train("endless", *endless, hooks="nan_gradients", code=None)
    bench.equal("endless_code", ended.code, 79)
