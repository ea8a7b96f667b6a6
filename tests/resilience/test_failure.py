"""What a rank says of its own failure."""

import pytest
import torch

from trainstack.resilience.failure import memory_cause


class AcceleratorError(RuntimeError):
    """In the place of torch's, which a build without CUDA does not raise."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL Error 1: ncclUnhandledCudaError\nCuda failure 2 'out of memory'"),
    ],
)
def test_a_gpu_without_memory_is_told_in_the_same_words_whoever_says_it(error):
    assert memory_cause(error).startswith("out of GPU memory: ")
    assert memory_cause(error).endswith(
        "; lower train.micro_batch_size, or set train.activation_checkpointing=true"
    )
    try:
        try:
            raise error
        except RuntimeError:
            raise ValueError("backend='inductor' raised") from None
    except ValueError as outer:
        assert memory_cause(outer) == memory_cause(error), "a compiler meets it too"


def test_a_host_without_memory_is_told_and_other_errors_are_not_taken_for_that():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert memory_cause(error.value).startswith("out of memory: ")
    assert memory_cause(ValueError("shapes do not fit")) == ""
