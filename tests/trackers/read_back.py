"""Prints what a tracker holds of a run as JSON: ``lines`` of [step, values], ``config``, ``state``.

It runs with the packages of the tracker, and not with ours.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes, of a .wandb file
WHOLE = (1, 4)  # kinds of a part that ends its record


def of_wandb(*files: str) -> dict:
    from wandb.proto.wandb_internal_pb2 import Record

    found = {"lines": [], "config": {}, "state": {}}
    for file in files:
        for data in records_in(Path(file).read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                values = items(record.history.item)
                found["lines"].append([record.history.step.num, values])
            elif record.HasField("run"):
                found["config"] |= items(record.run.config.update)
            elif record.HasField("summary"):
                found["state"] |= items(record.summary.update)
    return found


def records_in(data: bytes) -> Iterator[bytes]:
    """The records, framed as in LevelDB's log: doc/log_format.md there."""
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += HEADER
        record += data[at : at + size]
        at += size
        if kind in WHOLE:
            yield record
            record = b""


def items(parts) -> dict:
    return {part.key or "/".join(part.nested_key): json.loads(part.value_json) for part in parts}


def of_trackio(project: str, run: str) -> dict:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    lines = [[line.pop("step"), line] for line in SQLiteStorage.get_logs(project, run)]
    assert [each.name for each in trackio.Api().runs(project)] == [run]
    config = SQLiteStorage.get_run_config(project, run)
    return {"lines": lines, "config": config, "state": config["state"]}


if __name__ == "__main__":
    print(json.dumps({"wandb": of_wandb, "trackio": of_trackio}[sys.argv[1]](*sys.argv[2:])))
