"""What a machine can do: GPUs as their makers say it, by the names that they go by.

Peak rates without sparsity, memory, its bandwidth, and the link to the other GPUs of a node in one
direction: those of the data sheets at nvidia.com and amd.com under the names of the products. They
were written down from memory, not read there again.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from trainstack.errors import ConfigError

PART = re.compile(r"\dg\.?\d+gb|mig")  # a slice of a GPU


@dataclass(frozen=True)
class Gpu:
    """TFLOP/s of matrix products, GB, GB/s. A GPU has GiB: the 7% more are left for gaps."""

    name: str
    half: float  # bf16 or fp16
    single: float  # fp32, without TF32, as torch computes it if it is not told otherwise
    memory: float
    bandwidth: float
    link: float
    pattern: str  # of its name in small letters and digits alone
    has_bf16: bool = True

    def flops(self, precision: str) -> float:
        """FLOP/s at most in a precision of train.precision."""
        if precision == "fp16" or (precision == "bf16" and self.has_bf16):
            return 1e12 * self.half
        has_tf32 = precision == "tf32" and self.has_bf16  # both since the A100, at half the rate
        return 1e12 * (self.half / 2 if has_tf32 else self.single)


GPUS = (  # the first whose pattern is in the name
    Gpu("GH200", 989, 67, 96, 4000, 450, "gh200"),
    Gpu("B200", 2250, 75, 180, 7700, 900, "b200"),
    Gpu("H200", 989, 67, 141, 4800, 450, "h200"),
    Gpu("H100 PCIe", 756, 51, 80, 2000, 64, "h100.*pcie"),
    Gpu("H100", 989, 67, 80, 3350, 450, "h100"),
    Gpu("A100 80GB", 312, 19.5, 80, 2039, 300, "a100.*80"),
    Gpu("A100", 312, 19.5, 40, 1555, 300, "a100"),
    Gpu("A10", 125, 31.2, 24, 600, 32, r"a10g?(?!\d)"),
    Gpu("A40", 150, 37.4, 48, 696, 32, r"a40(?!\d)"),
    Gpu("L40S", 362, 91.6, 48, 864, 32, "l40s"),
    Gpu("L4", 121, 30.3, 24, 300, 32, r"l4(?!\d)"),
    Gpu("V100 32GB", 125, 15.7, 32, 900, 150, "v100.*32", has_bf16=False),
    Gpu("V100", 125, 15.7, 16, 900, 150, "v100", has_bf16=False),
    Gpu("RTX 4090", 165, 82.6, 24, 1008, 32, "4090"),
    Gpu("RTX 3090", 71, 35.6, 24, 936, 32, "3090"),
    Gpu("MI300X", 1307, 163, 192, 5300, 448, "mi300x"),
)


def find_gpu(name: str) -> Gpu | None:
    """By what torch or nvidia-smi calls it, or a site's GRES; None if it is not known."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if PART.search(name.lower()):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, plain)), None)


def named_gpu(name: str) -> Gpu:
    """The same; ConfigError if it is not known."""
    found = find_gpu(name)
    if found is None:
        known = [gpu.name for gpu in GPUS]
        near = difflib.get_close_matches(name.upper(), known, 1)
        fix = f"did you mean {near[0]}?" if near else f"write one of {', '.join(known)}"
        raise ConfigError(f"--gpu={name} is no GPU that is known here; {fix}")
    return found


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The processor of this machine by its maker's name, and its number of cores."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"(?m)^(model name|Hardware|CPU part)\s*:\s*(.*)$", text)
    return f"{model[2] if model else os.uname().machine}, {cores()} cores"


def memory_here() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
