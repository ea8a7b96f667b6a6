"""Draw what $RESULTS kept: ``chart.py RESULTS.json PICTURE.png``. A panel a case, a bar a loop."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

OURS, FLOOR, OTHERS = "#1b6ca8", "#8a8f98", "#cfd3d9"


def main(results: Path, picture: Path) -> None:
    whole = json.loads(results.read_text())
    cases = [(name, case, loops) for name, found in whole.items() for case, loops in found.items()]
    height = [len(loops) + 1.6 for _, _, loops in cases]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(8, 0.32 * sum(height)), height_ratios=height, squeeze=False
    )
    for panel, (name, case, loops) in zip(panels.flat, cases, strict=True):
        draw(panel, f"{name}: {case}", loops)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def draw(panel, title: str, loops: dict[str, list[float]]) -> None:
    """Speed beside the floor's, the fastest on top; a line from the slowest round to the best."""
    floor = statistics.median(loops[next(iter(loops))])
    order = sorted(loops, key=lambda loop: -statistics.median(loops[loop]))
    for loop in order:
        taken = statistics.median(loops[loop])
        color = OURS if loop.startswith("ours") else FLOOR if loop.startswith("bare") else OTHERS
        panel.barh(loop, floor / taken, color=color, height=0.72)
        ends = [floor / max(loops[loop]), floor / min(loops[loop])]
        panel.plot(ends, [loop, loop], color="#30343a", linewidth=1)
        unit = f"{taken:.1f} s" if taken >= 1 else f"{1000 * taken:.3g} ms"
        panel.text(0.01, loop, f"{floor / taken:.2f}   {unit}", va="center", fontsize=8,
                   color="white" if color != OTHERS else "#30343a")  # fmt: skip
    panel.axvline(1, color="#30343a", linewidth=0.8, linestyle=":")
    panel.set_title(f"{title} (speed, bare loop = 1)", loc="left", fontsize=9, weight="bold")
    panel.tick_params(labelsize=8, length=0)
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panel.set_xticks([])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
