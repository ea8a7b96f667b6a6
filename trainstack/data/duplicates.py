"""Documents that are there more than once: in the training split, or held out too."""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from trainstack.data.split import Split

HASH_BYTES = 8  # two of a million documents are taken for one once in 40 million data sets


def duplicates(split: Split) -> int:
    """How many documents are copies of an earlier one; 8 bytes of memory each."""
    hashes = np.fromiter(map(hash_of, documents_of(split)), np.uint64, len(split.stops))
    return len(hashes) - len(np.unique(hashes))


def shared_documents(train: Split, held_out: Split) -> int:
    """How many held-out documents are in the training split too, token for token."""
    counts = Counter(map(hash_of, documents_of(held_out)))
    both = {found for found in map(hash_of, documents_of(train)) if found in counts}
    return sum(counts[found] for found in both)


def documents_of(split: Split) -> Iterator[np.ndarray]:
    """The token ids of each document, in the store's dtype."""
    start = 0
    for stop in split.stops:
        yield split.ids[start:stop]
        start = stop


def hash_of(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=HASH_BYTES).digest())
