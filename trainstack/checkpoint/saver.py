"""Checkpoints that are whole or not there: written sharded over ranks, verified before use.

``checkpoint-<step>/`` loads with from_pretrained; training/ beside it holds the optimizer shards
and state.json. No pickle is written or read. Which rank writes what depends on the world size,
what is read does not.
"""

import contextlib
import datetime
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from trainstack.checkpoint.tensorfile import write_safetensors
from trainstack.distributed import World, from_main, gather
from trainstack.errors import ConfigError, Refused
from trainstack.storage import files
from trainstack.storage.layout import STATE, checkpoints

log = logging.getLogger("trainstack")
WEIGHTS = "model.safetensors"
SAVE_TIMEOUT = datetime.timedelta(hours=2)  # a peer may write that long, to a slow file system
WRITER_NICENESS = 10
REST = 9  # times the work on a chunk, where training needs the same cores: a tenth of one is taken
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


class SaveError(Exception):
    """A checkpoint could not be written; the earlier ones are untouched."""


@dataclass
class Snapshot:
    """What a checkpoint holds: tensors may be on any device, ``small_files`` are bytes by name."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    small_files: dict[str, bytes]
    synced_first: list[Path] = field(default_factory=list)  # files made durable before it


@dataclass
class Saved:
    """How a save ended, the same on every rank: ``problem`` is None where it was published."""

    step: int
    path: Path
    seconds: float  # from its start to its publication
    size: int  # bytes
    problem: str | None


class Saver:
    """Publishes snapshots while training goes on, one at a time; every rank has one.

    ``start`` only begins: the tensors are copied while the next step computes its gradients, which
    reads weights and optimizer state but does not change them, so ``before_update`` has to be
    called before something does. The files are then written in a thread, which speaks with its
    peers over a process group of its own: its collectives never mix with those of the loop.
    """

    def __init__(
        self, folder: Path, world: World, keep: int, attempt: str, still_mine: Callable[[], None]
    ):
        self.folder, self.world, self.keep, self.attempt = folder, world, keep, attempt
        self.still_mine = still_mine
        try:
            self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        except RuntimeError as error:
            raise ConfigError(
                f"the ranks cannot reach each other over gloo ({str(error)[:200]}); set "
                "GLOO_SOCKET_IFNAME in train.slurm to the network between the nodes"
            ) from None
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._host: dict[str, torch.Tensor] = {}  # allocated by the first save, kept for the others
        self._thread: threading.Thread | None = None
        self._saved: Saved | Refused | None = None
        self._event: torch.cuda.Event | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._is_awaited = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun whose end was not asked for yet."""
        return self._thread is not None

    def start(self, snapshot: Snapshot) -> None:
        """Begin a save; none may be under way. Collective: every rank must call this."""
        assert self._thread is None, "one save at a time"
        share = _share(snapshot, self.world)
        if self._stream is not None:
            self._copy_from_gpu(share)
        else:
            self._is_copied.clear()
        self._thread = threading.Thread(target=self._run, args=(snapshot, share), daemon=True)
        self._thread.start()

    def before_update(self) -> float:
        """Wait until the snapshot no longer needs the weights as they are; seconds waited."""
        started = time.monotonic()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)  # the GPU waits, not this thread
        else:
            self._is_copied.wait()
        return time.monotonic() - started

    def poll(self) -> Saved | None:
        """``wait`` where the save that was begun has ended; None where it goes on."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Wait for the end of the save that was begun; None where there is none.

        Raises Refused, on every rank, where another life turned out to own the run.
        """
        if self._thread is None:
            return None
        self._is_awaited.set()
        self._thread.join()
        self._is_awaited.clear()
        self._thread, saved, self._saved = None, self._saved, None
        if isinstance(saved, Refused):
            raise saved
        return saved

    def _rest(self, seconds: float) -> None:
        """Leave the cores to training after ``seconds`` of writing, unless somebody waits."""
        if self._stream is None and not self._is_awaited.is_set():
            self._is_awaited.wait(seconds * REST)

    def _copy_from_gpu(self, share: "Share") -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in share.tensors():
                self._host_copy(name, tensor).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def _host_copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._host:
            is_pinned = self._stream is not None
            self._host[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinned
            )
        return self._host[name]

    def _run(self, snapshot: Snapshot, share: "Share") -> None:
        started, problem, size = time.monotonic(), None, 0
        if self._stream is not None:
            torch.cuda.set_device(self.world.device)  # a new thread begins on GPU 0
        final = self.folder / f"checkpoint-{snapshot.step}"
        try:
            copied = self._copied(share)
            size = self._publish(snapshot, copied, final)
        except Refused as error:
            self._saved = error
            return
        except SaveError as error:
            problem = str(error)
        except Exception as error:  # a peer that went away: the loop meets it as well
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            self._is_copied.set()
        self._saved = Saved(snapshot.step, final, time.monotonic() - started, size, problem)

    def _copied(self, share: "Share") -> "Share":
        if self._event is None:
            for name, tensor in share.tensors():
                self._host_copy(name, tensor).copy_(tensor)
        else:
            self._event.synchronize()
        self._is_copied.set()
        # From here on training comes first: this thread takes what it leaves (setpriority(2) is
        # per thread on Linux).
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        host = self._host
        return Share(
            {name: host[name] for name in share.weights},
            {name: host[name] for name in share.optimizer},
        )

    def _publish(self, snapshot: Snapshot, share: "Share", final: Path) -> int:
        """Write, agree, seal, rename; the size in bytes. Collective within the group."""
        temporary = self.folder / f".{final.name}.{self.attempt}.tmp"
        problem, entries = None, {}
        if self.world.is_main:
            # Asked first, or the leftovers below may be another life's save in the making.
            problem = _attempt(lambda: (self.still_mine(), _prepare_folder(temporary)), temporary)
        problem = from_main(problem, self.group)
        if problem is None:
            entries, problem = _write_share(temporary, snapshot, share, self.world, self._rest)
        shares = gather((entries, problem), self.group)
        problem = next((found for _, found in shares if found), None)
        whole = {name: entry for part, _ in shares for name, entry in part.items()}
        if self.world.is_main and problem is None:
            problem = _attempt(
                lambda: _publish(temporary, final, whole, snapshot.step, self.still_mine), final
            )
        problem = from_main(problem, self.group)
        if problem is not None:
            if self.world.is_main:
                files.remove_folder(temporary)
            raise problem if isinstance(problem, Refused) else SaveError(problem)
        if self.world.is_main:
            prune(self.folder, self.keep)
        return sum(entry["size"] for entry in whole.values())


