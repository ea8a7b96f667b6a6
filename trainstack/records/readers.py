"""Records out of data files: jsonl (ndjson), json, csv, txt, plain, .gz or .zst; parquet, arrow.

A file is read as a stream of chunks, which are parsed elsewhere: by one of several processes.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainstack.errors import DataError, first_line
from trainstack.records import chunks
from trainstack.records.chunks import Chunk, Cut, Part, Wanted, text_hash
from trainstack.records.tables import read_arrow, read_parquet
from trainstack.storage.manifest import read_manifest

COMPRESSED = ("", ".gz", ".zst", ".zstd")
LONGEST_WORD = 16  # characters of JSON that say nothing until they are whole, such as -Infinity
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
SIGNS = {  # with what packed files begin (zstd also with a frame that is skipped), and what to do
    ".zip": (rb"PK\x03\x04", "a zip archive; unpack it"),
    ".gz": (rb"\x1f\x8b", "compressed with gzip; end its name with .gz"),
    ".zst": (
        rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
        "compressed with zstd; end its name with .zst",
    ),
}
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error")  # what servers send instead of a file
ALL = Wanted()
csv.field_size_limit(1 << 30)  # characters; the library's own limit, 131,072, is a short document


def split_files(folder: Path, split: str, key: str = "data.split") -> list[Path]:
    """The files of a data set's folder that make up a split, as its manifest says.

    The download writes down the splits (the README's ``configs:``, names such as
    train-00000-of-00002.parquet); a folder without them is one split, train. DataError, which names
    the setting ``key``, if there is no such split.
    """
    manifest = read_manifest(folder)
    whole = [name for name in manifest["files"] if is_readable(name)]
    splits = manifest.get("splits") or {"train": whole}
    if not any(splits.values()):
        raise DataError(f"{folder} has no {READABLE} file; look at what was downloaded")
    if split not in splits:
        have = ", ".join(sorted(splits))
        raise DataError(f"{key}={split}: {folder.name} has {have}; choose one of them")
    return [folder / name for name in sorted(splits[split])]


def read_chunks(path: Path, wanted: Wanted = ALL) -> Iterator[Chunk]:
    """The chunks of a file, always the same. DataError if the rest of it is damaged.

    What the file system says itself, such as EIO, stays an OSError: trying again may help.
    """
    name, suffix = path.name, suffix_of(path.name)
    _look(path, suffix)
    try:
        yield from READERS[suffix](path, wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert the file") from None
    except (EOFError, OSError, zlib.error) as error:
        if getattr(error, "errno", None):
            error.filename = error.filename or str(path)
            raise
        fix = "fetch it again"
        if "too much memory" in str(error):  # pyarrow reads windows of up to 128 MB
            fix = f"unpack it first: zstd -d --long=31 {name}"
        raise DataError(f"{name}: cannot be read to its end ({error}); {fix}") from None


def _look(path: Path, suffix: str) -> None:
    """DataError if a file is empty, or plainly something else than its name says."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head and suffix != ".txt":
        raise DataError(f"{path.name}: is empty; fetch it again, or take it away")
    if head.lstrip().lower().startswith(PAGES) and suffix != ".txt":
        raise DataError(f"{path.name}: is a web page or XML; fetch the file itself")
    packed = next((packed for packed in SIGNS if packed in suffix), "")
    found, what = "", f"not compressed; take {packed} off its name"
    for name, (sign, told) in SIGNS.items():
        if re.match(sign, head):
            found, what = name, told
    if found != packed:
        raise DataError(f"{path.name}: is {what}")
    if head[257:262] == b"ustar":
        raise DataError(f"{path.name}: is a tar archive; unpack it")


def _read_text(path: Path, wanted: Wanted) -> Iterator[Chunk]:
    """One record; a file of more than CHUNK_BYTES is several, each of at least a piece."""
    name, pieces, digest = path.name, _pieces(path, wanted.cut), b""
    try:
        first = [*itertools.islice(pieces, 2)]
        if len(first) == 2 and wanted.is_one:
            digest = _digest(path)
    except DataError as error:
        yield Chunk(name, "", 1, [error])
        return
    unit = "piece" if len(first) == 2 and not wanted.is_one else ""
    start = 0
    pairs = itertools.pairwise(itertools.chain(first, pieces, [None]))
    for number, ((text, *around), following) in enumerate(pairs, start=1):
        part = Part(start, following is not None, *around, digest) if digest else None
        yield Chunk(name, unit, number, [{"text": text}], part=part)
        start += len(text)


