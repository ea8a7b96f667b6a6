"""What runs are doing: the Python half of monitor.sh, from run folders and squeue's lines alone.

``--queue``: stdin has squeue's lines, as run/queue.py has them. With ``--follow`` they come again
and again, each time ended by a line ``look|heard|``; ``look|none|``: there is no Slurm here, or
``look|silent|why``: it did not answer.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from trainstack.monitor import one_run, table, why
from trainstack.monitor.drawing import stdout_console
from trainstack.monitor.view import View, unreadable, view_of
from trainstack.processes import run_command
from trainstack.run.folder import RunFolder
from trainstack.run.queue import Job, read_queue
from trainstack.storage import layout
from trainstack.units import as_json


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainstack.monitor.screen", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--queue", action="store_true", help="stdin has squeue's lines")
    parser.add_argument("--follow", action="store_true", help="stdin says when to look")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--why", action="store_true", help="what happened, and what to do")
    parser.add_argument("run", nargs="?")
    options = parser.parse_args(arguments)
    if options.run and not layout.run_folder(options.home, options.run).is_dir():
        refused = why.lines_without_run(layout.run_folder(options.home, options.run))
        if refused and not options.json:
            print(*refused, sep="\n")
            return 1
        have = ", ".join(folder.name for folder in run_folders(options.home)) or "none yet"
        print(f"monitor.sh: error: no run {options.run}; there are: {have}", file=sys.stderr)
        return 1
    if options.follow:
        follow(options.home, options.run)
        return 0
    jobs = read_queue(sys.stdin.read()) if options.queue else None
    views = look(options.home, options.run, jobs)
    if options.json:
        facts = [table.facts_of(view) for view in views]
        print(as_json(facts[0] if options.run else facts, indent=1))
    elif options.why:
        print(*why.lines_of(views[0], jobs), sep="\n")
    elif not views:
        print("monitor.sh: no runs yet; start one: bash submit.sh", file=sys.stderr)
    else:
        console = stdout_console()
        show(console, screen_of(views, options.run, console))
    return 0


def run_folders(home: Path) -> list[Path]:
    return [path.parent for path in sorted((home / "runs").glob("*/status.json"))]


def look(home: Path, run: str | None, jobs: dict[str, Job] | None) -> list[View]:
    """The view of a run, or those of all; ``jobs``: None without Slurm."""
    folders = [layout.run_folder(home, run)] if run else run_folders(home)
    views = []
    for folder in folders:
        try:
            views.append(view_of(RunFolder(folder), jobs))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            views.append(unreadable(RunFolder(folder), error))  # it hides no other run
    return views


def screen_of(
    views: list[View], run: str | None, console: Console, height: int | None = None
) -> list[Text]:
    if not views:
        return [Text("no runs yet; start one: bash submit.sh")]
    if run:
        return one_run.lines_of(views[0], console, height)
    return table.lines_of(views, console.width)


def show(console: Console, lines: list[Text]) -> None:
    """Print lines; a terminal wraps one that is too long, so that it can be copied whole."""
    for line in lines:
        console.print(line, soft_wrap=True)


def follow(home: Path, run: str | None) -> None:
    """Draw the screen in place each time that stdin says so, until the run has ended."""
    console, lines = stdout_console(), []
    live = contextlib.nullcontext()
    if console.is_terminal:
        live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live as window:
        for jobs, trouble in looks():
            views = look(home, run, jobs)
            lines = screen_of(views, run, console, console.height - 2)
            if run and not views[0].is_live and not trouble:
                lines = screen_of(views, run, console)
                break
            if window:
                window.update(framed(lines, console.height, trouble), refresh=True)
            else:
                show(console, [*lines, foot_of(trouble), Text()])
                console.file.flush()
    show(console, lines)  # what it showed last stays in the terminal


def looks() -> Iterator[tuple[dict[str, Job] | None, str]]:
    """The jobs of Slurm each time that stdin says to look, and why there are none."""
    said: list[str] = []
    for line in sys.stdin:
        if not line.startswith("look|"):
            said.append(line)
            continue
        _, kind, trouble = line.strip().split("|", 2)
        yield read_queue("".join(said)) if kind == "heard" else None, trouble
        said.clear()


def framed(lines: list[Text], height: int, trouble: str) -> Group:
    """As many lines as the window has, and when they were true."""
    most = height - 2
    shown, hidden = lines, ""
    if len(lines) > most:
        shown, hidden = lines[: most - 1], f"; {len(lines) - most + 1} lines more"
    for line in shown:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*shown, Text(), foot_of(f"{trouble}{hidden}; Ctrl-C ends this"))


def foot_of(more: str) -> Text:
    at = time.strftime("%H:%M:%S")
    return Text(f"looked at {at}{more and '; '}{more.removeprefix('; ')}", "dim")


if __name__ == "__main__":
    run_command(main)
