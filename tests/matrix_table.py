"""The page of the fault matrix, from the rows that FAULT_MATRIX made the tests write down.

FAULT_MATRIX=/tmp/rows.jsonl bash tests/run.sh -m "matrix or not matrix" -k fault
python3 tests/matrix_table.py /tmp/rows.jsonl doc/fault-matrix.md

Without a second file the page goes to stdout. The last measurement of each row counts.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = """# The fault matrix

`tests/matrix_table.py` writes this page; do not edit it.
[reliability.md](reliability.md) says in six rows what a failure costs.

Each row is a test on real processes: on a real Slurm of three hosts, in
{slurm_tests},
or on the ranks of one machine, in
{local_tests}.
The model has 20,000 parameters. It saves a checkpoint every 10 steps of 60, 120 or 200; in F01,
F15 and F30 every 50 of 1,200.

{measured}

```
FAULT_MATRIX=/tmp/rows.jsonl bash tests/run.sh -m "matrix or not matrix" -k fault
python3 tests/matrix_table.py /tmp/rows.jsonl doc/fault-matrix.md
```

- A row with several faults is one run that all of them hit; its steps are their sum.
- *s to recover*: from the last step before the fault to the first step after it. Importing torch
  is part of it (5 to 10 s here). A requeued job also waits for its credential to expire (20 s here,
  120 s by default).
- *bit-identical*: whether all losses and the final weights are those of a run that was left alone.
  Empty: it cannot be compared.
- *code*: the exit code of the job, or of the one that was refused.

| row | what was done | steps redone | tokens repeated | tokens skipped | bit-identical \
| s to recover | code | what the log says |
|---|---|---|---|---|---|---|---|---|
{rows}
## Rows that other tests hold

| row | what | test |
|---|---|---|
{held}

## Not covered

- NCCL and GPUs: none was there.
- A quota and a broken disk are injected at the one layer through which files are written. A full
  disk is a real one.
- DataLoader workers do not exist here: each rank reads its tokens itself, with pread.
"""
HELD = [  # row, what, files of tests or names of tests
    ("F17", "a crash at any point of a save: 3,639 states, see [reliability.md](reliability.md)",
     ["test_crash_states.py"]),
    ("F19", "one flipped bit in any file of a checkpoint, 200 times: 200 found, the file named",
     ["test_every_flipped_bit_is_found_and_its_file_named",
      "test_one_flipped_bit_is_named_and_the_run_still_ends_bit_identical"]),
    ("F20", "a file missing, cut short or empty; the manifest missing",
     ["test_a_checkpoint_without_one_of_its_files_is_not_used",
      "test_a_file_that_was_cut_short_or_emptied_is_named"]),
    ("F21", "no checkpoint verifies: an error that names each, never a new start",
     ["test_it_never_starts_over_when_no_checkpoint_verifies"]),
    ("F22", "stray files, links, other names",
     ["test_other_names_and_links_are_no_checkpoints"]),
]  # fmt: skip


def main(rows: Path, page_file: Path | None) -> None:
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    text = page(records, measured(rows))
    if page_file is None:
        print(text, end="")
    else:
        page_file.write_text(text)


def page(records: list[dict], measured: str) -> str:
    last = {record["row"]: record for record in records}
    return PAGE.format_map(
        {
        "measured": measured,
        "rows": "".join(f"{row(last[name])}\n" for name in sorted(last)),
        "held": "\n".join(f"| {name} | {what} | {', '.join(map(where, tests))} |"
                          for name, what, tests in HELD),
        "local_tests": where("test_faults.py"),
        "slurm_tests": where("test_slurm_faults.py"),
    })  # fmt: skip


def row(record: dict) -> str:
    seconds = "" if record["seconds"] is None else f"{record['seconds']:.0f}"
    identical = {True: "yes", False: "NO", None: ""}[record["identical"]]
    message = re.sub(r"/\S*?(shared folder\d+|lab\d+)/trainstack/", ".../", record["message"])
    message = message.replace("|", "/").replace("\n", " ")
    message = message if len(message) <= 110 else message[:107] + "..."
    cells = [record["row"], record["fault"].replace("|", "/"), record["redone"],
             record["repeated"], record["skipped"], identical, seconds, record["code"],
             message]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def where(test: str) -> str:
    """A link to a file of tests, or the whole name of a test, in whichever room it is."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT)
        if path.name == test:
            return f"[{relative}](../{relative})"
        if f"def {test}(" in path.read_text():
            return f"`{relative}::{test}`"
    raise SystemExit(f"matrix_table.py: error: no test {test}; correct HELD or PAGE")


def measured(rows: Path) -> str:
    """When and on what: this machine, at the time of the last row."""
    day = time.strftime("%Y-%m-%d", time.gmtime(rows.stat().st_mtime))
    torch = re.search(r"(?m)^torch==(\S+)", (ROOT / "requirements.txt").read_text())[1]
    slurm = "no Slurm"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True)
        slurm = f"Slurm {done.stdout.split()[-1]}"  # "slurm-wlm 22.05.8"
    return f"Measured on {day}: {os.cpu_count()} cores, torch {torch} on CPUs, gloo, {slurm}."


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
