"""Parquet and arrow as chunks: only the columns that are wanted are read."""

from collections.abc import Iterator
from pathlib import Path

from trainstack.errors import DataError, first_line
from trainstack.records import chunks
from trainstack.records.chunks import Chunk, Wanted
from trainstack.records.columns import advice

CHUNK_ROWS = 10_000  # whose sizes say little where texts are repeated


def read_parquet(path: Path, wanted: Wanted) -> Iterator[Chunk]:
    import pyarrow.parquet

    try:
        first = 1
        # Without the buffer for the next groups, which holds all that was read ahead.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            metadata = file.metadata
            columns, unread = _columns(path.name, file.schema_arrow.names, wanted)
            size = 0
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for part in map(group.column, range(group.num_columns)):
                    if part.path_in_schema.partition(".")[0] in columns:  # it may be nested
                        size += part.total_uncompressed_size
            rows = min(max(1, chunks.CHUNK_BYTES * metadata.num_rows // max(1, size)), CHUNK_ROWS)
            for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                yield Chunk(path.name, "row", first, batch, unread)
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise _not_whole(path, "parquet", error) from None


def read_arrow(path: Path, wanted: Wanted) -> Iterator[Chunk]:
    """A stream of record batches, as save_to_disk writes it, or a file with a footer."""
    import pyarrow.ipc

    try:
        first = 1
        # Not mapped: what is mapped counts as memory of this process.
        with pyarrow.OSFile(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            opened = pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file
            file.seek(0)
            names = opened(file).schema.names
            columns, unread = _columns(path.name, names, wanted)
            file.seek(file.size() - 4)
            if is_stream and file.read(4) != bytes(4):
                raise pyarrow.ArrowInvalid("it has no end")
            fields = pyarrow.ipc.IpcReadOptions(included_fields=[*map(names.index, columns)])
            file.seek(0)
            reader = opened(file, options=fields)
            numbers = () if is_stream else range(reader.num_record_batches)
            for batch in reader if is_stream else map(reader.get_batch, numbers):
                rows = chunks.CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)
                rows = min(max(1, rows), CHUNK_ROWS)
                for start in range(0, batch.num_rows, rows):
                    part = batch.slice(start, rows)
                    yield Chunk(path.name, "row", first, _apart(part), unread)
                    first += len(part)
    except pyarrow.ArrowException as error:
        raise _not_whole(path, "arrow", error) from None


def _apart(part):
    """The rows of a slice with memory of their own: pickled, a slice takes all of its batch."""
    import pyarrow

    try:
        return part.take(pyarrow.array(range(len(part))))
    except pyarrow.ArrowNotImplementedError:  # views of strings, runs of equal values
        return pyarrow.RecordBatch.from_pylist(part.to_pylist())


def _columns(name: str, names: list[str], wanted: Wanted) -> tuple[list[str], tuple[str, ...]]:
    """The columns of a file that are read, and the others. DataError if none is."""
    read = [n for n in names if wanted.columns is None or n in wanted.columns]
    if not names:
        raise DataError(f"{name}: it has no columns; take it away")
    if not read:
        needed = " or ".join(sorted(wanted.columns))
        raise DataError(f"{name}: no column {needed}; it has: {', '.join(names)}; {advice(names)}")
    return read, tuple(column for column in names if column not in read)


def _not_whole(path: Path, kind: str, error: Exception) -> DataError:
    import pyarrow

    what, fix = f"not a whole {kind} file", "fetch it again"
    if isinstance(error, pyarrow.ArrowNotImplementedError):
        what, fix = "holds what pyarrow does not read", "write it again with columns of strings"
    return DataError(f"{path.name}: {what} ({first_line(error)}); {fix}")
