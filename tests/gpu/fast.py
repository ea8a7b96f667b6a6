"""Checks of speed on a GPU, beside a bare loop and HF Trainer, and of what safety costs."""

import json
import statistics
import sys

from gpu.bench import SAID, Bench, Run, TimedOut, check
from gpu.correct import packed
from gpu.safe import EXACT, SLOWLY, m350
from trainstack.checkpoint.names import checkpoints
from trainstack.units import seconds_of

PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bf16, by NVIDIA's data sheets of the SXM parts
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 2048,
}  # fmt: skip
COMPILED = "train.torch_compile=true"
EAGER = ("ours", "bare", "trainer")
ALL = ("ours+", "bare+", "trainer+", *EAGER)  # +: compiled
SKIPPED = 10  # steps at the start of a run that are not measured


@check(seconds=300)
def compiled(bench: Bench):
    """The 135M recipe compiled: one graph, soon, none later; losses and names are the eager's."""
    shape = bench.size(SMOLLM2, {"hidden_size": 64, "vocab_size": 512})
    micro = bench.size(8, 2)
    settings = [
        bench.model("m135", **shape), "train.precision=bf16", "data.name=long",
        f"data.seq_len={bench.size(2048, 32)}", f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro}", f"eval.eval_samples={micro + 1}",
        "checkpoint.save_steps=10", "guard.hang_seconds=60", SLOWLY,
    ]  # fmt: skip
    cold = bench.train("cold", *settings, COMPILED, hooks="graphs")
    bench.train("cut", *settings, COMPILED, fault="kill:rank=0,step=15", code=-9)
    warm = bench.train("cut", *settings, COMPILED, hooks="graphs")
    eager = bench.train("eager", *settings)
    for name, run in (("cold", cold), ("warm", warm)):
        first = next(line for line in run.told if "step" in line)
        bench.note(**{f"{name}_first_step_s": first["seconds"]})
        if bench.is_gpu:
            bench.at_most(f"{name}_first_step_s", first["seconds"], 120 if name == "cold" else 30)
    counts = cold.all_told("graphs")
    after = next(n for n, line in enumerate(cold.told) if "evaluated" in line)
    bench.equal("graphs_of_a_step", counts[0], 1)
    bench.equal("graphs_after_evaluation", counts[-1] - counts[after], 0)
    bench.note(graphs=counts[-1])
    for name, run in (("cold", cold), ("resumed", warm)):
        away = abs(run.values("loss")[20] / eager.values("loss")[20] - 1)
        bench.at_most(f"loss_{name}", away, 2e-3)
    bench.equal("same_names", tensor_names(cold) == tensor_names(eager), True)


