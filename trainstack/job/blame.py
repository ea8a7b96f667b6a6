"""Which rank is to blame for the end of an attempt, by the failure reports that were left.

Reports come from a rank itself (failure.py, watchdog.py), or at second hand from launch.py, of
ranks that could not write one: those that were killed, or crashed.
"""

import re
from typing import Any

from trainstack.run.folder import RunFolder, tail_of
from trainstack.run.states import EXIT_CODES, Phase

TAIL_BYTES = 1 << 16  # of a log, and of stacks
# A line of ours in a traceback, or in the stacks of faulthandler.
OURS = re.compile(
    r'File "(?![^"]*site-packages)[^"]*/((?:trainstack/[^"]+|train)\.py)", line (\d+),? in (\w+)'
)
TELLING = re.compile(
    r"^[\w.]+(Error|Exception)\b|\berror:|CANCELLED|oom.kill|[Oo]ut of memory|is damaged"
    r"|No space|quota|NCCL WARN|Xid"
)
# What events say too, or what follows from it.
REPEATED = re.compile(
    r"launch: |srun: .*Exited|train\.slurm: |\S+: [A-Z_]+ at step |HANG |\*\*\* STEP"
)
STAMP = re.compile(r"^\S+ \S+ rank \d+ |^\[rank \d+\] |^slurmstepd\S* error: ")


def blame(run: RunFolder, job: str, attempt: int) -> dict[str, Any] | None:
    """The failure report of the rank that ended an attempt; None if there is no report at all.

    The first of these rules that names a rank decides. If ranks hung, and every other one that
    reported by itself is a victim:

    1. A rank that hung over its own samples: it waited for nobody.
    2. The silent rank, which did not report: the ones that hung waited for it.
    3. The least advanced of those that hung: the others waited for it. Ranks with GPUs wait at one
       place for what they queued; then it is the one that began the fewest collectives.

    In any case:

    4. The silent rank, if all others only lost a peer.
    5. The first that was not a victim; of victims alone, the first.
    """
    reports = run.failures(job, attempt)  # victims last, else by time
    own = [report for report in reports if not report.get("is_second_hand")]
    hung = [report for report in own if report["state"] == "HANG"]
    silent = silent_rank(run, job, attempt, reports) if own else None
    if hung and all(report["state"] == "HANG" or report["is_victim"] for report in own):
        # Reports at second hand do not count here: what killed a rank came after the hang.
        for report in hung:  # 1
            if list(Phase)[report["position"][1]] is Phase.SAMPLES:
                return report
        if silent:  # 2: stopped, in the kernel, holding the interpreter's lock, cut off
            told = f"rank {hung[0]['rank']}: {hung[0]['cause']}"
            cause = f"stopped answering while the others waited for it ({told})"
            return {**hung[0], **silent, "cause": cause}
        return min(hung, key=reached)  # 3
    if silent and all(report["is_victim"] for report in reports):  # 4
        cause = "disappeared without a report, and the others lost it (its node or network?)"
        return {**reports[0], **silent, "cause": cause}
    return next(iter(reports), None)  # 5


def reached(report: dict[str, Any]) -> tuple:
    """How far a rank had come that hung."""
    return tuple(report["position"]), report.get("collective", 0)