def _digest(path: Path) -> bytes:
    """text_hash of a text file. DataError if it holds NUL characters."""
    found, at = text_hash(), 0
    for text in _texts(path):
        if "\0" in text:
            where = at + text.index("\0")
            raise DataError(f"{path.name}: NUL character at {where:,}; is it binary? remove it")
        found.update(text.encode())
        at += len(text)
    return found.digest()


def _pieces(path: Path, cut: Cut) -> Iterator[tuple[str, str, str]]:
    """The text of a file in pieces of about CHUNK_BYTES, each with some text before and behind."""
    text = before = ""
    for more in _texts(path):
        if text and (found := cut(text)):
            begin, end, stop = found
            yield text[:end], before, text[end:stop]
            before, text = text[begin:end], text[end:]
        text += more
    yield text, before, ""


def _texts(path: Path) -> Iterator[str]:
    """The text of a file as it is read, without a byte order mark. DataError if it is no UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as stream:
        while True:
            data = stream.read(chunks.CHUNK_BYTES)
            before = len(decoder.getstate()[0])  # bytes of a character that was cut
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = done - before + error.start
                raise DataError(f"{path.name}: not UTF-8 at byte {at}; convert the file") from None
            if text:
                yield text if done else text.removeprefix("\ufeff")
            done += len(data)
            if not data:
                return


def _read_lines(path: Path, _: Wanted) -> Iterator[Chunk]:
    first = 1
    with _open(path) as stream:
        while lines := stream.readlines(chunks.CHUNK_BYTES):
            yield Chunk(path.name, "line", first, lines)
            first += len(lines)


def _open(path: Path):
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() in COMPRESSED[2:]:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _read_csv(path: Path, _: Wanted) -> Iterator[Chunk]:
    odd = ValueError("it has more fields than there are columns: quote texts that hold commas")
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, strict=True)  # a quote left open takes all that follows
        sized = ((row, sum(len(v) for v in row.values() if isinstance(v, str))) for row in rows)
        sized = ((odd if None in row else row, size) for row, size in sized)
        try:
            names = [*filter(None, rows.fieldnames or ())]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path.name}: two columns are called {twice}; rename one")
            yield from _in_chunks(path.name, "row", sized)
        except csv.Error as error:
            fix = "quote a text that holds commas or quotes, and double the quotes within it"
            raise DataError(f"{path.name}:{rows.line_num + 1}: {error}; {fix}") from None


def _read_json(path: Path, wanted: Wanted) -> Iterator[Chunk]:
    """A JSON array of records; a .json file with a record per line is read as lines."""
    with _open(path) as stream:
        first = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if first.partition(b"\n")[0].strip() == b"{":
        fix = "write an array of records, or one a line"
        raise DataError(f"{path.name}: one object over several lines; {fix}")
    if first[:1] != b"[":
        yield from _read_lines(path, wanted)
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
        if size >= chunks.CHUNK_BYTES:
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

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._take("[")
        if self._next() != "]":
            yield self._value()
        while self._next() != "]":
            self._take(",")
            self._next()
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
                value, end = chunks.DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated")
                is_cut |= error.pos >= len(self.text) - LONGEST_WORD
                if not (is_cut and self._read_more()):
                    raise self._problem(error.msg, error.pos) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._problem(first_line(error), self.at) from None
            if end < len(self.text) or not self._read_more():  # a number may continue
                size, self.at = end - self.at, end
                return value, size

    def _read_more(self) -> bool:
        """Read more text, twice as much for a long value; whether there was any."""
        more = self.stream.read(max(chunks.CHUNK_BYTES, len(self.text) - self.at))
        if more:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def _problem(self, reason: str, at: int) -> DataError:
        line = self.line + self.text.count("\n", 0, at)
        return DataError(f"{self.name}:{line}: {reason}; fix the file")


# By the ends of files' names: the one list of what can be read.
PACKABLE = {
    ".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".csv": _read_csv,
    ".txt": _read_text,
}  # fmt: skip
READERS: dict[str, Callable[[Path, Wanted], Iterator[Chunk]]] = {
    **{f"{kind}{packed}": read for kind, read in PACKABLE.items() for packed in COMPRESSED},
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
SUFFIXES = tuple(READERS)
READABLE = f"{', '.join(PACKABLE)} (plain, .gz or .zst), .parquet or .arrow"  # for people


def suffix_of(name: str) -> str:
    """The end of a file's name that says its type, in small letters; an empty text if none does."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def is_readable(name: str) -> bool:
    """Whether a file is of a type that can be read, by its name."""
    return bool(suffix_of(name))
