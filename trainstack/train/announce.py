"""What is said before the first step: every number that decides the run."""

import logging
from pathlib import Path

import torch

from trainstack.adapter.lora import count_saved
from trainstack.checkpoint.state import read_state
from trainstack.data.corpus import epoch_lines, not_used
from trainstack.data.feed import Feed
from trainstack.model.causal_lm import count_parameters
from trainstack.model.strategy import Strategy
from trainstack.run.identity import changed_settings
from trainstack.train.attempt import Attempt
from trainstack.units import counted

log = logging.getLogger("trainstack")


def announce_loading(attempt: Attempt) -> None:
    """A line before the model is found and built or read, and how long that took last time."""
    if attempt.world.is_main:
        log.info("loading the model%s", attempt.run.last_time("start", "loaded"))


def announce(attempt: Attempt, feed: Feed, strategy: Strategy, newest: Path | None) -> None:
    """Say what is about to happen, and from which checkpoint; rank 0 only."""
    if not attempt.world.is_main:
        return
    config, plan, world = attempt.config, attempt.plan, attempt.world
    name, indent = config.run.name, " " * len(config.run.name)
    hosts = world.world_size // world.local_world_size
    log.info(
        "%s  %s | %s x %d processes, %s, %s | seq_len %d",
        name, describe(strategy.causal_lm, config.model.init),
        counted(hosts, "host"), world.local_world_size, world.backend.rpartition(":")[2],
        config.train.precision, plan.seq_len,
    )  # fmt: skip
    is_older = world.device.type == "cpu" or torch.cuda.get_device_capability(world.device)[0] < 8
    if config.train.precision == "tf32" and is_older:
        log.info("%s  tf32 is what GPUs since 2020 know; here it is fp32", indent)
    epochs = attempt.max_steps * plan.global_batch_size / attempt.samples
    log.info("%s  %s", indent, plan)
    log.info("%s  %s = %.2f epochs", indent, counted(attempt.max_steps, "step"), epochs)
    if len(config.data.sources) > 1:
        announce_mixture(attempt, feed, indent)
    for line in (*epoch_lines(config, feed.corpus), *not_used(config, feed.corpus)):
        log.info("%s  %s", indent, line)
    for window in feed.sampler.left_out:
        log.info("%s  %s steps of data after step %s are left out, since a rollback", indent,
                 f"{window['steps']:,}", f"{window['after']:,}")  # fmt: skip
    if newest:
        announce_resume(attempt, newest)


def announce_mixture(attempt: Attempt, feed: Feed, indent: str) -> None:
    """Of each data set of a mixture, how much of what is learned comes from it."""
    sections, sizes = attempt.config.data.sources, feed.corpus.sizes
    drawn = attempt.max_steps * attempt.plan.global_batch_size
    for section, size, share in zip(sections, sizes, feed.corpus.shares(sections), strict=True):
        is_held = feed.corpus.stores[section.label].eval.num_samples
        log.info("%s  %5.1f%% from %s: %s samples, %.2f epochs of it%s", indent, 100 * share,
                 section.label, f"{size:,}", share * drawn / size,
                 "" if is_held else "; none of it is held out")  # fmt: skip


def announce_resume(attempt: Attempt, newest: Path) -> None:
    """From where, and what changed since: in the log and in the run's history."""
    log.info("resume  attempt %d from %s: the same samples follow, none repeated, none skipped",
             attempt.owner.attempt, newest.name)  # fmt: skip
    saved = read_state(newest)
    changes = changed_settings(saved.settings, attempt.config.model_dump())
    if saved.world_size != attempt.world.world_size:
        changes.append(f"processes: {saved.world_size} -> {attempt.world.world_size}")
    for change in changes:
        log.info("resume  %s", change)
    attempt.run.add_event("resume", step=saved.step, checkpoint=newest.name, changes=changes)


def describe(causal_lm: torch.nn.Module, init: str) -> str:
    """For people: architecture, size, where its weights came from."""
    name = type(causal_lm).__name__.removesuffix("ForCausalLM")
    origin = "from scratch" if init == "scratch" else "pretrained"
    learned, whole = count_saved(causal_lm), count_parameters(causal_lm)
    if learned < whole:
        origin += f" and frozen but for LoRA of {learned / 1e6:.1f}M"
    return f"{name} {whole / 1e6:.1f}M {origin}"