def silent_rank(
    run: RunFolder, job: str, attempt: int, reports: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Rank and host of the first rank that did not report; None if all did, or none had begun."""
    # An abort at second hand is a report: NCCL aborts ranks that wait, so it was not silent. What a
    # rank says that was stopped, and ran again only when others had hung, is none.
    hung = [report["at"] for report in reports if report["state"] == "HANG"]
    late = {r["rank"] for r in reports if hung and run.woke_at(job, attempt, r["rank"]) > min(hung)}
    heard = {r["rank"] for r in reports if not r.get("is_second_hand") or r.get("is_abort")} - late
    for rank, line in enumerate(ranks_of(run, job, attempt)):
        if rank not in heard:
            return {"rank": rank, "host": host_of(line)}
    return None


def unreported(run: RunFolder, job: str, attempt: int, code: int) -> dict[str, Any]:
    """In place of a failure report, if nobody left one; ``code``: of srun or torchrun."""
    hosts = sorted({host_of(line) for line in ranks_of(run, job, attempt)})
    where = f"node lost, or killed; it ran on {', '.join(hosts)}"
    if not hosts:
        where = "killed, or never begun"
    cause = f"the processes exited with code {code} without reporting a cause ({where})"
    return {"state": "FAILED", "exit_code": 1, "rank": "none", "cause": cause}


def ranks_of(run: RunFolder, job: str, attempt: int) -> list[str]:
    """The lines by which the ranks of an attempt introduced themselves, ``rank 0 on host: ...``."""
    for event in reversed(run.events()):
        if event["event"] == "start" and (event["job"], event["attempt"]) == (job, attempt):
            return event["ranks"]
    return []


def host_of(line: str) -> str:
    return line.partition(" on ")[2].partition(":")[0]


def witness(report: dict[str, Any]) -> str:
    """By whom, or by what, a failure report comes."""
    if isinstance(report["rank"], str):
        return f"{report['host']}: the report of its launcher"
    how = "its own report"
    if "by the kernel" in report["cause"]:
        how = "the kernel counted a kill for memory"
    elif report.get("is_second_hand"):
        how = "torchrun saw it end"
    elif report["state"] == "HANG":
        how = "its watchdog saw no progress"
    elif report["is_victim"]:
        how = "lost its peer" if report["exit_code"] == EXIT_CODES["FAILED"] else "says the same"
    return f"rank {report['rank']}: {how}"


def place_of(run: RunFolder, job: str, attempt: int, blamed: dict[str, Any]) -> str:
    """Where the blamed rank stood: the phase of a hang, and the innermost line of ours.

    Of a rank that could not report: where the first of the others waited for it.
    """
    frames, place = OURS.findall("\n".join(blamed.get("traceback") or []))[::-1], []
    if blamed.get("position"):
        reports = [report for report in run.failures(job, attempt) if "position" in report]
        own = [report for report in reports if report["rank"] == blamed["rank"]]
        for report in (own or reports)[:1]:
            (step, phase), waited = report["position"], f"rank {report['rank']} waited at "
            place.append(f"{'' if own else waited}step {step:,}, {list(Phase)[phase].value}")
            if report.get("collective"):
                place.append(f"{report['collective']:,} collectives begun (flight recorder)")
        for rank in (blamed["rank"], *(report["rank"] for report in reports[:1])):
            stacks = tail_of(run.stacks_file(job, attempt, rank), TAIL_BYTES)
            frames = frames or OURS.findall(stacks.rpartition("hread 0x")[2])  # the main thread
    return "; ".join([*place, *("{}:{} in {}".format(*frame) for frame in frames[:1])])


def telling_lines(run: RunFolder, job: str, attempt: int, rank: int | str | None) -> list[str]:
    """Lines that tell something of an end, in the log of its rank, else in that of its job.

    Each begins with the name of the log.
    """
    paths = [run.rank_log(job, attempt, rank)] if isinstance(rank, int) else []
    for path in (*paths, run.logs / f"{job}.out"):
        text = tail_of(path, TAIL_BYTES)
        if path.suffix == ".out":  # it has all attempts of the job
            text = text.rpartition(f"job {job}, attempt {attempt} on ")[2]
            text = text.partition(f"job {job}, attempt {attempt + 1} on ")[0]
        lines = dict.fromkeys(STAMP.sub("", line).strip() for line in text.splitlines())
        found = [line for line in lines if TELLING.search(line) and not REPEATED.match(line)]
        if found:
            return [f"{path.name}: {line}" for line in found]
    return []
