"""Tables, bars and curves made of characters, for a terminal or a file of any width."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten, wrap
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from trainstack.errors import without_secrets
from trainstack.units import NOTHING

GAP = "  "  # between columns
FILE_COLUMNS = 10_000  # what is no terminal has no width: nothing is left out
DRAWN_COLUMNS = 100  # of a curve there
ROWS_COLUMNS, ROW_LABEL = 110, 12  # of rows of text, and of their labels
MOST_TEXT = 300  # characters of a row: three lines
LEAST_CUT = 8  # columns of a text that may be cut
# Each character of Unicode's braille patterns is two by four dots; their bits, by column and row.
BRAILLE, DOTS = 0x2800, ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
COLORS = {  # of a word of health
    "good": "green", "done": "green", "queued": "cyan", "starting": "cyan", "failed": "bold red",
    "lost": "bold red", "blocked": "bold red",
}  # fmt: skip
OTHER_COLOR = "yellow"  # it needs a look


class Point(NamedTuple):
    """A point of a curve."""

    x: float
    y: float


def stdout_console() -> Console:
    """The terminal that stdout is, in its width and colours; or a file, plain and of any width."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=FILE_COLUMNS, highlight=False, markup=False, emoji=False)
    return console


def color_of(word: str) -> str:
    return COLORS.get(word, OTHER_COLOR)


def table(
    rows: Sequence[dict[str, str]], width: int, dropped_first: Sequence[str], cut: str
) -> list[Text]:
    """Rows of cells by their titles, of which each row has the same.

    A column that says nothing anywhere is left out; so are those that ``width`` cannot hold, in the
    order of ``dropped_first``. The column ``cut`` is the last one, and gets what is left. The
    first column is cut before the last of those goes.
    """
    rows = [{title: printable(text) for title, text in row.items()} for row in rows]
    said = [t for t in rows[0] if t not in dropped_first or any(r[t] != NOTHING for r in rows)]
    wide = {t: max(cell_len(t), *(cell_len(row[t]) for row in rows)) for t in said}

    def needed() -> int:
        least = {**wide, cut: min(wide.get(cut, 0), LEAST_CUT)}
        return sum(least[t] + len(GAP) for t in said) - len(GAP)

    *less_needed, last = dropped_first
    for title in less_needed:
        if title in said and needed() > width:
            said.remove(title)
    wide[said[0]] -= max(0, min(needed() - width, wide[said[0]] - LEAST_CUT))
    if last in said and needed() > width:
        said.remove(last)
    if cut in said:
        wide[cut] = min(wide[cut], width - sum(wide[t] + len(GAP) for t in said if t != cut))
    lines = [{title: title for title in said}, *rows]
    return [line_of(cells, said, wide, is_head=not i) for i, cells in enumerate(lines)]


def line_of(
    cells: dict[str, str], titles: Sequence[str], wide: dict[str, int], is_head: bool
) -> Text:
    """One line of a table, each cell as wide as its column."""
    line = Text(no_wrap=True, style="bold" if is_head else "")
    for title in titles:
        text = cells[title]
        if cell_len(text) > wide[title]:
            text = set_cell_size(text, wide[title] - 1) + "…"
        style = color_of(cells["HEALTH"]) if title == "HEALTH" and not is_head else ""
        line.append(set_cell_size(text, wide[title]), style).append(GAP)
    line.rstrip()
    return line