def tensor_names(run: Run) -> list[str]:
    """Of the newest model.safetensors, by its header."""
    with (checkpoints(run.folder.checkpoints)[0][1] / "model.safetensors").open("rb") as file:
        return sorted(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


@check(seconds=330, needs_gpu=True)
def compiles_1b(bench: Bench):
    """What speed_1b compiles, before it runs: first steps with cold caches."""
    compile_ahead(bench, "1b")


@check(seconds=240, needs_gpu=True)
def compiles_124m(bench: Bench):
    """What speed_124m compiles, before it runs: first steps with cold caches."""
    compile_ahead(bench, "124m")


def compile_ahead(bench: Bench, name: str) -> None:
    loops = ("ours+", "bare+", "trainer+") if bench.is_gpu else ()  # a CPU only makes the model
    for line in beside(bench, name, *loops):
        bench.note(**{f"{line['loop']}_first_s": line["first_seconds"]})
        if line["loop"] == "ours+":
            bench.at_most("first_s", line["first_seconds"], 120)


def beside(bench: Bench, name: str, *loops: str) -> list[dict]:
    """The loops that were measured in time, each in a process of its own."""
    folder = bench.site.folder / f"work-{name}"
    command = [sys.executable, "-m", "gpu.beside", name, bench.site.device, folder]

    def call(*arguments: str) -> str:
        ended = bench.call([*command, *arguments], arguments[0])
        if ended.code:
            raise RuntimeError(f"gpu.beside ended with code {ended.code}: {ended.output[-SAID:]}")
        return ended.output

    bench.site.once(f"work-{name}", lambda: call("make"))
    output = ""
    if loops:
        try:
            output = call(*loops)
        except TimedOut:
            output = (bench.folder / f"{loops[0]}.log").read_text()
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@check(seconds=30, needs_gpu=True, is_timing=True)
def card(bench: Bench):
    """The card itself: products, copies, to the host; how fast host memory is pinned."""
    found = bench.measure("card")
    bench.note(**found)
    bench.at_least("tflops", found["tflops"], 700)
    bench.at_least("copy_tb_s", found["copy_tb_s"], 2.7)
    bench.at_least("to_host_gb_s", found["to_host_gb_s"], 20)


@check(seconds=60, needs_gpu=True, is_timing=True)
def attention_share(bench: Bench):
    """How much of a step of 1.1B parameters is attention."""
    found = bench.measure("attention_share")
    bench.note(ms=found["ms"])
    bench.at_most("share", found["share"], 0.15)


def speed(bench: Bench, name: str, least_mfu: float) -> None:
    """Tokens a second and MFU of each loop; ours has to be as fast as the others of its kind."""
    peak = next((peak for known, peak in PEAKS.items() if known in bench.site.card), None)
    found = {line["loop"]: line for line in beside(bench, name, *bench.size(ALL, EAGER))}
    for loop, line in found.items():
        figures = {f"{loop}_tokens_s": line["tokens_per_second"]}
        if peak:
            figures[f"{loop}_mfu"] = line["flops_per_second"] / peak
        bench.note(**figures)
    bench.note(losses={loop: line["loss"] for loop, line in found.items()})
    if not found:
        raise TimedOut("no loop ended in time")
    best = found["ours+" if bench.is_gpu else "ours"]
    bench.at_least("mfu", best["flops_per_second"] / (peak or float("inf")), least_mfu)
    bench.at_most("data_share", best["data_share"], 0.01)
    for loop, line in found.items():
        ours, least = found[f"ours{'+' * loop.endswith('+')}"], 1.0 if "trainer" in loop else 0.97
        if not loop.startswith("ours"):
            ratio = ours["tokens_per_second"] / line["tokens_per_second"]
            bench.at_least(f"to_{loop}", ratio, least)
    bench.equal("not_measured", [*{*bench.size(ALL, EAGER)} - {*found}], [])


@check(seconds=150, needs_gpu=True, is_timing=True)
def speed_124m(bench: Bench):
    """G1: a step of 124M parameters, 1,024 tokens a row, bf16."""
    speed(bench, "124m", 0.28)


@check(seconds=240, needs_gpu=True, is_timing=True)
def speed_1b(bench: Bench):
    """G2: a step of 1.1B parameters, 2,048 tokens a row, bf16."""
    speed(bench, "1b", 0.45)


def pace(run: Run) -> float:
    """Tokens a second: the median of the steps that are measured."""
    speeds = run.values("tokens_per_second")
    return statistics.median(v for step, v in speeds.items() if step > SKIPPED)


def big(bench: Bench, *more: str) -> list[str]:
    """Settings of 30 steps of 350M parameters in bf16, whole rows of plain text."""
    return [m350(bench), SLOWLY, "train.precision=bf16", "train.max_steps=30", "data.name=long",
            f"data.seq_len={bench.size(1024, 64)}", "train.global_batch_size=8",
            "train.micro_batch_size=8", "checkpoint.save_steps=100", "eval.eval_steps=null",
            *more]  # fmt: skip


@check(seconds=60, needs_gpu=True, is_timing=True)
def speed_packed(bench: Bench):
    """Rows of whole documents are as fast as plain ones; the log has MFU and memory."""
    plain = bench.train("concat", *big(bench))
    rows = bench.train("best_fit", *big(bench), *packed(bench))
    bench.at_least("packed_to_plain", pace(rows) / pace(plain), 0.95)
    bench.note(plain_tokens_s=pace(plain), packed_tokens_s=pace(rows))
    if bench.is_gpu:
        for key in ("mfu", "peak_memory_gb"):
            values = plain.values(key)
            bench.equal(f"logs_{key}", bool(values) and min(values.values()) > 0, True)


@check(seconds=60, needs_gpu=True, is_timing=True)
def save_cost(bench: Bench):
    """A save costs the loop nearly nothing, the first one too, and 12 bytes of host memory."""
    settings = [s for s in big(bench) if not s.startswith(("checkpoint", "train.global"))]
    settings = [s.replace("train.micro_batch_size=8", "train.micro_batch_size=1") for s in settings]
    run = bench.train("saves", *settings, "train.global_batch_size=1", "train.max_steps=60",
                      "checkpoint.save_steps=12", hooks="memory_of_saves")  # fmt: skip
    saves, steps = run.events("checkpoint"), run.steps()
    spans = [(seconds_of(e["at"]) - e["save_seconds"], seconds_of(e["at"])) for e in saves]
    busy, quiet = [], []
    for one, two in zip(steps[2:], steps[3:], strict=False):
        is_busy = any(began <= two["at"] and one["at"] <= ended for began, ended in spans)
        (busy if is_busy else quiet).append(two["at"] - one["at"])
    bench.note(saves=len(saves), busy=len(busy), quiet=len(quiet))
    bench.at_most("first_stall_s", saves[0]["stall_seconds"], 1)
    bench.at_most("slowdown", statistics.median(busy) / statistics.median(quiet), 1.10)
    resident, parameters = run.all_told("resident"), parameters_of(run)
    grown = (max(resident) - resident[0]) * 1e9 / (12 * parameters)
    bench.at_most("host_memory", grown, 1.3)
    bench.note(save_gb_s=12 * parameters / 1e9 / saves[-1]["save_seconds"])


def parameters_of(run: Run) -> int:
    """By the size of its weights in fp32."""
    return (checkpoints(run.folder.checkpoints)[0][1] / "model.safetensors").stat().st_size // 4


@check(seconds=60, needs_gpu=True, is_timing=True)
def deterministic_cost(bench: Bench):
    """How much longer a step takes with train.deterministic."""
    usual, exact = (
        pace(bench.train(name, *big(bench), setting))
        for name, setting in (("usual", "train.deterministic=false"), ("exact", EXACT))
    )
    bench.at_most("times", usual / exact, 1.15)


@check(seconds=60, needs_gpu=True, is_timing=True)
def speed_eval(bench: Bench):
    """An evaluation, beside training."""
    more = ["eval.eval_steps=15", f"eval.eval_samples={bench.size(256, 32)}"]
    run = bench.train("eval", *big(bench), *more)
    seconds = run.events("evaluation")[-1]["seconds"]
    tokens = list(run.values("eval_tokens").values())[-1]
    bench.note(tokens_s=tokens / seconds)
    bench.at_least("to_training", tokens / seconds / pace(run), 2.5)


@check(seconds=180, needs_gpu=True, is_timing=True)
def speed_350m(bench: Bench):
    """A step of 350M parameters, 1,024 tokens a row, bf16."""
    speed(bench, "350m", 0.33)
