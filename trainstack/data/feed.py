"""The batches of a step."""

from collections.abc import Callable, Iterator

import numpy as np
import torch


def micro_batches(
    samples: np.ndarray,
    micro_batch_size: int,
    read: Callable[[np.ndarray], np.ndarray],
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batch of each micro step, all int64 [micro_batch_size, seq_len].

    ``read`` gives its parts for some samples as one array: inputs, labels (shifted by one already)
    and, where documents do not see each other, positions.
    """
    for start in range(0, len(samples), micro_batch_size):
        parts = torch.from_numpy(read(samples[start : start + micro_batch_size]))
        if device.type == "cuda":  # what shares memory cannot be pinned
            parts = parts.contiguous().pin_memory().to(device, non_blocking=True)
        yield parts.unbind()
