"""What is said before the first step: every number that decides the run."""

from trainstack.checkpoint import names
from trainstack.model.causal_lm import describe
from trainstack.run.identity import changed_settings
from trainstack.train.startup import log
from trainstack.train.state import Parts, Resumed


def announce(parts: Parts, resumed: Resumed) -> None:
    """Say what is about to happen, with every number that decides it; rank 0 only."""
    if not parts.world.is_main:
        return
    config, plan, world = parts.config, parts.plan, parts.world
    name, indent = config.run.name, " " * len(config.run.name)
    hosts = world.world_size // world.local_world_size
    log.info(
        "%s  %s | %d host%s x %d processes, %s, %s | seq_len %d",
        name, describe(parts.causal_lm, config.model.init), hosts, "s"[: hosts != 1],
        world.local_world_size, world.backend, config.train.precision, plan.seq_len,
    )  # fmt: skip
    epochs = parts.max_steps * plan.global_batch_size / parts.sampler.total_samples
    log.info("%s  %s", indent, plan)
    log.info("%s  %s steps = %.2f epochs", indent, f"{parts.max_steps:,}", epochs)
    if config.train.max_steps is not None:
        log.info("%s  train.num_train_epochs is not used: max_steps decides", indent)
    announce_mixture(parts)
    if not any(store.eval.num_samples for store in parts.corpus.stores.values()):
        log.info("%s  no held-out documents: there will be no evaluation", indent)
    if config.guard.on_divergence != "stop" and config.train.precision == "fp16":
        log.info("%s  guard.spike_sigma is not used: fp16 leaves skipping to its scaler", indent)
    if config.checkpoint.failure_hours and config.checkpoint.save_steps != "auto":
        log.info("%s  checkpoint.failure_hours is not used: save_steps is a number", indent)
    for window in parts.sampler.left_out:
        log.info("%s  %s steps of data after step %s are left out, since a rollback", indent,
                 f"{window['steps']:,}", f"{window['after']:,}")  # fmt: skip
    if resumed.checkpoint:
        announce_resume(parts, resumed)


def announce_mixture(parts: Parts) -> None:
    """Of each data set of a mixture, how much of what is learned comes from it."""
    sections, sizes = parts.config.data.sources, parts.corpus.sizes
    indent = " " * len(parts.config.run.name)
    if len(sections) == 1:
        return
    drawn = parts.max_steps * parts.plan.global_batch_size
    weights = [section.weight or size for section, size in zip(sections, sizes, strict=True)]
    for section, size, weight in zip(sections, sizes, weights, strict=True):
        share = weight / sum(weights)
        is_held = parts.corpus.stores[section.label].eval.num_samples
        log.info("%s  %5.1f%% from %s: %s samples, %.2f epochs of it%s", indent, 100 * share,
                 section.label, f"{size:,}", share * drawn / size,
                 "" if is_held else "; none of it is held out")  # fmt: skip


def announce_resume(parts: Parts, resumed: Resumed) -> None:
    newest = resumed.checkpoint
    log.info(
        "resume  attempt %d from %s: the same samples follow, none repeated, none skipped",
        parts.owner.attempt, newest.name,
    )  # fmt: skip
    saved = names.read_state(newest)
    changes = changed_settings(saved["settings"], parts.config.model_dump())
    if saved["world_size"] != parts.world.world_size:
        changes.append(f"processes: {saved['world_size']} -> {parts.world.world_size}")
    for change in changes:
        log.info("resume  %s", change)
    parts.run.add_event("resume", step=resumed.step, checkpoint=newest.name, changes=changes)
