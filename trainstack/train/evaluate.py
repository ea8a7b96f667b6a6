"""The loss on held-out data, and a sample of what the model says."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.schema import EvalSection
from trainstack.data.feed import Batch, Feed
from trainstack.distributed import World, any_rank
from trainstack.errors import ConfigError
from trainstack.model.trial import positions_of


class Evaluation(NamedTuple):
    """What held-out samples of a data set gave."""

    loss: float  # mean over targets, in nats
    targets: int
    bytes: float | None  # of text that they are, as all held-out text has; None: not known


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


DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 50}
ANSWERED = {"do_sample": False}


@torch.no_grad()
def answer(
    causal_lm: nn.Module,
    tokenizer,
    section: EvalSection,
    is_chat: bool,
    ends: list[int],
    seed: int,
    seq_len: int,
) -> tuple[str, str]:
    """What the model says to eval.sample_prompt, and how that ended, for people.

    ``is_chat``: the prompt is a question, and the answer the most likely one, as a person would get
    it; else it is the beginning of a text, which is continued at random, with a fixed seed.
    ``ends``: tokens at which it stops. No longer than the model has positions, or ``seq_len``.
    """
    causal_lm.eval()
    torch.manual_seed(seed)
    ids = prompt_of(tokenizer, section.sample_prompt, is_chat)
    most, positions = section.sample_tokens, max(positions_of(causal_lm), seq_len)
    if positions_of(causal_lm):
        most = min(most, positions - len(ids))
    if most < 1:
        raise ConfigError(
            f"eval.sample_prompt has {len(ids):,} of the {positions:,} tokens that the model can "
            "read; shorten it"
        )
    inputs = torch.tensor([ids], device=next(causal_lm.parameters()).device)
    output = causal_lm.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most, eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id, tokenizer=tokenizer,
        return_dict_in_generate=False,  # its own settings may ask for them
        **(ANSWERED if is_chat else DRAWN),
    )  # fmt: skip
    causal_lm.train()
    said = output[0, len(ids) :].tolist()
    text = tokenizer.decode(said if is_chat else [*ids, *said], skip_special_tokens=True)
    end = "was cut, and did not stop"
    if said[-1] in ends or len(said) < most:
        end = f"stopped by itself, after {len(said)} tokens"
    elif most < section.sample_tokens:
        end = f"was cut after {most} tokens: with the prompt they are the {positions:,} it can read"
    return text, f"{end} (eval.sample_tokens={section.sample_tokens})"


def prompt_of(tokenizer, text: str, is_chat: bool) -> list[int]:
    """A question, or the beginning of a text, as tokens."""
    if is_chat:
        question = [{"role": "user", "content": text}]
        asked = {"add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template(question, **asked)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # another text would follow
