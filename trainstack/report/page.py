"""Writes the report of a run, or the comparison of several, as one HTML file.

Command line: ``python -m trainstack report RUN [RUN ...] [--home HOME]``; prints the file's path.

The page needs no network and asks for nothing: styles, scripts, uPlot and the data are inside. The
data is JSON, in ``<script id="data">``, for other programs as well.
"""

import errno
import hashlib
import html
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from trainstack.errors import Failed, without_secrets
from trainstack.history.goodput import CAUSES
from trainstack.history.settings import settings_of
from trainstack.monitor.view import view_of
from trainstack.options import parse, parser_of
from trainstack.report.facts import facts_of
from trainstack.run.folder import RunFolder, find_run
from trainstack.run.queue import read_queue
from trainstack.storage import files
from trainstack.units import as_json

FORMAT = 1  # of the data
LEDGER_BYTES = 64 << 20  # of samples.jsonl, some 700,000 steps: beyond it the ledger takes too long
LEDGER_SECONDS = 5  # from the beginning; the end of a job waits 10 for all of the page
HERE = Path(__file__).parent
MOST_NAMED = 3  # runs in the name of the file of a comparison


def main(arguments: list[str]) -> int:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="name or folder of a run")
    parser.add_argument(
        "--queue", action="store_true", help="stdin has squeue's lines, as run/queue.py has them"
    )
    parser.add_argument("--if-asked", action="store_true", help="only if log.report_to has html")
    options = parse(parser, arguments, needs_home=False)
    if options.if_asked:
        asked = settings_of(Path(options.runs[0]) / "config.yaml").get("log.report_to") or []
        if "html" not in asked:
            return 0
    jobs = read_queue(sys.stdin.read()) if options.queue else None
    try:
        runs = [RunFolder(find_run(run, options.home)) for run in dict.fromkeys(options.runs)]
        target = write(runs, page_of(runs, jobs, options.home).encode(), options.home)
    except OSError as error:
        raise Failed(f"{error.filename}: {error.strerror}; ask its owner") from None
    print(target)
    return 0


def write(runs: Sequence[RunFolder], page: bytes, home: Path | None) -> Path:
    """Put the page in the folder of the run, else in reports/; where it is."""
    name = file_name(runs)
    if len(runs) == 1:
        try:
            return put(runs[0].path / "report.html", page)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            print(f"report: {runs[0].path} is not yours to write in", file=sys.stderr)
    return put((home or runs[0].path.parent.parent) / "reports" / name, page)


def file_name(runs: Sequence[RunFolder]) -> str:
    """Of a page that lies beside the runs: no other runs have it; + is in no run's name."""
    names = [run.path.name for run in runs]
    if len(names) > MOST_NAMED:
        more = hashlib.sha256("+".join(names).encode()).hexdigest()[:6]
        names[MOST_NAMED:] = [f"{len(names) - MOST_NAMED}-more-{more}"]
    return f"{'+'.join(names)}.html"


def put(target: Path, page: bytes) -> Path:
    """Write a page, under its name at once."""
    files.make_folder(target.parent)
    files.replace_file(target, page)
    return target


def page_of(runs: Sequence[RunFolder], jobs: dict | None, home: Path | None) -> str:
    """The page about some runs; a comparison leaves out what is of one run alone."""
    began = time.monotonic()
    is_alone = len(runs) == 1
    ledger = start_ledger(runs[0], home) if is_alone else None
    data: dict[str, Any] = {"format": FORMAT, "made_at": time.time(), "causes": CAUSES}
    data["runs"] = [facts_of(view_of(run, jobs)) for run in runs]
    if is_alone:
        seconds = max(0.0, LEDGER_SECONDS - (time.monotonic() - began))
        data["runs"][0]["ledger"] = said_by(ledger, runs[0].path.name, seconds)
    parts = {
        "style": "page.css", "curves": "curves.js", "page": "page.js",
        "uplot": "uplot/uPlot.iife.min.js", "uplot_style": "uplot/uPlot.min.css",
        "uplot_license": "uplot/LICENSE",
    }  # fmt: skip
    return Template((HERE / "page.html").read_text()).substitute(
        {name: (HERE / path).read_text() for name, path in parts.items()},
        title=html.escape(" and ".join(run.path.name for run in runs[:MOST_NAMED])),
        data=as_json(data).replace("<", "\\u003c"),  # no tag ends the script
    )


def start_ledger(run: RunFolder, home: Path | None) -> subprocess.Popen | None:
    """The ledger in a process of its own, beside this one; None if it would take too long."""
    samples = run.path / "samples.jsonl"
    if samples.exists() and samples.stat().st_size > LEDGER_BYTES:
        return None
    command = [sys.executable, "-m", "trainstack", "ledger", str(run.path)]
    command += ["--home", str(home)] if home else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said_by(ledger: subprocess.Popen | None, name: str, seconds: float) -> dict[str, Any]:
    """Its lines and exit code: 0 if each sample was used once, 1 if not, 2 if it cannot be told."""
    if ledger:
        try:
            text, _ = ledger.communicate(timeout=seconds)
            return {"code": ledger.returncode, "lines": without_secrets(text).splitlines()}
        except subprocess.TimeoutExpired:
            ledger.kill()
            ledger.wait()
    text = f"This takes longer than a report may; to see it: bash monitor.sh {name} --ledger"
    return {"code": 2, "lines": [text]}
