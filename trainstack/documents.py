"""Records out of data files: jsonl (.gz, .zst), json, parquet, csv and txt, read as a stream."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainstack import files
from trainstack.errors import DataError

PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(f".{s}{p}" for s in ("jsonl", "json", "csv", "txt") for p in PACKED), ".parquet")
BATCH_ROWS = 1024
csv.field_size_limit(1 << 30)  # characters; the library's own limit, 131,072, is a short document


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a data set's folder that make up a split, as its manifest says.

    The download writes down the splits (the README's ``configs:``, names such as
    train-00000-of-00002.parquet); a folder without them is one split, train. Raises DataError.
    """
    manifest = files.read_manifest(folder)
    whole = [name for name in manifest["files"] if name.endswith(SUFFIXES)]
    splits = manifest.get("splits") or {"train": whole}
    if not any(splits.values()):
        raise DataError(f"{folder} has no {', '.join(SUFFIXES)} file; look at what was downloaded")
    if split not in splits:
        have = ", ".join(sorted(splits))
        raise DataError(f"data.split={split}: {folder.name} has {have}; choose one of them")
    return [folder / name for name in sorted(splits[split])]


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a file with the place of each; a .txt file is one record with a field text.

    A record that cannot be read, while those after it can, is a DataError in its place. Raises
    DataError where the rest of the file cannot be read.
    """
    name = path.name
    kind = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    readers = {"parquet": _read_parquet, "txt": _read_text, "csv": _read_csv, "json": _read_json}
    try:
        yield from readers.get(kind, _read_lines)(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert the file") from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        raise DataError(f"{name}: cannot be read to its end ({error}); fetch it again") from None


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        yield path.name, {"text": stream.read().decode("utf-8-sig")}


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
        for number, row in enumerate(rows, start=1):
            yield f"{path.name}: row {number}", row


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            yield place, _read_line(place, line)


def _read_line(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return DataError(f"{place}: {error.msg} at column {error.colno}; mend the line")
    except UnicodeDecodeError as error:
        what = "not UTF-8 (UTF-16, it seems)" if b"\0" in line else "not UTF-8"
        return DataError(f"{place}: {what} at byte {error.start} of the line; convert the file")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, nested without end
        return DataError(f"{place}: {str(error).splitlines()[0]}; mend the line")


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of records; a .json file with a record per line is read as lines."""
    with _open(path) as stream:
        first = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first != b"[":
        yield from _read_lines(path)
        return
    try:
        with _open(path) as stream:
            records = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}: {error.msg}; mend the file") from None
    for number, record in enumerate(records, start=1):
        yield f"{path.name}: record {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name}: not a whole parquet file ({reason}); fetch it") from None