@dataclass
class Share:
    """What one rank writes of a snapshot."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, under names that differ."""
        yield from self.weights.items()
        yield from self.optimizer.items()


def _share(snapshot: Snapshot, world: World) -> Share:
    optimizer = optimizer_share(snapshot, world.rank, world.world_size)
    return Share(snapshot.weights if world.is_main else {}, optimizer)


def _attempt(action: Callable[[], Any], path: Path) -> str | Refused | None:
    """Run an action; what the file system refused becomes one line."""
    try:
        action()
    except OSError as error:
        free = "free space unknown"
        with contextlib.suppress(OSError):  # what broke the one may break the other
            free = f"{files.free_bytes(path) / 1e9:.2f} GB free"
        return f"{error.filename or path}: {error.strerror or error} ({free})"
    except Refused as error:
        return error
    except Exception as error:  # whatever it is, the peers wait for this rank's answer
        return f"{type(error).__name__}: {error}"
    return None


def _prepare_folder(temporary: Path) -> None:
    for leftover in temporary.parent.glob(".checkpoint-*.tmp"):  # of lives killed while saving
        files.remove_folder(leftover)
    files.make_folder(temporary / "training")


def _write_share(
    temporary: Path,
    snapshot: Snapshot,
    share: Share,
    world: World,
    rest: Callable[[float], None],
) -> tuple[dict[str, dict], str | None]:
    """Write this rank's files; returns their manifest entries, or the problem."""
    entries: dict[str, dict] = {}
    need = sum(tensor.nbytes for _, tensor in share.tensors())

    def write() -> None:
        if world.is_main:
            for path in snapshot.synced_first:
                files.sync_file(path)
            for name, data in snapshot.small_files.items():
                entries[name] = files.write_file(temporary / name, data)
            entries[WEIGHTS] = write_safetensors(temporary / WEIGHTS, share.weights, rest)
            state = json.dumps(snapshot.state, indent=1).encode()
            entries[STATE] = files.write_file(temporary / STATE, state)
        if share.optimizer:
            name = f"training/optimizer-{world.rank}.safetensors"
            entries[name] = write_safetensors(temporary / name, share.optimizer, rest)

    problem = _attempt(write, temporary)
    if problem is not None:
        problem += f", {need / 1e9:.2f} GB needed by rank {world.rank}"
    return entries, problem


