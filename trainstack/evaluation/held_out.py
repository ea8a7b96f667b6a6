"""The loss on held-out data: the same to the last digit at any number of processes."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.schema import Config
from trainstack.data.corpus import Corpus
from trainstack.data.feed import Batch, held_out_batches
from trainstack.distributed import World, any_rank
from trainstack.model.loss import CausalLMLoss
from trainstack.model.trial import TOKENS, some_tokens
from trainstack.units import rounded


class Evaluation(NamedTuple):
    """What held-out samples gave."""

    loss: float  # mean over targets, in nats
    targets: int
    bytes: float | None  # of text that they are, as all held-out text has; None: not known
    hits: int  # targets to which the model gave the largest logit

    @property
    def perplexity(self) -> float:
        """e to the loss, kept finite."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float | None:
        """The text's information under the model, which compares across tokenizers; None: unknown.

        See Gao et al., "The Pile" (arXiv 2101.00027), section 3.1.
        """
        if self.bytes is None:
            return None
        return self.loss * self.targets / math.log(2) / max(1, self.bytes)

    @property
    def token_accuracy(self) -> float:
        """The share of hits, from 0 to 1."""
        return self.hits / max(1, self.targets)

    def record(self) -> dict[str, float]:
        """What is known, by the names of metrics.jsonl."""
        names = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
        values = {f"eval_{name}": getattr(self, name) for name in names}
        known = {name: value for name, value in values.items() if value is not None}
        return known | {"eval_tokens": self.targets}

    def __str__(self) -> str:
        bits = f"   {self.bits_per_byte:.4f} bits per byte" if self.bytes else ""
        measured = f"loss {self.loss:.4f}   perplexity {rounded(self.perplexity)}"
        accuracy = f"token accuracy {self.token_accuracy:.1%}"
        return f"{measured}   {accuracy}{bits}   ({self.targets:,} held-out tokens)"


def overall(results: Iterable[Evaluation]) -> Evaluation:
    """Several data sets as one: each target counts alike."""
    results = list(results)
    targets = sum(part.targets for part in results)
    loss = sum(part.loss * part.targets for part in results) / max(1, targets)
    sizes = [part.bytes for part in results]
    size = None if None in sizes else sum(sizes)
    return Evaluation(loss, targets, size, sum(part.hits for part in results))


def evaluate_all(
    corpus: Corpus,
    config: Config,
    loss_model: CausalLMLoss,
    world: World,
    wants_stop: Callable[[], bool],
) -> dict[str, Evaluation] | None:
    """Each data set that has held-out samples, by its label; None if cut short.

    Of each, ``eval.eval_samples`` are used. Collective: every rank must call this.
    """
    # Of the configuration, not of this world: which samples share a batch may change last digits.
    size = min(config.train.micro_batch_size, config.train.global_batch_size)
    results = {}
    for label, store in corpus.stores.items():
        if store.eval.num_samples:
            batches, rounds = held_out_batches(store.eval, config.eval.eval_samples, size, world)
            found = evaluate(loss_model, batches, rounds, world, wants_stop)
            if found is None:
                return None
            # In rows of whole documents, the first token of each is no target.
            size_of_text = store.counts.eval_bytes if store.eval.rows is None else 0
            share = size_of_text / max(1, store.counts.eval_target_tokens)
            results[label] = found._replace(bytes=share * found.targets or None)
    return results


@torch.no_grad()
def evaluate(
    loss_model: CausalLMLoss,
    batches: Iterable[Batch],
    rounds: int,
    world: World,
    wants_stop: Callable[[], bool],
) -> Evaluation | None:
    """Over all held-out target tokens, whose bytes are not known here; None if cut short.

    ``batches`` are this rank's; ranks may have different numbers of them, none more than
    ``rounds``. ``wants_stop`` is asked in every round; if any rank's is true, all end there.
    Collective: every rank must call this.
    """
    # A column for each batch of any rank: zeros of others change no digit of a sum.
    found = torch.zeros(3, rounds, world.world_size, dtype=torch.float64, device=world.device)
    batches = iter(batches)
    with as_used(loss_model):
        for number in range(rounds):
            if any_rank(wants_stop(), world):
                return None
            for batch in itertools.islice(batches, 1):
                own = found[:, number, world.rank]
                loss_model.count(True)
                own[0] = loss_model(*batch)
                own[1] = (batch[1] != IGNORED_LABEL).sum()
                own[2] = loss_model.hits
    dist.all_reduce(found)
    losses, targets, hits = (math.fsum(row) for row in found.flatten(1).tolist())  # in any order
    return Evaluation(losses / max(1, targets), int(targets), None, int(hits))


@contextlib.contextmanager
def as_used(loss_model: CausalLMLoss) -> Iterator[None]:
    """Within it the model is as it is used, without dropout; then it is as it is trained again."""
    before = changes_of(loss_model)
    loss_model.eval()
    try:
        yield
    finally:
        loss_model.count(False)
        loss_model.train()
        if changes_of(loss_model) != before:  # RWKV scales its weights, and back when it is trained
            tokens = some_tokens(loss_model.causal_lm, TOKENS)
            loss_model(tokens, tokens)


def changes_of(loss_model: CausalLMLoss) -> int:
    """How often its weights were changed in place."""
    return sum(parameter._version for parameter in loss_model.parameters())
