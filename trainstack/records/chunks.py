"""What a reader of data files gives: consecutive records, parsed where they are needed."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from trainstack.errors import DataError, first_line

CHUNK_BYTES = 1 << 20  # that a process gets at once


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if a key is repeated, of which readers take either."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)} is repeated")
    return made


Cut = Callable[[str], tuple[int, int, int] | None]
DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True)
class Wanted:
    """What is read of a file: of parquet and arrow these columns (None: all).

    A long .txt is read in pieces, cut where ``cut`` says: it is given what is read so far, and
    returns where a piece ends, between the beginning and the end of the text around that place
    which tokens depend on; None if it can be cut nowhere yet. ``is_one``: they are one document.
    """

    columns: Collection[str] | None = None
    cut: Cut = lambda text: (len(text),) * 3
    is_one: bool = False


@dataclass(frozen=True)
class Part:
    """A piece of a document too long to be held; it begins ``start`` characters into the document.

    ``is_continued``: more pieces follow. ``before``, ``after``: some text of the pieces around it.
    ``digest``: text_hash of the whole document.
    """

    start: int
    is_continued: bool
    before: str = ""
    after: str = ""
    digest: bytes = b""


def text_hash():
    """The hash of a document's text, in UTF-8, that decides whether it is held out; 8 bytes."""
    return hashlib.blake2b(digest_size=8, key=b"held-out")


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file as they were read: lines of JSON, rows of arrow, or records.

    ``first``: the number of the first one, from 1; ``unit``: what a location calls a record, such
    as line. ``unread``: columns that are in the file, but not in ``content``. ``part``: which piece
    of a document its one record is.
    """

    name: str
    unit: str
    first: int
    content: Any
    unread: tuple[str, ...] = ()
    part: Part | None = None

    @property
    def stop(self) -> int:
        """The number of the record after its last one."""
        return self.first + len(self.content)

    def from_record(self, number: int) -> "Chunk | None":
        """The same without what is before a record; None if nothing is left."""
        skipped = max(0, number - self.first)
        if skipped >= len(self.content):
            return None
        return replace(self, first=self.first + skipped, content=self.content[skipped:])

    def records(self) -> Iterator[tuple[str, Any]]:
        """Each record with its location; one that cannot be read is a DataError instead.

        Columns that were not read are there with None, so that a message can name them.
        """
        is_list = isinstance(self.content, list)
        records = self.content if is_list else _rows(self.content, self.unread)
        for number, record in enumerate(records, start=self.first):
            location = f"{self.name}: {self.unit} {number}" if self.unit else self.name
            if isinstance(record, bytes):
                if not record.strip():
                    continue
                location = f"{self.name}:{number}"
                record = _read_line(location, record)
            elif isinstance(record, Exception) and not isinstance(record, DataError):
                record = DataError(f"{location}: not readable ({first_line(record)}); fix it")
            yield location, record


def _rows(batch, unread: tuple[str, ...]) -> Iterator[Any]:
    """The rows of a record batch of pyarrow; one that Python cannot hold is the exception why."""
    import pyarrow

    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        if len(batch) == 1:
            yield error
        else:
            for number in range(len(batch)):
                yield from _rows(batch[number : number + 1], unread)
        return
    for row in rows:
        yield {name: _without_nulls(value) for name, value in row.items()} | dict.fromkeys(unread)


def _without_nulls(value: Any) -> Any:
    """A value without the nulls in it: arrow gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_line(location: str, line: bytes) -> Any:
    try:
        return DECODER.decode(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        fix = "write an object a line, each on one line"
        fix = fix if "Extra data" in error.msg or line.strip() in (b"{", b"[") else "fix the line"
        return DataError(f"{location}: {error.msg} at column {error.colno}; {fix}")
    except UnicodeDecodeError as error:
        what = "not UTF-8 (UTF-16, it seems)" if b"\0" in line else "not UTF-8"
        return DataError(f"{location}: {what} at byte {error.start} of the line; convert the file")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, nested without end
        return DataError(f"{location}: {first_line(error)}; fix the line")
