"""Prints what a tracker holds of a run as JSON: ``lines`` of [step, values], ``config``, ``state``.

It runs with the packages of the tracker, and not with ours but for the frames of .wandb files.
"""

import json
import sys
from pathlib import Path


def of_wandb(*files: str) -> dict:
    from wandb.proto.wandb_internal_pb2 import Record

    from trainstack.trackers.to_wandb import records_in

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
