"""Memory of the host that a rank's share of a checkpoint is copied to, made once."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trainstack.checkpoint.snapshot import Share

log = logging.getLogger("trainstack")
ALIGNED = 64  # bytes; each tensor begins at a multiple


class HostMemory:
    """One block, in which each tensor has its place; for a GPU it is pinned, if that succeeds.

    Pinned, a GPU copies to it while it computes. That is made at 1 to 3 GB a second, so ``reserve``
    begins it in a thread; and not by torch's own allocator, which takes a power of two.
    """

    def __init__(self, device: torch.device):
        self.device, self.is_pinned = device, device.type == "cuda"
        self._making: Future | None = None

    def reserve(self, share: Share) -> None:
        """Begin to make it, unless that was done."""
        if self._making is None:
            size = sum(room(tensor) for _, tensor in share.tensors())
            threads = ThreadPoolExecutor(1)
            self._making = threads.submit(self._make, size)
            threads.shutdown(wait=False)

    def places(self, share: Share) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each tensor of the share, by its name, and its place.

        RuntimeError if the host has no such memory; the next call tries again.
        """
        self.reserve(share)
        try:
            block, start = self._making.result(), 0
        except RuntimeError:
            self._making = None
            raise
        for name, tensor in share.tensors():
            own = block[start : start + tensor.nbytes]
            yield name, tensor, own.view(tensor.dtype).view(tensor.shape)
            start += room(tensor)

    def _make(self, size: int) -> torch.Tensor:
        block = torch.empty(size, dtype=torch.uint8)
        if self.is_pinned and size:
            torch.cuda.set_device(self.device)  # a new thread begins on GPU 0
            cuda = torch.cuda.cudart()
            code = cuda.cudaHostRegister(block.data_ptr(), size, 0)
            if code != cuda.cudaError.success:
                log.warning("save    %.1f GB of memory could not be pinned (%s): training waits "
                            "longer for a save", size / 1e9, code)  # fmt: skip
        return block


def room(tensor: torch.Tensor) -> int:
    """Bytes up to where the next tensor begins."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED
