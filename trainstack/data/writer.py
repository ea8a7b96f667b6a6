"""Writes a token store, so that a preparation that is killed can be resumed at its last commit.

A resumed preparation copies the committed part into its own folder, hashes it meanwhile, and
continues there. Two processes therefore never write to one file, even if each believes the other
dead.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainstack.data.packing import Plan
from trainstack.data.split import EVAL, INDEX, TRAIN, Split
from trainstack.data.store import BAD_RECORDS, Counts
from trainstack.processes import is_dead, process_start
from trainstack.storage import files, manifest

PROGRESS = "progress.json"  # of an unfinished folder: what of it is committed
WRITE_BYTES = 1 << 20
COMMIT_SECONDS = 10
SILENT_SECONDS = 600  # without a commit: then a preparation on another host is taken for dead


@dataclass
class TokenBatch:
    """Tokens of documents of one split.

    ``ids`` [tokens] in the store's dtype. ``lengths`` int64 [documents]. ``spans`` int64 [spans,
    2]: first and last + 1 of each run of tokens that carry loss; None: all do. ``is_open``: the
    last document goes on in the next batch.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray | None
    is_open: bool = False


class TokenWriter:
    """Appends documents to a new store in a temporary folder; ``publish`` makes it visible.

    ``earlier``: that of a preparation that was killed, whose committed part is copied, or OSError.
    """

    def __init__(self, temporary: Path, vocab_size: int, earlier: Path | None = None):
        self.temporary = temporary
        self.dtype = ids_dtype(vocab_size)
        self._entries: dict[str, dict[str, Any]] = {}
        progress = read_progress(earlier) if earlier else {}
        self.counts = Counts.of(progress.get("counts", {}))
        # In the data files: the number of the file, from 0, and of its next record, from 1.
        self.position: list[int] = progress.get("position", [0, 1])
        temporary.mkdir(parents=True)
        kinds = ("bin", "documents", "loss")
        names = [*(f"{split}.{kind}" for split in (TRAIN, EVAL) for kind in kinds), BAD_RECORDS]
        self._columns = {name: Column(temporary / name) for name in names}
        for name, size in progress.get("sizes", {}).items():
            if size:  # an empty one may have been removed
                self._columns[name].copy(earlier / name, size)
        self._commit()

    def append(self, split: str, batch: TokenBatch) -> None:
        """Add documents, their end tokens included. All of a store have spans, or none has."""
        counts = self.counts
        counts.largest_id = max(counts.largest_id, int(batch.ids.max(initial=0)))
        first, before = (getattr(counts, f"{split}_{what}") for what in ("tokens", "target_tokens"))
        self._columns[f"{split}.bin"].append(batch.ids)
        stops = first + np.cumsum(batch.lengths)[: -1 if batch.is_open else None]
        self._columns[f"{split}.documents"].append(stops.astype(INDEX))
        carrying = len(batch.ids)
        if batch.spans is not None:
            sizes = batch.spans[:, 1] - batch.spans[:, 0]
            carrying = int(sizes.sum())
            earlier = before + np.cumsum(sizes) - sizes
            spans = np.column_stack([batch.spans + first, earlier])
            self._columns[f"{split}.loss"].append(spans.astype(INDEX))
        setattr(counts, f"{split}_documents", getattr(counts, f"{split}_documents") + len(stops))
        setattr(counts, f"{split}_tokens", first + len(batch.ids))
        setattr(counts, f"{split}_target_tokens", before + carrying)

    def leave_out(self, location: str, reason: str) -> None:
        """List a bad record."""
        line = json.dumps({"place": location, "reason": reason}) + "\n"
        self._columns[BAD_RECORDS].append(np.frombuffer(line.encode(), np.uint8))
        self.counts.bad_records += 1

    def reached(self, file: int, record: int) -> None:
        """Say that all before this record is appended; commit it, if it is time to.

        ``file``: its number among the data files, from 0; ``record``: in that file, from 1.
        """
        self.position = [file, record]
        if time.monotonic() > self._committed_at + COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        """Make what is appended durable, then write down that it is."""
        for column in self._columns.values():
            column.sync()
        progress = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process_start(os.getpid()),
            "position": self.position,
            "sizes": {name: column.size for name, column in self._columns.items()},
            "counts": asdict(self.counts),
        }
        files.replace_file(self.temporary / PROGRESS, json.dumps(progress).encode())
        self._committed_at = time.monotonic()

    def seal(self, seq_len: int) -> dict[str, Split]:
        """No more documents: close the files. The splits, with no samples laid out yet."""
        for column in self._columns.values():
            column.close()
        has_spans = any(self._columns[f"{split}.loss"].size for split in (TRAIN, EVAL))
        unused = {BAD_RECORDS} if has_spans else {BAD_RECORDS, f"{TRAIN}.loss", f"{EVAL}.loss"}
        for name, column in self._columns.items():
            if column.size or name not in unused:  # other empty files are part of every store
                self._entries[name] = column.entry()
            else:
                column.path.unlink()
        return {s: Split(self.temporary, s, self.dtype, seq_len) for s in (TRAIN, EVAL)}

    def lay_out(self, name: str, split: Split, plans: Iterable[Plan]) -> None:
        """Write the samples of a split; ``plans``: those of each group of documents, in order."""
        kinds = ("pieces", "rows", "targets")
        columns = {kind: Column(self.temporary / f"{name}.{kind}") for kind in kinds}
        columns["rows"].append(np.zeros(1, INDEX))
        pieces = 0
        for made in plans:
            columns["pieces"].append(made.pieces.astype(INDEX))
            columns["rows"].append((pieces + made.rows[1:]).astype(INDEX))
            columns["targets"].append(made.targets.astype(INDEX))
            pieces += len(made.pieces)
            self.counts.split_documents += made.split_documents
            self.counts.dropped_documents += made.dropped_documents
            split.forget()
        for column in columns.values():
            column.close()
            self._entries[column.path.name] = column.entry()

    def publish(self, final: Path, meta: dict[str, Any]) -> None:
        """Put the sealed store under its final name."""
        meta = {**meta, "dtype": self.dtype.str, "counts": asdict(self.counts)}
        data = json.dumps(meta, indent=1).encode()
        self._entries["meta.json"] = files.write_file(self.temporary / "meta.json", data)
        manifest.publish_folder(self.temporary, final, self._entries, kind="tokens")
        files.unlink(final / PROGRESS)  # until then the preparation can be resumed


