"""Documents out of data files: jsonl (.gz, .zst), json, parquet, csv and txt, read as a stream."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".csv", ".txt")
BATCH_ROWS = 1024


class DataError(Exception):
    """A data file holds something that is no document; says file, place, what and the fix."""


def split_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files of a folder that make up a split, by the rules of the datasets library.

    It knows the README's ``configs:``, names such as train-00000-of-00002.parquet and folders such
    as data/; a folder without any such hint is one split, train. Raises DataError.
    """
    names = [p for p in sorted(folder.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()]
    if not names:
        raise DataError(f"{folder} has no {', '.join(SUFFIXES)} file; look at what was downloaded")
    # A builder reads one format; text files without the library's naming are all of the split.
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(str(folder), name=subset)
        by_split = {str(k): [Path(f) for f in v] for k, v in builder.config.data_files.items()}
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise DataError(f"{folder}: {str(error).splitlines()[0]}") from None
    if split not in by_split:
        have = ", ".join(sorted(by_split))
        raise DataError(f"data.split={split}: {folder.name} has {have}; choose one of them")
    return sorted(by_split[split])


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The text of every document of a file, in order. Raises DataError naming the place."""
    for place, record in read_records(path):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            found = (
                "no text" if not isinstance(record, dict) or field not in record else "no string"
            )
            raise DataError(f"{place}: {found} in data.text_field={field}; the record has: {keys}")
        yield text


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a file with the place of each; a .txt file is one record with a field text."""
    name = path.name
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path)
        elif name.endswith(".txt"):
            yield name, {"text": path.read_text(encoding="utf-8-sig")}
        elif name.endswith(".csv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), start=1):
                    yield f"{name}: row {number}", row
        elif name.endswith(".json"):
            yield from _read_json(path)
        else:
            yield from _read_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert the file") from None
    except (EOFError, OSError) as error:
        raise DataError(f"{name}: cannot be read to its end ({error}); fetch it again") from None


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path.name}:{number}", json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path.name}:{number}: {error.msg} at column {error.colno}; mend the line"
                ) from None
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path.name}:{number}: not UTF-8 at byte {error.start} of the line; convert it"
                ) from None


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of records; a .json file with a record per line is read as lines."""
    with path.open("rb") as file:
        first = file.read(64).lstrip()[:1]
    if first != b"[":
        yield from _read_lines(path)
        return
    try:
        records = json.loads(path.read_bytes())
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
