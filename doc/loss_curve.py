"""Draw the loss of a run as one curve over its restarts: python3 doc/loss_curve.py RUN_FOLDER SVG

Reads metrics.jsonl and events.jsonl of the run folder. Needs Python alone.
"""

import json
import math
import re
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 860, 400  # of the picture, in pixels, as all lengths here
LEFT, RIGHT, TOP, BOTTOM = 56, 836, 76, 340  # of the plot within it
ENDS = ("failed", "hang", "paused", "node_lost")  # events by which an attempt ends early
STYLE = """<style>
  text { font: 13px sans-serif; fill: #1f2328 } .title { font: bold 16px sans-serif }
  .middle { text-anchor: middle } .end { text-anchor: end } .again { fill: #bc4c00; opacity: 0.15 }
  .paper { fill: #ffffff } .grid { stroke: #d0d7de; stroke-width: 0.7 }
  .loss { fill: none; stroke: #0969da; stroke-width: 2 } .held-out { fill: #1a7f37 }
  line.restart { stroke: #bc4c00 } text.restart { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #0d1117 } .grid { stroke: #3d444d }
    .loss { stroke: #58a6ff } .held-out { fill: #3fb950 } .again { fill: #f0883e; opacity: 0.3 }
    line.restart { stroke: #f0883e } text.restart { fill: #f0883e }
  }
</style>"""
LEGEND = """<path class="loss" d="M514 24h22"/> <text x="544" y="28">training</text>
<circle class="held-out" cx="620" cy="24" r="5"/> <text x="632" y="28">held-out data</text>
<path class="again" d="M742 17h14v14h-14z"/> <text x="763" y="28">done twice</text>"""


def main(run: Path, picture: Path) -> None:
    shapes = plot(run.name, read_lines(run / "metrics.jsonl"), read_lines(run / "events.jsonl"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    picture.write_text("\n".join([head, STYLE, paper, LEGEND, *shapes, "</svg>\n"]))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot(name: str, metrics: list[dict], events: list[dict]) -> list[str]:
    """The shapes from the back to the front: axes, restarts, measurements."""
    losses = [(entry["step"], entry["loss"]) for entry in metrics if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in metrics if "eval_loss" in entry]
    values = [loss for _, loss in losses + evaluations]
    last_step, highest = losses[-1][0], max(values)
    step_ticks, loss_ticks = ticks(0, last_step), ticks(min(values), highest)

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last_step

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (loss - loss_ticks[0]) / (highest - loss_ticks[0])

    shapes = [text(LEFT - 36, 28, f"Loss of the run {name}", "title")]
    shapes += [text(LEFT - 36, TOP - 18, "loss (nats per token)")]
    shapes += [text((LEFT + RIGHT) / 2, BOTTOM + 44, "step (optimizer updates)", "middle")]
    shapes += [text(x(step), BOTTOM + 20, f"{step:g}", "middle") for step in step_ticks]
    shapes += [text(LEFT - 8, y(loss) + 4, f"{loss:g}", "end") for loss in loss_ticks]
    shapes += [line(LEFT, y(loss), RIGHT, y(loss), "grid") for loss in loss_ticks]
    for number, (first, last, cause) in enumerate(restarts(events)):
        label = TOP + 18 + 46 * (number % 3)  # neighbours must not touch
        at, side = (x(first) - 7, "restart end") if x(first) > 240 else (x(last) + 7, "restart")
        shapes += [box(x(first), TOP, x(last) - x(first), BOTTOM - TOP, "again")]
        shapes += [line(x(first), TOP, x(first), BOTTOM, "restart"), text(at, label, cause, side)]
        shapes += [text(at, label + 17, f"resumed from step {first}", side)]
    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in losses)
    shapes += [f'<polyline class="loss" points="{points}"/>']
    return shapes + [box(x(s) - 5, y(loss) - 5, 10, 10, "held-out", 5) for s, loss in evaluations]


def ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers, at most ten; the first one is not above ``lowest``."""
    unit = 10 ** math.floor(math.log10((highest - lowest) / 4))
    unit *= next(factor for factor in (1, 2, 5) if (highest - lowest) / (unit * factor) <= 8)
    return [unit * n for n in range(math.floor(lowest / unit), math.floor(highest / unit) + 1)]


def restarts(events: list[dict]) -> list[tuple[int, int, str]]:
    """Of each restart: the step it resumed from, the last step known before it, and its cause."""
    found, end = [], {}
    for event in events:
        if event["event"] in ENDS:
            end = event
        elif event["event"] == "training":
            if end:
                cause = re.sub(r" on [^:]+:|\(.*", "", end.get("cause", "node lost")).strip()
                found.append((event["step"], max(event["step"], end.get("step", 0)), cause))
            end = {"cause": "ended unseen"}  # until an event says how
    return found


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: int = 0) -> str:
    corner = f'x="{x:.1f}" y="{y:.1f}" rx="{radius}"'
    return f'<rect class="{kind}" {corner} width="{width:.1f}" height="{height:.1f}"/>'


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python3 doc/loss_curve.py RUN_FOLDER SVG, of a run that has logged steps")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    print(sys.argv[2])
