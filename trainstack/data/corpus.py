"""What a run learns from: the token stores of its data sets as one."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainstack.checkpoint.names import kept_stores
from trainstack.config.schema import Config, DataSection
from trainstack.data.split import Split
from trainstack.data.store import PLAIN, TokenStore, find_stores
from trainstack.errors import ConfigError
from trainstack.units import counted

ADAPTER_AS_SHIPPED = {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear"}
EPOCHS_AS_SHIPPED = 1  # train.num_train_epochs: nothing is lost where it does nothing
WARMUP_AS_SHIPPED = 30  # optim.warmup_steps: likewise


def open_corpus(home: Path, config: Config, checkpoints: Path | None = None) -> "Corpus":
    """The token stores of a configuration. ConfigError if one, or what made it, is not there.

    ``checkpoints``: of the run, which continues with the stores that it has learned from already.
    """
    kept = kept_stores(checkpoints)
    stores, sections = {}, config.data.sources
    try:
        for section, folder in zip(sections, find_stores(home, config, kept), strict=True):
            stores[section.label] = TokenStore(folder, section.seq_len)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.model.name} or the tokens of {' and '.join(s.name for s in sections)} "
            f"are not ready ({error}); run: bash download_data_model.sh, with the same --config "
            "and settings"
        ) from None
    earlier = []
    with contextlib.suppress(OSError, ValueError):  # what they were made from is gone
        fresh = find_stores(home, config, ()) if kept else []
        earlier = [
            label
            for (label, own), new in zip(stores.items(), fresh, strict=False)
            if own.folder != new
        ]
    return Corpus(stores, earlier)


class Corpus:
    """What a run learns from: the token stores of its data sets, by their labels.

    ``train``: their training splits as one, ``sizes`` the samples of each; ``key`` names them all;
    ``is_chat``: a chat template wrote all of them; ``chat_template``: the one that took the place
    of the model's own, if one did; ``ends``: the tokens that end documents, and what the assistant
    says; ``earlier``: the labels of those that rules before made, which a new run would not take.
    """

    def __init__(self, stores: dict[str, TokenStore], earlier: Sequence[str] = ()):
        self.stores, self.earlier = stores, earlier
        self.key = "+".join(store.folder.name for store in stores.values())
        splits = [store.train for store in stores.values()]
        self.train = splits[0] if len(splits) == 1 else Joined(splits)
        self.sizes = [split.num_samples for split in splits]
        metas = [store.meta for store in stores.values()]
        ends = (number for m in metas for number in (m["end_id"], *m.get("stop_ids", ())))
        self.is_chat = all(m.get("template") and m["format"] not in PLAIN for m in metas)
        self.ends = list(dict.fromkeys(ends))
        self.chat_template = next(filter(None, (m.get("chat_template") for m in metas)), None)

    @property
    def is_held_out(self) -> bool:
        """Whether anything is."""
        return any(store.eval.num_samples for store in self.stores.values())

    def shares(self, sections: Sequence[DataSection]) -> list[float]:
        """How much of the sequences each data set gives: by its weight, without one by its size."""
        weights = [s.weight or size for s, size in zip(sections, self.sizes, strict=True)]
        return [weight / (sum(weights) or 1) for weight in weights]


class Joined:
    """Splits of several data sets as one: first the samples of the first, then of the next."""

    def __init__(self, splits: Sequence[Split]):
        self.splits = splits
        sizes = [split.num_samples for split in splits]
        self.firsts = np.cumsum([0, *sizes[:-1]])
        self.num_samples = sum(sizes)
        self.is_full = all(split.is_full for split in splits)
        self.most_documents = max(split.most_documents for split in splits)

    def data_sets_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the data set that each sample is of, int64 [samples]."""
        return np.searchsorted(self.firsts, samples, "right") - 1

    def target_tokens(self, samples: np.ndarray) -> int:
        """How many targets samples have, all together."""
        return sum(split.target_tokens(own) for split, own, _ in self._by_data_set(samples))

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples as Split.read gives them, in the order that is asked for."""
        found = [(split.read(own), is_own) for split, own, is_own in self._by_data_set(samples)]
        kinds, _, seq_len = found[0][0].shape
        batch = np.empty((kinds, len(samples), seq_len), np.int64)
        for own, is_own in found:
            batch[:, is_own] = own
        return batch

    def _by_data_set(self, samples: np.ndarray) -> Iterator[tuple[Split, np.ndarray, np.ndarray]]:
        """Each split with its own samples, and which of all samples they are, bool [samples]."""
        numbers = self.data_sets_of(samples)
        for number in np.unique(numbers):
            is_own = numbers == number
            yield self.splits[number], samples[is_own] - self.firsts[number], is_own


def enough_samples(config: Config, corpus: Corpus) -> int:
    """How many training samples there are. ConfigError if too few, or none of a data set.

    Also if none are held out, and the end of the run was to depend on them.
    """
    for label, store in corpus.stores.items():
        if store.train.num_samples:
            continue
        fix = "use more data, a shorter data.seq_len, or leave it out"
        problem = f"has less than one sequence of {config.data.seq_len} tokens; {fix}"
        if store.counts.dropped_documents:
            problem = "has only documents longer than data.seq_len; set data.too_long=split"
        raise ConfigError(f"data set {label} {problem}")
    samples = corpus.train.num_samples
    if samples < config.train.global_batch_size:
        raise ConfigError(
            f"{' and '.join(corpus.stores)}: {samples} sequences of {config.data.seq_len} tokens,"
            f" less than train.global_batch_size={config.train.global_batch_size}; use more data, "
            "a shorter data.seq_len or a smaller batch"
        )
    if config.eval.patience and not corpus.is_held_out:
        raise ConfigError(
            f"eval.patience={config.eval.patience}: there are no held-out documents; raise "
            "data.eval_fraction, name a data.eval_split, or write eval.patience=null"
        )
    return samples


def epoch_lines(config: Config, corpus: Corpus) -> list[str]:
    """How many steps an epoch is, if a checkpoint or an evaluation waits for its end."""
    intervals = {
        "checkpoint.save_steps": config.checkpoint.save_steps,
        "eval.eval_steps": config.eval.eval_steps,
    }
    keys = " and ".join(key for key, every in intervals.items() if every == "epoch")
    samples = corpus.train.num_samples
    steps, most = config.epoch_steps(samples), config.steps_for(samples)
    if keys and steps > most:
        return [
            f"{keys}=epoch: an epoch is {steps:,} steps, so that is at the end of {most:,} alone"
        ]
    is_saved = config.checkpoint.save_steps == "epoch"
    cost = ", which a kill without warning may cost" if is_saved else ""
    return [f"{keys}=epoch: every {counted(steps, 'step')}{cost}"] if keys else []


def not_used(config: Config, corpus: Corpus) -> list[str]:
    """Settings that have no effect in this run, each with the reason."""
    lines, train = [], config.train
    if train.max_steps is not None and train.num_train_epochs != EPOCHS_AS_SHIPPED:
        reason = "train.max_steps decides unless it is null"
        lines.append(f"train.num_train_epochs is not used: {reason}")
    if config.optim.warmup_ratio is not None and config.optim.warmup_steps != WARMUP_AS_SHIPPED:
        lines.append("optim.warmup_steps is not used: optim.warmup_ratio decides unless it is null")
    for key, value in ADAPTER_AS_SHIPPED.items():
        if not config.adapter.type and getattr(config.adapter, key) != value:
            lines.append(f"adapter.{key} is not used: adapter.type is null")
    if not corpus.is_held_out:
        lines.append("no held-out documents: there will be no evaluation")
    if config.eval.patience and not config.eval.keep_best:
        lines.append("eval.keep_best is false: the best checkpoint may be gone when patience ends")
    if config.eval.keep_best and (config.eval.eval_steps is None or not corpus.is_held_out):
        reason = "of several evaluations one is the best, and there is one at most"
        lines.append(f"eval.keep_best is not used: {reason}")
    if config.guard.on_divergence != "stop" and train.precision == "fp16":
        lines.append("guard.spike_sigma is not used: fp16 leaves skipping to its scaler")
    if config.checkpoint.failure_hours and config.checkpoint.save_steps != "auto":
        lines.append("checkpoint.failure_hours is not used: save_steps is not auto")
    return lines
