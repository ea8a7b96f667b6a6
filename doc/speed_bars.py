"""Draw how fast the loops of the benchmarks were: python3 doc/speed_bars.py RESULTS.json SVG

``RESULTS=FILE bash benchmarks/run.sh startup step two_ranks`` keeps them. Needs Python alone.
"""

import json
import sys
from pathlib import Path
from statistics import median

from loss_curve import box, line, text

WIDTH, COLUMN = 860, 425  # of the picture and of a panel, in pixels, as all lengths here
LABELS, BARS = 145, 250  # width of the names, and of the fastest bar
BAR, ROW, SPACE = 18, 23, 50  # height of a bar, from bar to bar, of a panel beside its bars
NAMES = {"trainer": "HF Trainer", "lightning": "Lightning", "bare": "bare loop"}
STYLE = """<style>
  text { font: 12px sans-serif; fill: #1f2328 } .title { font: bold 13px sans-serif }
  .end { text-anchor: end } .paper { fill: #ffffff } text.inside { fill: #ffffff }
  .ours { fill: #0969da } .bare { fill: #6e7781 } .peer { fill: #d0d7de }
  .one, .rounds { stroke: #1f2328 } .one { stroke-dasharray: 2 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #0d1117 } .one, .rounds { stroke: #e6edf3 }
    .ours { fill: #1f6feb } .peer { fill: #3d444d }
  }
</style>"""
TOLD = "Speed beside a bare loop, which is 1. A thin line: from the slowest round to the fastest."


def main(results: Path, picture: Path) -> None:
    found = json.loads(results.read_text())
    cases = [(f"{name}: {case}", loops) for name in found for case, loops in found[name].items()]
    unit = BARS / max(bare(loops) / min(sum(loops.values(), [])) for _, loops in cases)
    shapes, top = [text(20, 28, TOLD)], 36
    for first in range(0, len(cases), 2):  # two beside each other
        pair = cases[first : first + 2]
        for number, (title, loops) in enumerate(pair):
            shapes += panel(COLUMN * number, top, title, loops, unit)
        top += SPACE + ROW * max(len(loops) for _, loops in pair)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{top}" rx="6"/>'
    picture.write_text("\n".join([head, STYLE, paper, *shapes, "</svg>\n"]))


def panel(left: int, top: int, title: str, loops: dict[str, list], unit: float) -> list[str]:
    """The shapes of one case, the fastest loop first; ``unit``: the length of a speed of 1."""
    begin, one = left + LABELS, bare(loops)
    shapes = [text(begin, top + 26, title, "title")]
    top += 36
    for number, (name, seconds) in enumerate(sorted(loops.items(), key=lambda f: median(f[1]))):
        taken, y = median(seconds), top + ROW * number
        kind = next((kind for kind in ("ours", "bare") if name.startswith(kind)), "peer")
        shown = f"{taken:.1f} s" if taken >= 1 else f"{1000 * taken:.3g} ms"
        first, comma, rest = name.partition(",")
        shapes += [
            text(begin - 8, y + 13, NAMES.get(first, first) + comma + rest, "end"),
            box(begin, y, unit * one / taken, BAR, kind),
            line(begin + unit * one / max(seconds), y + BAR / 2,
                 begin + unit * one / min(seconds), y + BAR / 2, "rounds"),
            text(begin + 7, y + 13, f"{one / taken:.2f} ({shown})", "inside" * (kind != "peer")),
        ]  # fmt: skip
    x = begin + unit
    return [*shapes, line(x, top - 4, x, top + ROW * len(loops), "one")]


def bare(loops: dict[str, list]) -> float:
    """Seconds of the bare loop, which each case begins with."""
    return median(next(iter(loops.values())))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 doc/speed_bars.py RESULTS.json SVG")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    print(sys.argv[2])
