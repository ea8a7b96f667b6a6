"""Did every step consume exactly the samples that it had to? Recomputed, and compared with the log.

Command line: ``python -m trainstack ledger RUN [--home HOME]``; RUN is a run's name or its folder.
Exit code 0: every sample once, none repeated, none skipped; 1: not so; 2: it cannot be told.

The log is samples.jsonl. What is checked is the effective history: of every step up to the newest
checkpoint (of a run that is DONE, to its end) the execution that no later life did again.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.checkpoint import names
from trainstack.config.load import load
from trainstack.data import corpus, store
from trainstack.errors import ConfigError
from trainstack.monitor import history
from trainstack.monitor.history import Execution, Life
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity

SPEAKER = "ledger"
CHUNK_SAMPLES = 1 << 16  # per call of the sampler: its arrays stay in the cache of a core
SHOWN = 8  # problems


@dataclass
class Findings:
    """Where the log of steps 1 to ``steps`` does not agree with what had to be."""

    steps: int
    missing: list[int] = field(default_factory=list)
    other: dict[int, str] = field(default_factory=dict)  # step -> what it consumed instead
    twice: dict[int, str] = field(default_factory=dict)  # step -> the life that executed it twice
    extra_executions: int = 0  # of the steps in ``twice``

    @property
    def repeated_steps(self) -> int:
        """How many steps' samples were consumed more than once.

        What a step consumed in place of its own samples is another step's, before or to come.
        """
        return self.extra_executions + len(self.other)

    @property
    def skipped_steps(self) -> int:
        """How many steps' samples were not consumed."""
        return len(self.missing) + len(self.other)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainstack ledger", description=__doc__)
    history.add_run_arguments(parser, os.environ.get("TRAINSTACK_HOME"))
    options = parser.parse_args(arguments)
    try:
        run = RunFolder(history.find_run(options.run, options.home))
        own_home = run.path.parent.parent
        is_own = options.home is None or (own_home / "tokens").is_dir()
        return audit(run, own_home if is_own else options.home)
    except ConfigError as error:
        print(error.report(SPEAKER), file=sys.stderr)
        return error.code


def audit(run: RunFolder, home: Path) -> int:
    """Check one run and print what was found; the exit code."""
    lives = history.lives_of(run.events(), history.read_executions(run.path / "samples.jsonl"))
    last = history.last_durable_step(run.status(), run.checkpoints)
    print(f"run {run.path.name}: {run.status().get('state', 'no status')}, lives: {len(lives)}")
    if last == 0:
        print("  checked     nothing: no step is durable yet")
        return 0
    identity = identity_of(run, home)
    sampler = sampler_of(identity, home, run.left_out())
    findings = compare(lives, sampler, last)
    for name, text in [
        *result(findings, sampler, identity["data.seq_len"]),
        *remarks(findings, sampler, lives),
    ]:
        print(f"  {name:<11} {text}")
    for line in problems(findings):
        print(f"    {line}")
    return int(findings.repeated_steps + findings.skipped_steps > 0)


def identity_of(run: RunFolder, home: Path) -> dict[str, Any]:
    """What the run learns from: by its newest checkpoint, else by its config.yaml."""
    _, saved = names.newest_identity(run.checkpoints)
    if saved:
        return saved
    config = load(run.path / "config.yaml", [])
    try:
        folders = (
            store.store_folder(home, config.model.name, section) for section in config.data.sources
        )
        key = corpus.corpus_key(folders)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model or data set of {run.path.name} are not there: {error}") from None
    return identity(config, key)


def sampler_of(identity: dict[str, Any], home: Path, left_out: Sequence[dict[str, int]]):
    """A sampler of all ranks' samples, as the run had it."""
    from trainstack.data import order  # torch, a second: not paid by who mistyped a name

    sizes = []
    for key in identity["tokens"].split("+"):
        folder = home / "tokens" / key
        try:
            sizes.append(store.TokenStore(folder, identity["data.seq_len"]).train.num_samples)
        except OSError:
            raise ConfigError(
                f"the tokens that the run learned from are not there ({folder}); run: "
                "bash download_data_model.sh, or pass the --home that has them"
            ) from None
    batch, seed = identity["train.global_batch_size"], identity["run.seed"]
    weights = [identity.get("data.weight")]
    weights += [source["weight"] for source in identity.get("data.mixture", ())]
    mixture = order.mixture_of(sizes, weights, seed)
    return order.StepSampler(sum(sizes), batch, 0, 1, seed, left_out=left_out, mixture=mixture)


