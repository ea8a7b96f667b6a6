"""Saves a checkpoint during training: copy, then write in a thread, then say how it ended.

``checkpoint-<step>/`` loads with from_pretrained; training/ in it has the optimizer's shards and
state.json. No pickle is written or read. Which rank writes what depends on the world size; what is
read does not.
"""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from trainstack.checkpoint.host_memory import HostMemory
from trainstack.checkpoint.publish import Publisher
from trainstack.checkpoint.snapshot import Saved, SaveError, Share, Snapshot
from trainstack.distributed import GLOO_FIX, NO_GLOO, World
from trainstack.errors import ConfigError, Refused, first_words
from trainstack.waits import SAVE_COLLECTIVE_SECONDS

WRITER_NICENESS = 10
# Seconds of rest for each second of writing, if training needs the same cores: the writer then
# takes a tenth of one. Steps meanwhile took 1.06 times as long (benchmarks/save_stall.py).
REST = 9


class Saver:
    """Publishes snapshots during training, one at a time; every rank has one.

    ``start`` only begins: the tensors are copied while the next step computes its gradients, which
    reads weights and optimizer state but does not change them, so ``before_update`` has to be
    called before something does. The files are then written in a thread, which speaks with its
    peers over a process group of its own: its collectives never mix with those of the loop.
    """

    def __init__(
        self, folder: Path, world: World, keep: int, attempt: str, check_owner: Callable[[], None]
    ):
        self.folder, self.world = folder, world
        try:
            wait = datetime.timedelta(seconds=SAVE_COLLECTIVE_SECONDS)
            group = dist.new_group(backend="gloo", timeout=wait)
        except RuntimeError as error:
            raise ConfigError(f"{NO_GLOO} ({str(error)[:200]}); {GLOO_FIX}") from None
        self.publisher = Publisher(folder, attempt, world, group, keep, check_owner, self._pause)
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._memory = HostMemory(world.device)
        self._host: dict[str, torch.Tensor] = {}  # where the snapshot is copied to
        self._not_copied: str | None = None  # why a GPU could not begin to copy
        self._thread: threading.Thread | None = None
        self._saved: Saved | Refused | None = None
        self._event: torch.cuda.Event | None = None  # when the GPU has copied
        self._wait: list[torch.cuda.Event] = []  # around the GPU's wait for that
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._is_awaited = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun whose end was not asked for yet."""
        return self._thread is not None

    @property
    def saves_until_stop(self) -> int:
        """How many saves a stop has to wait for: its own, and the one that is under way."""
        return 2 if self.is_busy else 1

    def reserve(self, share: Callable[[], Share]) -> None:
        """Let a thread make the memory that the first save takes; later ones take it again."""
        if self._stream is not None:
            self._memory.reserve(share())

    def start(self, snapshot: Snapshot) -> None:
        """Begin a save; none may be under way. Collective: every rank must call this."""
        assert self._thread is None, "one save at a time"
        self._is_copied.clear()
        if self._stream is not None:  # else the thread copies, and the update waits for it
            self._copy_from_gpu(snapshot.share)
        self._thread = threading.Thread(target=self._run, args=(snapshot,), daemon=True)
        self._thread.start()

    def before_update(self) -> float:
        """Wait until the snapshot no longer needs the weights as they are; seconds waited."""
        started = time.monotonic()
        if self._event is None:
            self._is_copied.wait()
        elif not self._wait:  # the GPU waits, not this thread
            self._wait = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._wait[0].record()
            torch.cuda.current_stream().wait_event(self._event)
            self._wait[1].record()
        return time.monotonic() - started

    def poll(self) -> Saved | None:
        """``wait`` if the save that was begun has ended; None if it is still under way."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return None if is_writing else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the end of the save that was begun; None if there is none.

        Refused, on every rank, if another attempt turned out to own the run.
        """
        if self._thread is None:
            return None
        self._is_awaited.set()
        self._thread.join()
        self._is_awaited.clear()
        self._thread, saved, self._saved = None, self._saved, None
        if isinstance(saved, Refused):
            raise saved
        if self._wait and self._wait[1].query():
            saved.gpu_seconds = self._wait[0].elapsed_time(self._wait[1]) / 1000
        return saved

    def _pause(self, seconds: float) -> None:
        """Leave the cores to training after ``seconds`` of writing, unless somebody waits."""
        if self._stream is None and not self._is_awaited.is_set():
            self._is_awaited.wait(seconds * REST)

    def _copy_from_gpu(self, share: Share) -> None:
        """Queue the copy behind what the GPU has to do; a problem is told by the thread."""
        self._event, self._wait, self._not_copied = None, [], None
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                self._copy(share)
                self._event = torch.cuda.Event()
                self._event.record(self._stream)
        except RuntimeError as error:
            self._not_copied = first_words(error)

    def _copy(self, share: Share) -> None:
        for name, tensor, place in self._memory.places(share):
            self._host[name] = place.copy_(tensor, non_blocking=self._stream is not None)

    def _run(self, snapshot: Snapshot) -> None:
        """The thread: copy, publish, and leave in ``_saved`` how it ended."""
        started, problem, size = time.monotonic(), None, 0
        if self._stream is not None:
            torch.cuda.set_device(self.world.device)  # a new thread begins on GPU 0
        final = self.folder / f"checkpoint-{snapshot.step}"
        try:
            size = self.publisher.publish(snapshot, self._copied(snapshot.share))
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

    def _copied(self, share: Share) -> Share | str:
        """The share in host memory, or why it is not. Then the loop may change the tensors."""
        try:
            if self._stream is None:
                self._copy(share)
            elif self._event is not None:
                self._event.synchronize()
        except RuntimeError as error:
            return first_words(error)
        finally:
            self._is_copied.set()
        if self._not_copied is not None:
            return self._not_copied
        # From here on training comes first: this thread gets what training leaves (setpriority(2)
        # is per thread on Linux).
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        host = self._host
        return Share(
            {name: host[name] for name in share.weights},
            {name: host[name] for name in share.optimizer},
        )
