"""Checks that every step consumed its own samples: recomputes them and compares with the log.

Command line: ``python -m trainstack ledger RUN [--home HOME]``; RUN is a run's name or its folder.
Exit code 0: no sample was repeated, none was skipped; 1: some were; 2: it could not be checked.

The log is samples.jsonl. The effective history is checked: of every step the execution that no
later attempt did again, up to the newest checkpoint, or to the end of a run that is DONE.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.checkpoint import names
from trainstack.config.load import load
from trainstack.data import corpus, order, store
from trainstack.errors import ConfigError
from trainstack.history.attempts import (
    Attempt,
    Execution,
    attempts_of,
    last_durable_step,
    of_parent,
    read_executions,
)
from trainstack.options import parse, parser_of
from trainstack.run.folder import RunFolder, find_run
from trainstack.run.identity import identity
from trainstack.units import counted

CHUNK_SAMPLES = 1 << 16  # per call of the sampler: its arrays stay in the cache of a core
SHOWN = 8  # problems; of more only the number is printed


@dataclass
class Findings:
    """Where the log of steps 1 to ``steps`` differs from what was due."""

    steps: int
    missing: list[int] = field(default_factory=list)
    other: dict[int, str] = field(default_factory=dict)  # step -> what it consumed instead
    twice: dict[int, str] = field(default_factory=dict)  # step -> the attempt that did so
    extra_executions: int = 0  # of the steps in ``twice``

    @property
    def repeated_steps(self) -> int:
        """How many steps' samples were consumed more than once.

        A step that consumed other samples than its own took those of an earlier or a later step.
        """
        return self.extra_executions + len(self.other)

    @property
    def skipped_steps(self) -> int:
        """How many steps' samples were not consumed."""
        return len(self.missing) + len(self.other)


def main(arguments: list[str]) -> int:
    parser = parser_of("ledger", __doc__)
    parser.add_argument("run", metavar="RUN", help="name or folder of a run")
    options = parse(parser, arguments, needs_home=False)
    run = RunFolder(find_run(options.run, options.home))
    own_home = run.path.parent.parent
    is_own = options.home is None or (own_home / "tokens").is_dir()
    return audit(run, own_home if is_own else options.home)


def audit(run: RunFolder, home: Path) -> int:
    """Check one run and print what was found; the exit code."""
    executions = read_executions(run.path / "samples.jsonl")
    events = run.events()
    attempts = attempts_of(events, executions)
    last = last_durable_step(run.status(), run.checkpoints)
    state = run.status().get("state", "no status")
    print(f"run {run.path.name}: {state}, attempts: {len(attempts)}")
    if last == 0:
        print("  checked     nothing: no step is durable yet")
        return 0
    keys = identity_keys(run, home)
    sampler = sampler_of(keys, home, run.left_out())
    known = [*of_parent(events, executions), *attempts]
    findings = compare(known, sampler, last)
    for name, text in result(findings, sampler, keys["data.seq_len"], known):
        print(f"  {name:<11} {text}")
    for line in problems(findings):
        print(f"    {line}")
    return 1 if findings.repeated_steps or findings.skipped_steps else 0


def identity_keys(run: RunFolder, home: Path) -> dict[str, Any]:
    """What the run learns from: by its newest checkpoint, else by its config.yaml."""
    _, saved = names.newest_state(run.checkpoints)
    if saved:
        return saved.identity
    config = load(run.path / "config.yaml", [])
    return identity(config, corpus.open_corpus(home, config).key)


def sampler_of(keys: dict[str, Any], home: Path, left_out: Sequence[dict[str, int]]):
    """A sampler of all ranks' samples, as the run had it."""
    sizes = []
    for key in keys["tokens"].split("+"):
        folder = home / "tokens" / key
        try:
            sizes.append(store.TokenStore(folder, keys["data.seq_len"]).train.num_samples)
        except OSError:
            raise ConfigError(
                f"the tokens that the run learned from are not there ({folder}); run: "
                "bash download_data_model.sh, or pass the --home that has them"
            ) from None
    batch, seed = keys["train.global_batch_size"], keys["run.seed"]
    weights = [keys.get("data.weight")]
    weights += [source["weight"] for source in keys.get("data.mixture", ())]
    mixture = order.mixture_of(sizes, weights, seed)
    return order.StepOrder(sum(sizes), batch, seed, left_out, mixture)


