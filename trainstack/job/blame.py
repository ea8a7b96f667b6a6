"""Which rank is to blame for the end of an attempt."""

import argparse
from typing import Any

from trainstack.run.folder import RunFolder

WAITS_FOR_NOBODY = 1  # position of a rank that hangs over its own samples


def without_word(run: RunFolder, options: argparse.Namespace) -> dict[str, Any]:
    """The account of an attempt whose ranks left none."""
    where = lost_hosts(run, options.job, options.attempt)
    cause = f"the processes ended with code {options.code} and left no word ({where})"
    return {"state": "FAILED", "exit_code": 1, "rank": "none", "cause": cause}


def first_failure(run: RunFolder, job: str, attempt: int) -> dict[str, Any] | None:
    """The account of the rank that failed first; where ranks hung, of the one that held them up."""
    records = run.failures(job, attempt)
    own = [record for record in records if not record.get("is_second_hand")]
    hung = [record for record in own if record["state"] == "HANG"]
    alone = [r for r in hung if r["position"][1] == WAITS_FOR_NOBODY]
    heard = {r["rank"] for r in records if not r.get("is_second_hand") or r.get("is_abort")}
    ranks = enumerate(ranks_of(run, job, attempt))
    silent = [(rank, line) for rank, line in ranks if own and rank not in heard]
    if hung and all(record["state"] == "HANG" or record["is_victim"] for record in own):
        if alone:
            return alone[0]
        if not silent:
            return min(hung, key=lambda record: record["position"])  # the least advanced
        # Stopped, in the kernel, or holding the interpreter's lock: it could not say a word.
        cause = f"stopped answering while the others waited for it ({hung[0]['cause']})"
        return {**hung[0], "rank": silent[0][0], "host": host_of(silent[0][1]), "cause": cause}
    if silent and all(record["is_victim"] for record in records):
        cause = "left no word, and the others lost it (its node or network?)"
        return {**records[0], "rank": silent[0][0], "host": host_of(silent[0][1]), "cause": cause}
    return next(iter(records), None)


def ranks_of(run: RunFolder, job: str, attempt: int) -> list[str]:
    """The lines by which the ranks of an attempt introduced themselves, ``rank 0 on host: ...``."""
    for event in reversed(run.events()):
        if event["event"] == "start" and (event["job"], event["attempt"]) == (job, attempt):
            return event["ranks"]
    return []


def host_of(line: str) -> str:
    return line.partition(" on ")[2].partition(":")[0]


def lost_hosts(run: RunFolder, job: str, attempt: int) -> str:
    """Where an attempt ran that left no word, in words."""
    hosts = sorted({host_of(line) for line in ranks_of(run, job, attempt)})
    if not hosts:
        return "killed, or never begun"
    return f"node lost, or killed; it ran on {', '.join(hosts)}"
