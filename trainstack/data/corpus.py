"""What a run learns from: the token stores of its data sets as one."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from trainstack.config.schema import Config
from trainstack.data.split import Split
from trainstack.data.store import TokenStore, store_folder
from trainstack.errors import ConfigError


def open_corpus(home: Path, config: Config) -> "Corpus":
    """What a configuration learns from. ConfigError where a part, or its origin, is not there."""
    stores = {}
    for section in config.data.sources:
        try:
            folder = store_folder(home, config.model.name, section)
            stores[section.label] = TokenStore(folder, section.seq_len)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {config.model.name} or the tokens of {section.name} are not ready "
                f"({error}); run: bash download_data_model.sh"
            ) from None
    return Corpus(stores)


def corpus_key(folders: Iterable[Path]) -> str:
    """The name of what the stores in some folders make together."""
    return "+".join(folder.name for folder in folders)


class Corpus:
    """What a run learns from: the token stores of its data sets, by their labels."""

    def __init__(self, stores: dict[str, TokenStore]):
        self.stores = stores
        self.key = corpus_key(store.folder for store in stores.values())
        self.train = joined([store.train for store in stores.values()])
        self.sizes = [store.train.num_samples for store in stores.values()]


class Joined:
    """Splits of several stores as one: first the samples of the first, then those of the next."""

    def __init__(self, splits: Sequence[Split]):
        self.splits = splits
        sizes = [split.num_samples for split in splits]
        self.firsts = np.cumsum([0, *sizes[:-1]])
        self.num_samples = sum(sizes)
        self.is_full = all(split.is_full for split in splits)

    def sources_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the split that each sample is of."""
        return np.searchsorted(self.firsts, samples, "right") - 1

    def target_tokens(self, samples: np.ndarray) -> int:
        """How many targets samples have, all together."""
        return sum(split.target_tokens(own) for split, own, _ in self._by_split(samples))

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples as Split.read gives them, in the order that is asked for."""
        read = [(split.read(own), here) for split, own, here in self._by_split(samples)]
        parts = np.empty((len(read[0][0]), len(samples), read[0][0].shape[2]), np.int64)
        for found, here in read:
            parts[:, here] = found
        return parts

    def _by_split(self, samples: np.ndarray):
        """Each split with its own samples, and where they stand among all."""
        sources = self.sources_of(samples)
        for number in np.unique(sources):
            here = sources == number
            yield self.splits[number], samples[here] - self.firsts[number], here


def joined(splits: list[Split]) -> Split | Joined:
    """One split as it is, several as one."""
    return splits[0] if len(splits) == 1 else Joined(splits)


def enough_samples(config: Config, corpus: Corpus) -> int:
    """The samples of the training split; ConfigError where they do not fill one global batch."""
    for label, size in zip(corpus.stores, corpus.sizes, strict=True):
        if not size:
            raise ConfigError(
                f"data set {label} has less than one sequence of {config.data.seq_len} tokens; use "
                "more data, a shorter data.seq_len, or leave it out"
            )
    samples = corpus.train.num_samples
    if samples < config.train.global_batch_size:
        raise ConfigError(
            f"{' and '.join(corpus.stores)}: {samples} sequences of {config.data.seq_len} tokens,"
            f" less than train.global_batch_size={config.train.global_batch_size}; use more data, "
            "a shorter data.seq_len or a smaller batch"
        )
    return samples
