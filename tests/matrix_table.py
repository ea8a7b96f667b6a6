"""The fault matrix as a table: ``python tests/matrix_table.py FILE``; FAULT_MATRIX named the file.

FAULT_MATRIX=/tmp/rows.jsonl bash tests/run.sh -m "matrix or not matrix" -k fault
The last measurement of each row counts.
"""

import json
import re
import sys
from pathlib import Path

HEAD = (
    "| row | what was done | steps redone | tokens repeated | tokens skipped | bit-identical "
    "| s to recover | code | what the log says |"
)


def main(path: Path) -> None:
    rows = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        rows[record["row"]] = record
    print(HEAD)
    print("|---" * HEAD.count(" | ") + "|---|")
    for name in sorted(rows):
        print(row(rows[name]))


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
