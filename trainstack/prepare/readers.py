"""Records out of data files: jsonl, json, csv and txt, each plain, .gz or .zst, and parquet.

A file is read as a stream of chunks, which are parsed elsewhere: by one of several processes.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstack.errors import DataError
from trainstack.storage.manifest import read_manifest

COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(f".{s}{c}" for s in ("jsonl", "json", "csv", "txt") for c in COMPRESSED), ".parquet")
CHUNK_BYTES = 1 << 20  # that a process gets at once
CHUNK_ROWS = 10_000  # of parquet, whose sizes say little where texts are repeated
LONGEST_WORD = 16  # characters of JSON that say nothing until they are whole, such as -Infinity
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
csv.field_size_limit(1 << 30)  # characters; the library's own limit, 131,072, is a short document


def split_files(folder: Path, split: str, key: str = "data.split") -> list[Path]:
    """The files of a data set's folder that make up a split, as its manifest says.

    The download writes down the splits (the README's ``configs:``, names such as
    train-00000-of-00002.parquet); a folder without them is one split, train. DataError, which names
    the setting ``key``, if there is no such split.
    """
    manifest = read_manifest(folder)
    whole = [name for name in manifest["files"] if name.endswith(SUFFIXES)]
    splits = manifest.get("splits") or {"train": whole}
    if not any(splits.values()):
        raise DataError(f"{folder} has no {', '.join(SUFFIXES)} file; look at what was downloaded")
    if split not in splits:
        have = ", ".join(sorted(splits))
        raise DataError(f"{key}={split}: {folder.name} has {have}; choose one of them")
    return [folder / name for name in sorted(splits[split])]


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file as they were read: lines, rows of parquet, or records.

    ``first``: the number of the first one, from 1; ``unit``: what a location calls a record, such
    as line.
    """

    name: str
    unit: str
    first: int
    content: Any

    @property
    def stop(self) -> int:
        """The number of the record after its last one."""
        return self.first + len(self.content)

    def from_record(self, number: int) -> "Chunk | None":
        """The same without what is before a record; None if nothing is left."""
        skipped = max(0, number - self.first)
        if skipped >= len(self.content):
            return None
        is_list = isinstance(self.content, list)
        rest = self.content[skipped:] if is_list else self.content.slice(skipped)
        return Chunk(self.name, self.unit, self.first + skipped, rest)

    def records(self) -> Iterator[tuple[str, Any]]:
        """Each record with its location; one that cannot be read is a DataError instead."""
        if self.unit == "line":
            for number, line in enumerate(self.content, start=self.first):
                if line.strip():
                    location = f"{self.name}:{number}"
                    yield location, _read_line(location, line)
            return
        records = self.content if isinstance(self.content, list) else _rows(self.content)
        for number, record in enumerate(records, start=self.first):
            location = f"{self.name}: {self.unit} {number}" if self.unit else self.name
            if isinstance(record, Exception) and not isinstance(record, DataError):
                reason = str(record).splitlines()[0]
                record = DataError(f"{location}: not readable ({reason}); fix it")
            yield location, record


