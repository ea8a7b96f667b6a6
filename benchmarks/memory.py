"""Peak memory of preparation and of a rank's data path, from 10 MB of text to 1 GB.

The text is Python's own sources, repeated. Of preparation the largest of its processes counts; a
rank is a process that reads every sample of an epoch once, in the order of a run. Python and its
libraries are included.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.prepare import demo
from trainstack.storage import files, layout, manifest

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, BATCH = 1024, 32
SIZES = {"concat": (10, 100, 1000), "best_fit": (10, 100)}  # MB
MOST_GROWTH = 0.10


def main() -> int:
    if len(sys.argv) > 1:
        print({"preparation": preparation, "rank": rank}[sys.argv[1]](*sys.argv[2:]))
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAINSTACK_HOME")) as name:
        demo.make_model(Path(name))
        for packing, sizes in SIZES.items():
            peaks = [measure(Path(name), packing, size) for size in sizes]
            worst = max(worst, *(growth(column) for column in zip(*peaks, strict=True)))
    print(f"memory: target {MOST_GROWTH:.0%} more at most, measured {worst:.1%}, "
          f"{'holds' if worst <= MOST_GROWTH else 'falls short'}")  # fmt: skip
    return int(worst > MOST_GROWTH)


def growth(peaks: tuple[float, ...]) -> float:
    return max(peaks) / peaks[0] - 1


def measure(home: Path, packing: str, size: int) -> list[float]:
    """Peak MB of preparation, and of a rank; each in a process of its own."""
    folder = layout.dataset_folder(home, f"text{size}", None)
    if not folder.exists():
        make_dataset(folder, size)
    found = []
    for what in ("preparation", "rank"):
        command = [sys.executable, __file__, what, home, f"data.packing={packing}", folder.name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(float(done.stdout))
    print(f"{size:5} MB, {packing}: preparation {found[0]:.1f} MB, a rank {found[1]:.1f} MB")
    return found


def make_dataset(folder: Path, megabytes: int) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    with files.HashedFile(temporary / "train.jsonl") as file:
        for turn in itertools.count():
            for _, text in demo.sources():
                file.write(json.dumps({"text": f"# {turn}\n{text}"}).encode() + b"\n")
                if file.size >= megabytes * 1e6:
                    break
            if file.size >= megabytes * 1e6:
                break
    entries = {"train.jsonl": file.entry()}
    manifest.publish_folder(
        temporary, folder, entries, kind="dataset", source="made", revision=None
    )


def settings(packing: str, name: str) -> Config:
    return load(ROOT / "config.yaml", [packing, f"data.name={name}", f"data.seq_len={SEQ_LEN}"])


def preparation(home: str, packing: str, name: str) -> float:
    from trainstack.prepare import prepare

    prepare.prepare(Path(home), settings(packing, name), force=False)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return max(peak(), workers)


def rank(home: str, packing: str, name: str) -> float:
    import torch

    from trainstack.data import corpus, feed

    split = corpus.open_corpus(Path(home), settings(packing, name)).train
    sampler = feed.StepSampler(split.num_samples, BATCH, 0, 1, seed=1)
    device = torch.device("cpu")
    for step in range(split.num_samples // BATCH):
        samples = sampler.samples_at(step)
        for batch in feed.micro_batches(samples, BATCH, split, device):
            assert len(batch[0]) == BATCH
        split.target_tokens(samples)
    return peak()


def peak() -> float:
    """Of this process alone, in MB: getrusage would count the process that started it."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
