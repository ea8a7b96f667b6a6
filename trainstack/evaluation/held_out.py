"""The loss on held-out data."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from trainstack.config.batch import IGNORED_LABEL
from trainstack.data.feed import Batch, Feed
from trainstack.distributed import World, any_rank


class Evaluation(NamedTuple):
    """What held-out samples of a data set gave."""

    loss: float  # mean over targets, in nats
    targets: int
    bytes: float | None  # of text that they are, as all held-out text has; None: not known


def overall(parts: Iterable[Evaluation]) -> tuple[float, int]:
    """The mean loss over the targets of all data sets, and how many these are."""
    parts = list(parts)
    targets = sum(part.targets for part in parts)
    return sum(part.loss * part.targets for part in parts) / max(1, targets), targets


def bits_per_byte(parts: Iterable[Evaluation]) -> float | None:
    """The information of the text under the model, which compares across tokenizers; None: unknown.

    See Gao et al., "The Pile" (arXiv 2101.00027), section 3.1.
    """
    parts = list(parts)
    if any(part.bytes is None for part in parts):
        return None
    nats = sum(part.loss * part.targets for part in parts)
    return nats / math.log(2) / max(1, sum(part.bytes for part in parts))


def evaluate_all(
    feed: Feed, most: int | None, loss_model: nn.Module, wants_stop: Callable[[], bool]
) -> dict[str, Evaluation] | None:
    """Each data set that has held-out samples, by its label; None if cut short.

    ``most``: samples that are used of each; None: all. Collective: every rank must call this.
    """
    results = {}
    for label, store in feed.corpus.stores.items():
        if store.eval.num_samples:
            batches, rounds = feed.held_out(label, most)
            found = evaluate(loss_model, batches, rounds, feed.world, wants_stop)
            if found is None:
                return None
            loss, targets = found
            # In rows of whole documents, the first token of each is no target.
            size = store.counts.eval_bytes if store.eval.rows is None else 0
            share = size / max(1, store.counts.eval_target_tokens)
            results[label] = Evaluation(loss, targets, share * targets or None)
    return results


@torch.no_grad()
def evaluate(
    loss_model: nn.Module,
    batches: Iterable[Batch],
    rounds: int,
    world: World,
    wants_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss in nats over all held-out target tokens, and their number; None if cut short.

    ``batches`` are this rank's; ranks may have different numbers of them, none more than
    ``rounds``. ``wants_stop`` is asked in every round; if any rank's is true, all end there.
    Collective: every rank must call this.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches, is_cut, before = iter(batches), False, changes_of(loss_model)
    loss_model.eval()
    try:
        for _ in range(rounds):
            if is_cut := any_rank(wants_stop(), world):
                break
            for batch in itertools.islice(batches, 1):
                sums[0] += loss_model(*batch)
                sums[1] += (batch[1] != IGNORED_LABEL).sum()
    finally:
        loss_model.train()
    if changes_of(loss_model) != before:  # RWKV scales its weights, and back when it is trained
        loss_model(*batch)
    if is_cut:
        return None
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    return loss / max(1, tokens), int(tokens)


def changes_of(loss_model: nn.Module) -> int:
    """How often its weights were changed in place."""
    return sum(parameter._version for parameter in loss_model.parameters())
