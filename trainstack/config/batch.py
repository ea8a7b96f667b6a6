"""The arithmetic of the batch: sequences over processes and micro steps."""

from dataclasses import dataclass

from trainstack.errors import ConfigError

IGNORED_LABEL = -100  # "no loss here", for data and model alike; torch's and transformers' value


@dataclass(frozen=True)
class BatchPlan:
    """How a step of ``global_batch_size`` sequences is spread over processes and micro steps.

    Batch sizes count sequences of ``seq_len`` tokens. ConfigError if they cannot be spread evenly.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    seq_len: int

    def __post_init__(self):
        if self.world_size < 1:
            raise ConfigError(f"{self.world_size} processes cannot train; ask for at least 1")
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise ConfigError(
                batch_problem(self.global_batch_size, self.micro_batch_size, self.world_size)
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} sequences = {self.world_size} processes"
            f" x {self.micro_batch_size} x {self.gradient_accumulation_steps} micro steps"
            f" = {self.tokens_per_step:,} tokens per step"
        )


def batch_problem(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    """The sentence that explains an uneven split and offers the nearest even ones."""
    unit = micro_batch_size * world_size
    below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
    nearest = " or ".join(str(size) for size in (below, above) if size)
    distances = range(micro_batch_size if global_batch_size % world_size == 0 else 0)
    sizes = (size for d in distances for size in (micro_batch_size - d, micro_batch_size + d))
    micro = next((size for size in sizes if global_batch_size % (size * world_size) == 0), None)
    other = f", or train.micro_batch_size={micro}" if micro else ""
    # Not all: a batch may be of any size.
    counts = (range(world_size - 1, 0, -1), range(world_size + 1, 8 * world_size + 1))
    fitting = (
        (n for n in row if global_batch_size % (micro_batch_size * n) == 0) for row in counts
    )
    near = [n for n in (next(row, None) for row in fitting) if n]
    processes = "process" if near == [1] else "processes"
    other += f", or take {' or '.join(map(str, near))} {processes}" if near else ""
    return (
        f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size="
        f"{micro_batch_size} x {world_size} processes; write train.global_batch_size={nearest}"
        f"{other}"
    )