def compare(lives: Sequence[Life], sampler, last: int) -> Findings:
    """Hold the effective history of steps 1 to ``last`` against what the sampler gives."""
    findings, logged = Findings(last), dict[int, Execution]()
    for life in lives:
        seen = set()
        for execution in life.effective():
            step = execution.step
            if step in seen and step <= last:
                findings.twice[step] = life.attempt
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
    from trainstack.data.order import samples_hash

    batch = sampler.global_batch_size
    steps_per_chunk = max(1, CHUNK_SAMPLES // batch)
    for first in range(0, last, steps_per_chunk):
        steps = np.arange(first, min(last, first + steps_per_chunk))
        ahead = np.zeros_like(steps)  # as in StepSampler.samples_at, for many steps at once
        for window in sampler.left_out:
            ahead += window["steps"] * (steps >= window["after"])
        positions = ((steps + ahead) * batch)[:, None] + np.arange(batch)
        samples = sampler.at(positions.reshape(-1)).reshape(positions.shape)
        yield from (f"{samples_hash(row):013x}" for row in samples)


def result(findings: Findings, sampler, seq_len: int) -> Iterator[tuple[str, str]]:
    """What was checked and how it came out: name and text."""
    batch, total = sampler.global_batch_size, sampler.total_samples
    samples = findings.steps * batch
    text = f"{findings.steps:,} steps = {samples:,} samples = {samples * seq_len:,} tokens"
    yield "checked", f"{text}, {samples / total:.2f} epochs of {total:,} samples"
    repeated, skipped = findings.repeated_steps * batch, findings.skipped_steps * batch
    yield "samples", f"repeated = {repeated:,}, skipped = {skipped:,}"


def remarks(findings: Findings, sampler, lives: Sequence[Life]) -> Iterator[tuple[str, str]]:
    """What is as it should be and yet worth knowing: name and text."""
    batch = sampler.global_batch_size
    executed = sum(len(life.executions) for life in lives)
    kept = [execution.step for life in lives for execution in life.effective()]
    redone = executed - len(kept)
    share = f" ({redone / executed:.1%} of those executed)" if redone else ""
    yield "redone", f"{redone:,} steps on record that interruptions undid{share}"
    ahead = len({step for step in kept if step > findings.steps})
    if ahead:
        yield "not yet", f"{ahead:,} steps beyond step {findings.steps:,} wait for a checkpoint"
    left_out = sum(window["steps"] for window in sampler.left_out)
    if left_out:
        text = f"{left_out:,} steps = {left_out * batch:,} samples, on purpose, by rollbacks"
        yield "left out", text
    skips = [(life, event) for life in lives for event in life.events if event["event"] == "skip"]
    counted = [e for life, e in skips if e["step"] <= min(life.redone_above, findings.steps)]
    if counted:
        text = "steps whose samples were consumed, but whose bad updates were not made"
        yield "no update", f"{text}: {len(counted):,}"


def problems(findings: Findings) -> list[str]:
    """A line for each row of steps where something is wrong, the first ones first."""
    found = [
        (first, f"{name} not on record: the samples count as skipped")
        for first, name in rows(findings.missing)
    ]
    found += [
        (first, f"{name} consumed other samples than due (step {first:,}: {findings.other[first]})")
        for first, name in rows(findings.other)
    ]
    found += [
        (first, f"{name} executed twice within one life ({findings.twice[first]}): repeated")
        for first, name in rows(findings.twice)
    ]
    lines = [text for _, text in sorted(found)]
    more = len(lines) - SHOWN
    return lines[:SHOWN] + [f"and {more:,} more such places"] * (more > 0)


def rows(steps: Iterable[int]) -> Iterator[tuple[int, str]]:
    """The first step and the name of each row of consecutive steps."""
    in_a_row = itertools.groupby(enumerate(sorted(steps)), lambda pair: pair[1] - pair[0])
    for _, pairs in in_a_row:
        row = [step for _, step in pairs]
        yield row[0], f"step {row[0]:,}" if len(row) == 1 else f"steps {row[0]:,} to {row[-1]:,}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