class Column(files.HashedFile):
    """A file that arrays are appended to; many small ones become few writes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._waiting = bytearray()
        self.__enter__()

    def append(self, values: np.ndarray) -> None:
        self._waiting += values.tobytes()
        if len(self._waiting) >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self.write(self._waiting)
        self._waiting = bytearray()

    def sync(self) -> None:
        self._flush()
        super().sync()

    def copy(self, source: Path, size: int) -> None:
        """Begin with the first ``size`` bytes of another file. OSError if it has fewer."""
        with source.open("rb") as file:
            while size:
                data = file.read(min(size, files.READ_BYTES))
                if not data:
                    raise OSError(errno.EIO, "shorter than was committed", str(source))
                self.write(data)
                size -= len(data)

    def close(self) -> None:
        self.__exit__(None)


def ids_dtype(vocab_size: int) -> np.dtype:
    """The type of a store's token ids: uint16 if they fit, else uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def temporary_folder(final: Path) -> Path:
    """Where this process makes the store ``final``."""
    own = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"  # pids are used again
    return final.with_name(f".{final.name}.{own}.tmp")


def read_progress(folder: Path) -> dict[str, Any]:
    """What of an unfinished folder is committed; nothing if that cannot be read."""
    progress = files.object_in(folder / PROGRESS)
    return progress if {"position", "sizes", "counts", "host", "pid"} <= progress.keys() else {}


def abandoned(final: Path) -> list[Path]:
    """The folders that killed preparations of this store left, the furthest first."""
    found = []
    for folder in final.parent.glob(f".{final.name}.*.tmp"):
        with contextlib.suppress(OSError):
            progress = read_progress(folder)
            if _is_gone(folder, progress):
                found.append((progress.get("position", []), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _is_gone(folder: Path, progress: dict[str, Any]) -> bool:
    """Whether the process that made a folder has ended.

    On another host nobody can ask: there it has, if it committed nothing for SILENT_SECONDS.
    """
    if progress.get("host") == socket.gethostname():
        return is_dead(progress)
    is_ours = f".{socket.gethostname()}." in folder.name
    if is_ours and not progress:  # it ended before its first commit
        return process_start(int(folder.name.split(".")[-3])) is None
    return time.time() - folder.stat().st_mtime > SILENT_SECONDS