def _rows(batch) -> Iterator[Any]:
    """The rows of a record batch of pyarrow; one that Python cannot hold is the exception why."""
    import pyarrow

    problems = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        yield from batch.to_pylist()
        return
    except problems:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except problems as error:
            yield error


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The chunks of a file, always the same. DataError if the rest of it is damaged.

    What the file system says itself, such as EIO, stays an OSError: trying again may help.
    """
    name = path.name
    kind = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    readers = {
        "parquet": _read_parquet, "txt": _read_text, "csv": _read_csv, "json": _read_json,
        "jsonl": _read_lines,
    }  # fmt: skip
    try:
        yield from readers[kind](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert the file") from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        if getattr(error, "errno", None):
            error.filename = error.filename or str(path)
            raise
        raise DataError(f"{name}: cannot be read to its end ({error}); fetch it again") from None


def _read_text(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        data = stream.read()
    try:
        record: Any = {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        record = DataError(f"{path.name}: not UTF-8 at byte {error.start}; convert the file")
    yield Chunk(path.name, "", 1, [record])


def _read_lines(path: Path) -> Iterator[Chunk]:
    first = 1
    with _open(path) as stream:
        while lines := stream.readlines(CHUNK_BYTES):
            yield Chunk(path.name, "line", first, lines)
            first += len(lines)


def _read_line(location: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return DataError(f"{location}: {error.msg} at column {error.colno}; fix the line")
    except UnicodeDecodeError as error:
        what = "not UTF-8 (UTF-16, it seems)" if b"\0" in line else "not UTF-8"
        return DataError(f"{location}: {what} at byte {error.start} of the line; convert the file")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, nested without end
        return DataError(f"{location}: {str(error).splitlines()[0]}; fix the line")


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _read_csv(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, strict=True)  # a quote left open takes all that follows
        sized = ((row, sum(len(v) for v in row.values() if isinstance(v, str))) for row in rows)
        yield from _in_chunks(path.name, "row", sized)


def _read_json(path: Path) -> Iterator[Chunk]:
    """A JSON array of records; a .json file with a record per line is read as lines."""
    with _open(path) as stream:
        first = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first != b"[":
        yield from _read_lines(path)
        return
    with _open(path) as stream:
        values = JsonArray(path.name, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
        yield from _in_chunks(path.name, "record", values)


def _in_chunks(name: str, unit: str, sized: Iterator[tuple[Any, int]]) -> Iterator[Chunk]:
    """Records, each with its size in characters, in chunks."""
    first, records, size = 1, [], 0
    for record, characters in sized:
        records.append(record)
        size += characters
        if size >= CHUNK_BYTES:
            yield Chunk(name, unit, first, records)
            first, records, size = first + len(records), [], 0
    if records:
        yield Chunk(name, unit, first, records)


class JsonArray:
    """The values of a JSON array, each with its number of characters, read one after the other.

    Python's own reader would hold the whole file, and all that is made of it, at once.
    """

    def __init__(self, name: str, stream):
        self.name, self.stream = name, stream
        self.text, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._take("[")
        is_first = True
        while self._next() != "]":
            if not is_first:
                self._take(",")
                self._next()
            is_first = False
            yield self._value()
        self._take("]")
        if self._next():
            raise self._problem("more after the end of the array", self.at)

    def _next(self) -> str:
        """Move to the next character that is no space, and return it; an empty text at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_more():
                return ""

    def _take(self, sign: str) -> None:
        if self._next() != sign:
            raise self._problem(f"expecting {sign!r}", self.at)
        self.at += 1

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated")
                is_cut |= error.pos >= len(self.text) - LONGEST_WORD
                if not (is_cut and self._read_more()):
                    raise self._problem(error.msg, error.pos) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._problem(str(error).splitlines()[0], self.at) from None
            if end < len(self.text) or not self._read_more():  # a number may continue
                size, self.at = end - self.at, end
                return value, size

    def _read_more(self) -> bool:
        """Read more text, twice as much for a long value; whether there was any."""
        more = self.stream.read(max(CHUNK_BYTES, len(self.text) - self.at))
        if more:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def _problem(self, reason: str, at: int) -> DataError:
        line = self.line + self.text.count("\n", 0, at)
        return DataError(f"{self.name}:{line}: {reason}; fix the file")


def _read_parquet(path: Path) -> Iterator[Chunk]:
    import pyarrow.parquet

    try:
        first = 1
        # Without the buffer for the next groups, which holds all that was read ahead.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            metadata = file.metadata
            groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            rows = CHUNK_BYTES * metadata.num_rows // max(1, sum(groups))
            rows = min(max(1, rows), CHUNK_ROWS)
            for batch in file.iter_batches(rows, use_threads=False):
                yield Chunk(path.name, "row", first, batch)
                first += batch.num_rows
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name}: not a whole parquet file ({reason}); fetch it") from None