def printable(text: str) -> str:
    """Without what a terminal would obey: a sample or a message may hold anything."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def bar(share: float, width: int, is_plain: bool) -> str:
    """A bar of ``width`` characters, filled by a share from 0 to 1."""
    full = round(width * min(1.0, max(0.0, share)))
    return ("#" if is_plain else "█") * full + ("." if is_plain else "░") * (width - full)


def curve(
    points: Sequence[Point], size: tuple[int, int], marks: Sequence[Point] = (),
    cuts: Sequence[float] = (), is_plain: bool = False,
) -> list[Text]:  # fmt: skip
    """Lines that draw points, with the scale at the left and the first and last x below.

    ``size``: columns and lines of it all. ``marks``: drawn as ``o``; ``cuts``: x at which something
    began again, marked below. Where many points share a column, the least and the greatest show.
    Empty without two finite points.
    """
    shown = sorted(p for p in points if math.isfinite(p.y))
    if len(shown) < 2:
        return []
    marks = [p for p in marks if math.isfinite(p.y) and shown[0].x <= p.x <= shown[-1].x]
    low, high = bounds([p.y for p in shown], [p.y for p in marks])
    scale = [number(high), number((low + high) / 2), number(low)]
    left = max(map(len, scale))
    columns, height = size[0] - left - 1, size[1] - 1
    first, span = shown[0].x, (shown[-1].x - shown[0].x) or 1.0

    def place(point: Point, per_column: int, per_row: int) -> tuple[int, int]:
        across = (point.x - first) / span * (columns * per_column - 1)
        share = (min(high, max(low, point.y)) - low) / ((high - low) or 1.0)
        return round(across), round((1 - share) * (height * per_row - 1))

    grid = [[" "] * columns for _ in range(height)]
    if is_plain:
        for column, row in (place(p, 1, 1) for p in shown):
            grid[row][column] = "*"
    else:
        draw_dots(grid, [place(p, 2, 4) for p in shown])
    titles = dict(zip((0, height // 2, height - 1), scale, strict=True))
    lines = [
        Text.assemble((f"{titles.get(i, ''):>{left}} ", "dim"), ("".join(row), "blue"))
        for i, row in enumerate(grid)
    ]
    for column, row in (place(p, 1, 1) for p in marks):
        at = left + 1 + column
        lines[row] = Text.assemble(lines[row][:at], ("o", "bold magenta"), lines[row][at + 1 :])
    return [*lines, axis_of(shown[0].x, shown[-1].x, left, columns, cuts)]


def bounds(values: Sequence[float], marked: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value to draw.

    Without the first ones, if all others would be a flat line beside them.
    """
    later, whole = [*values[len(values) // 20 :], *marked], [*values, *marked]
    is_flat = max(whole) - min(whole) > 4 * (max(later) - min(later)) > 0
    shown = later if is_flat else whole
    return min(shown), max(shown)


def draw_dots(grid: list[list[str]], dots: Sequence[tuple[int, int]]) -> None:
    """A line of Braille dots through all dots."""
    for (x, y), (next_x, next_y) in itertools.pairwise(dots):
        parts = max(1, abs(next_x - x), abs(next_y - y))
        for part in range(parts + 1):
            column = x + round((next_x - x) * part / parts)
            row = y + round((next_y - y) * part / parts)
            cell = grid[row // 4][column // 2]
            bits = DOTS[column % 2][row % 4] | (ord(cell) - BRAILLE if cell != " " else 0)
            grid[row // 4][column // 2] = chr(BRAILLE | bits)


def axis_of(first: float, last: float, left: int, columns: int, cuts: Sequence[float]) -> Text:
    """The line below a curve: first and last x, and ``^``, or how often, where it began again."""
    begin, end = f"{first:,.0f}", f"{last:,.0f}"
    line = list(begin + " " * max(1, columns - len(begin) - len(end)) + end)
    marks: Counter[int] = Counter()
    for x in cuts:
        at = max(0, round((x - first) / ((last - first) or 1.0) * (columns - 1)))
        marks[min(max(at, len(begin) + 1), columns - len(end) - 3)] += 1  # beside the numbers
    for at, times in marks.items():
        mark = "^" if times == 1 else f"^{times}"
        line[at : at + len(mark)] = mark
    return Text(" " * (left + 1) + "".join(line), "dim")


def number(value: float) -> str:
    """With three digits or more: 4.53, 1,620, 1.62M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            shown = value / (1e3 if letter == "k" else size)
            return f"{shown:.{max(0, 2 - int(math.log10(abs(shown))))}f}{letter}"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.1e}"


def plain(console: Console) -> bool:
    """Whether only ASCII can be shown."""
    return not console.encoding.lower().startswith("utf")


def columns_of(console: Console) -> int:
    """The width of a drawing."""
    return console.width if console.width < FILE_COLUMNS else DRAWN_COLUMNS


def cut(text: str) -> str:
    """What of it fits one line."""
    return shorten(without_secrets(text), ROWS_COLUMNS - ROW_LABEL, placeholder=" ...")


def laid_out(*rows: tuple[str, str]) -> list[str]:
    """Rows of a label and a text in lines of ROWS_COLUMNS; without a label it is a title."""
    lines = []
    for label, text in rows:
        text = without_secrets(printable(text))
        text = shorten(text, MOST_TEXT, placeholder=" ...")
        parts = wrap(text, ROWS_COLUMNS - ROW_LABEL, break_on_hyphens=False) or [""]
        lines.append(f"  {label:<10}{parts[0]}" if label else parts[0])
        lines += [" " * 12 + part for part in parts[1:]]
    return lines
