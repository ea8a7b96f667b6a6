"""Faults on demand, to see what a run makes of them: ``TRAINSTACK_FAULT="kill:rank=1,step=25"``.

A fault is ``ACTION:key=value,...``; several are joined by ``;``. Keys: ``rank`` (default 0),
``step`` (before which it happens, default 1), ``attempt`` (in which it happens, default 1, or
``all``), ``op`` (before which change to the disk in the first save, for those below the line).

    kill stop term      SIGKILL, SIGSTOP, SIGTERM to the rank itself
    segv abort          a real segmentation fault, abort(3)
    raise exit          an exception; an exit without a report
    sleep gil           an hour of sleep; an endless call that holds the interpreter's lock
    oom                 takes memory until the kernel or the allocator says no
    slow                from that step on, each step takes 0.1 s longer
    nan                 the step's loss of this rank is not a number
    ------------------------------------------------------------------------------------------
    crash               SIGKILL before that change to the disk
    enospc edquot eio   that change fails: disk full, quota used up, input/output error
"""

import contextlib
import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError
from trainstack.storage import files

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ERRORS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO}
OTHERS = ("segv", "abort", "raise", "exit", "sleep", "gil", "oom", "slow", "nan", "crash")
ACTIONS = (*SIGNALS, *ERRORS, *OTHERS)
SLOW_SECONDS = 0.1
OOM_BYTES = 64 << 20  # taken at a time


@dataclass
class Fault:
    """One fault; the fields are the keys above."""

    action: str
    rank: int = 0
    step: int = 1
    attempt: int | None = 1  # None: every attempt
    op: int = 1


def parse(text: str) -> list[Fault]:
    """The faults that a text describes; ConfigError if it describes none."""
    return [_parse_one(part) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    action, _, rest = text.strip().partition(":")
    words = [word.partition("=") for word in rest.split(",") if word]
    known = {"rank", "step", "attempt", "op"}
    for key, _, value in words:
        is_number = value.isdigit() or (key, value) == ("attempt", "all")
        if key not in known or not is_number:
            raise ConfigError(f"TRAINSTACK_FAULT={text}: {key}={value}; write rank=1,step=25")
    if action not in ACTIONS:
        raise ConfigError(f"TRAINSTACK_FAULT={text}: {action} is none of {', '.join(ACTIONS)}")
    return Fault(action, **{k: None if v == "all" else int(v) for k, _, v in words})


class Faults:
    """Those of a text's faults that are for this rank in this attempt; none: it does nothing."""

    def __init__(self, text: str, rank: int, attempt: int):
        self.faults = [f for f in parse(text) if f.rank == rank and f.attempt in (None, attempt)]
        self.loss_factor = 1.0
        self._changes = 0
        self._watch = contextlib.ExitStack()
        if any(f.action in (*ERRORS, "crash") for f in self.faults):
            self._watch.enter_context(files.watched_by(self._on_change))

    def attach(self, loss_model: Any) -> None:
        """Let ``nan`` reach the loss; without a fault the model is left as it is."""
        if self.faults:
            loss_model.register_forward_hook(lambda _model, _input, loss: loss * self.loss_factor)

    def before(self, step: int) -> None:
        """Do what is due before a step (from 1)."""
        self.loss_factor = 1.0
        for fault in self.faults:
            if fault.step == step:
                self._do(fault.action)
            elif fault.step < step and fault.action == "slow":
                time.sleep(SLOW_SECONDS)

    def _do(self, action: str) -> None:
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
        elif action == "segv":
            ctypes.string_at(0)
        elif action == "abort":
            os.abort()
        elif action == "raise":
            raise RuntimeError("a fault that TRAINSTACK_FAULT asked for")
        elif action == "exit":
            os._exit(3)
        elif action == "sleep":
            time.sleep(3600)
        elif action == "gil":
            # A deadlock in C. PyDLL keeps the interpreter's lock, and no signal ends this wait: a
            # call that looks for signals would let other threads run whenever one arrives.
            mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
        elif action == "oom":
            taken = []
            while True:
                taken.append(b"x" * OOM_BYTES)
        elif action == "nan":
            self.loss_factor = float("nan")

    def _on_change(self, operation: str, path: Path, _detail: Any) -> None:
        if "checkpoints" not in path.parts:
            return
        self._changes += 1
        for fault in self.faults:
            if fault.op == self._changes and fault.action == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.op == self._changes and fault.action in ERRORS:
                number = ERRORS[fault.action]
                raise OSError(number, os.strerror(number), str(path))