def compare(attempts: Sequence[Attempt], sampler, last: int) -> Findings:
    """Compare the effective history of steps 1 to ``last`` with what the sampler gives."""
    findings, logged = Findings(last), dict[int, Execution]()
    for attempt in attempts:
        seen = set()
        for execution in attempt.effective():
            step = execution.step
            if step in seen and step <= last:
                findings.twice[step] = attempt.name
                findings.extra_executions += 1
            seen.add(step)
            logged[step] = execution
    due: dict[str, int] = {}
    for step, expected in enumerate(expected_hashes(sampler, last), start=1):
        due[expected] = step
        if step not in logged:
            findings.missing.append(step)
        elif logged[step].samples_hash != expected:
            findings.other[step] = f"hash {logged[step].samples_hash}, not {expected}"
    for step in findings.other:
        owner = due.get(logged[step].samples_hash)
        if owner is not None:
            findings.other[step] = f"those of step {owner:,}"
    return findings


def expected_hashes(sampler, last: int) -> Iterator[str]:
    """The hash of what each step from 1 to ``last`` has to consume."""
    batch = sampler.global_batch_size
    steps_per_chunk = max(1, CHUNK_SAMPLES // batch)
    for first in range(0, last, steps_per_chunk):
        steps = np.arange(first, min(last, first + steps_per_chunk))
        ahead = np.zeros_like(steps)  # as in StepOrder.all_samples_at, for many steps at once
        for window in sampler.left_out:
            ahead += window["steps"] * (steps >= window["after"])
        positions = ((steps + ahead) * batch)[:, None] + np.arange(batch)
        samples = sampler.at(positions.reshape(-1)).reshape(positions.shape)
        yield from (f"{found:013x}" for found in order.hashes_of_rows(samples).tolist())


def result(
    findings: Findings, sampler, seq_len: int, attempts: Sequence[Attempt]
) -> Iterator[tuple[str, str]]:
    """What was checked, how it came out, and what is worth knowing of it: name and text."""
    batch, total = sampler.global_batch_size, sampler.total_samples
    samples = findings.steps * batch
    text = f"{counted(findings.steps, 'step')} = {counted(samples, 'sample')}"
    text += f" = {samples * seq_len:,} tokens"
    yield "checked", f"{text}, {samples / total:.2f} epochs of {counted(total, 'sample')}"
    repeated, skipped = findings.repeated_steps * batch, findings.skipped_steps * batch
    yield "samples", f"repeated = {repeated:,}, skipped = {skipped:,}"
    executed = sum(len(attempt.executions) for attempt in attempts)
    kept = [execution.step for attempt in attempts for execution in attempt.effective()]
    redone = executed - len(kept)
    fraction = f" ({redone / executed:.1%} of those executed)" if redone else ""
    yield "redone", f"{counted(redone, 'step')} on record that interruptions undid{fraction}"
    ahead = len({step for step in kept if step > findings.steps})
    if ahead:
        yield "not saved", f"{counted(ahead, 'step')} beyond step {findings.steps:,}"
    left_out = sum(window["steps"] for window in sampler.left_out)
    if left_out:
        samples = f"{left_out * batch:,} samples"
        yield "left out", f"{left_out:,} steps = {samples}, on purpose, by rollbacks"
    skips = [
        event["step"]
        for attempt in attempts
        for event in attempt.events
        if event["event"] == "skip" and event["step"] <= min(attempt.redone_above, findings.steps)
    ]
    if skips:
        text = "steps whose samples were consumed, but whose bad updates were not made"
        yield "no update", f"{text}: {len(skips):,}"


def problems(findings: Findings) -> list[str]:
    """A line for each range of steps with a problem, the first ones first."""
    found = []
    for first, name in ranges(findings.missing):
        found.append((first, f"{name} not on record: the samples count as skipped"))
    for first, name in ranges(findings.other):
        instead = f"step {first:,}: {findings.other[first]}"
        found.append((first, f"{name} consumed other samples than due ({instead})"))
    for first, name in ranges(findings.twice):
        attempt = findings.twice[first]
        found.append((first, f"{name} executed twice within one attempt ({attempt}): repeated"))
    lines = [text for _, text in sorted(found)]
    if len(lines) > SHOWN:
        return [*lines[:SHOWN], f"and {len(lines) - SHOWN:,} more problems"]
    return lines


def ranges(steps: Iterable[int]) -> Iterator[tuple[int, str]]:
    """The first step and the name of each range of consecutive steps."""
    # Within a range the step and its index grow alike: their difference tells ranges apart.
    by_range = itertools.groupby(enumerate(sorted(steps)), lambda pair: pair[1] - pair[0])
    for _, pairs in by_range:
        first, *rest = [step for _, step in pairs]
        yield first, f"steps {first:,} to {rest[-1]:,}" if rest else f"step {first:,}"