def optimizer_share(snapshot: Snapshot, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The optimizer tensors that a rank writes: largest first, each to the least loaded rank.

    Rank 0 starts with the weights as its load, since it writes those.
    """
    load = [0] * world_size
    load[0] = sum(tensor.nbytes for tensor in snapshot.weights.values())
    share = {}
    for name in sorted(snapshot.optimizer, key=lambda n: (-snapshot.optimizer[n].nbytes, n)):
        target = load.index(min(load))
        load[target] += snapshot.optimizer[name].nbytes
        if target == rank:
            share[name] = snapshot.optimizer[name]
    return share


def small_files(causal_lm: torch.nn.Module, model_folder: Path) -> dict[str, bytes]:
    """What from_pretrained needs beside the weights: the model's configuration, the tokenizer."""
    found = {}
    causal_lm.config.architectures = [type(causal_lm).__name__]
    with tempfile.TemporaryDirectory() as temporary:
        causal_lm.config.save_pretrained(temporary)
        if causal_lm.can_generate():
            causal_lm.generation_config.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            found[path.name] = path.read_bytes()
    for pattern in TOKENIZER_FILES:
        for path in model_folder.glob(pattern):
            found[path.name] = path.read_bytes()
    return found


def _publish(
    temporary: Path, final: Path, entries: dict, step: int, still_mine: Callable[[], None]
) -> None:
    files.write_manifest(temporary, entries, kind="checkpoint", step=step)
    still_mine()
    if final.exists():  # damaged, and trained again since
        set_aside(final)
    files.rename(temporary, final)
    files.sync_folder(final.parent)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that a person can look and no name promises too much."""
    aside = folder.with_name(f"damaged-{folder.name}")
    files.remove_folder(aside)
    files.rename(folder, aside)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, every byte hashed; None where there is none at all.

    A damaged one is named, set aside, and the one before is taken. ConfigError where checkpoints
    exist and none verifies: never silently start over.
    """
    candidates, problems = checkpoints(folder), []
    for _, path in candidates:
        problem = next(files.damage(path), None)
        if problem is None:
            for broken in problems:
                log.warning("resume  %s; using %s instead", broken, path.name)
            _set_aside_newer(candidates, path)
            return path
        problems.append(f"{path.name} is damaged ({problem})")
    if problems:
        raise ConfigError(
            f"no checkpoint verifies: {'; '.join(problems)}; restore one into {folder}, or move "
            "them away to start over"
        )
    return None


def _set_aside_newer(candidates: list[tuple[int, Path]], good: Path) -> None:
    for _, path in candidates:
        if path == good:
            return
        set_aside(path)


def read_optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All optimizer tensors of a checkpoint, whatever number of ranks wrote them."""
    tensors = {}
    for path in sorted((checkpoint / "training").glob("optimizer-*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` (at least two) checkpoints, a manifest always first."""
    for _, path in checkpoints(folder)[max(2, keep) :]:
        files.remove_folder(path)
