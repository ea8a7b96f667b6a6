"""One run's screen: how it is, how it learns, where its time goes, what to do next."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.text import Text

from trainstack.checkpoint import names
from trainstack.history import goodput
from trainstack.history.attempts import attempts_of, read_executions
from trainstack.monitor import drawing
from trainstack.monitor.drawing import Point
from trainstack.monitor.health import health_of
from trainstack.monitor.table import newest_checkpoint, steps
from trainstack.monitor.view import View
from trainstack.resilience.slow_ranks import median_without
from trainstack.run import refusal
from trainstack.run.branch import branch_of
from trainstack.run.queue import meaning
from trainstack.run.states import RUNNING
from trainstack.units import bytes_text, counted, duration, rounded

SHOWN_EVENTS = 8
LABEL = 11  # columns
CURVES = {"loss": 9, "tokens_per_second": 5}  # key -> lines, of which a low window has less
LEAST_LINES = 4  # of a curve
GOODPUT_BYTES = 1 << 24  # of samples.jsonl, up to which it is read for a screen
FOLLOWED_BYTES = 1 << 20  # the same, every five seconds
LESS_NEEDED = ("folder", "log", "nodes", "disk", "seen", "sample", "memory", "job")  # in a window
MOST_RANKS = 8  # whose times are shown one by one
MOST_MARKS = 20  # of evaluations on a curve


def lines_of(view: View, console: Console, height: int | None = None) -> list[Text]:
    """The screen; ``height``: of the window, which it then fits."""
    head = Text(f"run {view.run.path.name}", "bold")
    told = dict(rows_of(view, console, GOODPUT_BYTES if height is None else FOLLOWED_BYTES))
    for label in LESS_NEEDED if height is not None else ():
        if 1 + len(told) + sum(CURVES.values()) > height:
            told.pop(label, None)
    rows = [row_of(view, label, text) for label, text in told.items()]
    room = 10_000 if height is None else height - 1 - len(rows)
    curves = curves_of(view, console, room, is_whole=height is None)
    most = min(SHOWN_EVENTS, room - len(curves) - 1)
    return [head, *rows, *curves, *history_of(view, most, console.width)]


def row_of(view: View, label: str, text: str) -> Text:
    style = drawing.color_of(health_of(view).word) if label == "health" else ""
    return Text.assemble((f"  {label:<{LABEL}} ", "dim"), (drawing.printable(text), style))


def rows_of(view: View, console: Console, most_bytes: int) -> Iterator[tuple[str, str]]:
    """Each row of the screen: a label and a text; ``most_bytes``: see ``time_spent``."""
    health = health_of(view)
    yield "state", view.state
    if event := branch_of(view.events):
        yield "branch", f"of run {event['parent']}, at step {event['step']:,}"
    if health.reason != view.cause and health.word.upper() != view.state:
        yield "health", f"{health.word}: {health.reason}" if health.reason else health.word
    yield "step", progress(view, console)
    if view.cause:
        yield "cause", view.cause
    if view.next_action:
        yield "next", view.next_action
    if found := view.incidents:
        ask, last = f"bash monitor.sh {view.run.path.name} --why", found[-1].event.get("cause", "")
        told = "" if view.cause else shorten(last, 70, placeholder=" ...")
        yield "incidents", f"{len(found)}{told and ', the last: '}{told}; {ask}"
    if refused := refusal.last(view.run):
        yield "refused", refused
    if view.job_id:
        yield "job", job_text(view)
    if view.job.is_started:
        yield "job left", view.job.left
    if view.status.get("nodes"):
        yield "nodes", ", ".join(view.status["nodes"])
    yield from learning(view, drawing.columns_of(console) - LABEL - 3)
    yield from time_and_space(view, most_bytes)
    yield "folder", str(view.run.path)
    logs = sorted(view.run.logs.glob("*.out")) or sorted(view.run.logs.glob("*.rank0.log"))
    if logs:
        yield "log", str(max(logs, key=lambda path: path.stat().st_mtime))


def progress(view: View, console: Console) -> str:
    if view.share is None:
        return steps(view)
    filled = drawing.bar(view.share, 20, drawing.plain(console))
    return f"{steps(view)}  {filled} {view.share:.0%}"


def learning(view: View, width: int) -> Iterator[tuple[str, str]]:
    """What was measured last; the sample is cut to ``width``."""
    if measured := view.measured:
        speed = f"{measured['tokens_per_second']:,.0f} tokens/s"
        mfu = f", MFU {measured['mfu']:.1%}" if measured.get("mfu") else ""
        yield "loss", f"{measured['loss']:.4f} at step {measured['step']:,}"
        yield "speed", f"{speed}, {measured['step_seconds']:.2f} s per step{mfu}"
        yield "seen", f"{measured['tokens_seen']:,} tokens, epoch {measured['epoch']:.3f}"
    if evaluated := view.evaluated:
        perplexity, at_step = rounded(evaluated["eval_perplexity"]), f"step {evaluated['step']:,}"
        loss = f"loss {evaluated['eval_loss']:.4f}"
        bits = evaluated.get("eval_bits_per_byte")
        exact = f", {bits:.4f} bits per byte" if bits else ""
        yield "held out", f"{loss}, perplexity {perplexity}{exact} at {at_step}"
    with contextlib.suppress(OSError, UnicodeError):
        if sample := " ".join((view.run.path / "sample.txt").read_text().split()):
            yield "sample", shorten(sample, max(width, 3), placeholder="...")


def time_and_space(view: View, most_bytes: int) -> Iterator[tuple[str, str]]:
    """What is left, where time went, who is slow, memory, what is on the disk."""
    if view.seconds_left is not None:
        jobs = view.jobs_left
        more = f", in this job and {counted(jobs, 'more job')}" if jobs else ""
        yield "run ETA", duration(view.seconds_left) + more
    if spent := time_spent(view, most_bytes):
        yield "time", spent
    if ranks := ranks_text(view):
        yield "ranks", ranks
    for event in view.slow_ranks if view.state == RUNNING else ():
        job, attempt = view.job_id, view.status.get("attempt", 1)
        if text := view.run.evidence(job, attempt, event["rank"]):
            yield f"rank {event['rank']}", text
    if memory := view.measured.get("peak_memory_gb"):
        yield "memory", f"{memory:.2f} GB at most, of rank 0"
    yield "checkpoint", newest_checkpoint(view)
    if best := names.linked(view.run.checkpoints, names.BEST):
        yield "best", f"{best.name}, of the lowest held-out loss, is kept"
    with contextlib.suppress(OSError):
        free = bytes_text(shutil.disk_usage(view.run.path).free)
        taken = sum(bytes_in(path) for path in view.run.checkpoints.glob("checkpoint-*"))
        yield "disk", f"checkpoints take {bytes_text(taken)}; {free} are free"


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def time_spent(view: View, most_bytes: int) -> str:
    """Where the run's time went, the largest parts first; empty of more than that to read."""
    path = view.run.path / "samples.jsonl"
    with contextlib.suppress(OSError):
        if path.stat().st_size < most_bytes:
            attempts = attempts_of(view.events, read_executions(path))
            spent = goodput.timeline_of_run(view.run, view.events, attempts).spent
            wall = sum(spent.values())
            parts = sorted(spent.items(), key=lambda item: -item[1])
            shares = [f"{cause} {s / wall:.0%}" for cause, s in parts if s > 0.005 * wall]
            return ", ".join(shares)
    return ""


def ranks_text(view: View) -> str:
    """Step times of the ranks, the slowest host by name."""
    told = view.run.rank_seconds()
    if view.state != RUNNING or not told or len(told["seconds"]) < 2:
        return ""
    seconds, hosts = told["seconds"], told["hosts"]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = median_without(sorted(seconds), seconds[slowest])
    each = ", ".join(f"{own:.3f}" for own in seconds)
    if len(seconds) > MOST_RANKS:
        each = f"{len(seconds)} ranks, {min(seconds):.3f} to {max(seconds):.3f}"
    ratio = f", {seconds[slowest] / others:.2f} times the others" if others else ""
    return f"{each} s of a step by itself; slowest: rank {slowest} on {hosts[slowest]}{ratio}"


def curves_of(view: View, console: Console, room: int, is_whole: bool) -> list[Text]:
    """The curves of loss and throughput against steps, as far as ``room`` lines hold them.

    ``is_whole``: all evaluations are looked for, not the last ones alone.
    """
    records = [*view.run.overview(), *view.logged[:1]]
    if len(records) < 2:
        return []
    width, is_plain = drawing.columns_of(console), drawing.plain(console)
    evaluations = list(view.run.evaluations())[::-1] if is_whole else view.evaluations
    evaluations = evaluations[:: len(evaluations) // MOST_MARKS + 1]
    marks = [Point(r["step"], r["eval_loss"]) for r in evaluations]
    starts = [e["step"] for e in view.events if e["event"] == "training"][1:]
    legend = "    o held out" * bool(marks) + "    ^ an attempt began" * bool(starts)
    titles = {"loss": f"loss{legend}", "tokens_per_second": "tokens/s"}
    share = min(1.0, max(0, room - 2) / sum(CURVES.values()))
    lines: list[Text] = []
    for key, most in CURVES.items():
        size = math.floor(most * share)
        points = [Point(r["step"], r[key]) for r in records if key in r]
        if size >= LEAST_LINES and room - len(lines) > size:
            shown = marks if key == "loss" else ()
            drawn = drawing.curve(points, (width - 2, size), shown, starts, is_plain)
            if drawn:
                lines += [
                    Text(f"  {titles[key]}", "dim"),
                    *(Text.assemble("  ", line) for line in drawn),
                ]
    return lines


def history_of(view: View, most: int, width: int) -> list[Text]:
    """The last events, each cut to ``width``."""
    shown, whole = min(len(view.events), most), len(view.events)
    if shown < 1:
        return []
    lines = [f"  {'history':<{LABEL}} the last {shown} of {whole} in events.jsonl"]
    for event in view.events[-shown:]:
        step = f" step {event['step']:,}" if event.get("step") is not None else ""
        cause = f": {event['cause']}" if event.get("cause") else ""
        lines.append(f"    {event['at'][:19]}Z  {event['event']}{step}{cause}")
    lines = [drawing.printable(line) for line in lines]
    return [Text(line if len(line) <= width else f"{line[: width - 1]}…") for line in lines]


def job_text(view: View) -> str:
    text = f"{view.job_id}, attempt {view.status.get('attempt') or 1}"
    if view.job.state:
        text += f", Slurm says {view.job.state}"
    if view.job.is_waiting:
        text += f" ({meaning(view.job.reason, view.job_id)})"
    return text
