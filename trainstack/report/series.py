"""The measurements of a run as curves: few enough points to draw, and no extreme left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute
from pyarrow import json as arrow_json

from trainstack.history.attempts import Execution
from trainstack.storage.files import record_in

MEASURED = (  # of metrics.jsonl, each a curve
    "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
    "peak_memory_gb", "data_seconds", "slowest_ratio",
)  # fmt: skip
BY_SOURCE = "source_eval_loss"  # the held-out loss of each data set of a mixture
BINS = 1500  # of a curve: more than a screen has columns
EXECUTED = {"step": pa.float64(), "attempt": pa.string(), "at": pa.float64()}


def read_table(path: Path, fields: dict[str, pa.DataType]) -> pa.Table:
    """Some keys of the objects of a file, one a line; null where a line lacks one.

    By Arrow, for a run may have millions of lines. Torn lines, which Arrow refuses, are left out.
    """
    data = path.read_bytes() if path.exists() else b""
    data = memoryview(data)[: data.rfind(b"\n") + 1]  # beyond it a line is being written
    schema = pa.schema(fields.items())
    if not data:
        return schema.empty_table()
    try:
        return _parse(data, schema)
    except pa.ArrowInvalid:
        whole = [line for line in bytes(data).splitlines() if record_in(line)]
        return _parse(b"\n".join(whole), schema) if whole else schema.empty_table()


def _parse(data: bytes | memoryview, schema: pa.Schema) -> pa.Table:
    return arrow_json.read_json(
        pa.BufferReader(pa.py_buffer(data)),
        arrow_json.ReadOptions(use_threads=False, block_size=1 << 24),
        arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def values_of(array: pa.Array) -> np.ndarray:
    """Numbers in double precision, NaN for null.

    Arrow's own way imports pandas, which takes half a second.
    """
    values = np.full(len(array), np.nan)
    there = np.from_dlpack(compute.indices_nonzero(array.is_valid()))
    values[there] = np.from_dlpack(array.drop_null())
    return values


@dataclass(frozen=True)
class Executed:
    """samples.jsonl in columns: each step that was executed, in the order of time."""

    steps: np.ndarray  # int64
    at: np.ndarray  # seconds since 1970
    attempts: np.ndarray  # int64, the index of each one's name in ``names``
    names: list[str]

    @classmethod
    def read(cls, path: Path) -> "Executed":
        table = read_table(path, EXECUTED)
        names = table["attempt"].combine_chunks().dictionary_encode()
        columns = [table["step"].combine_chunks(), table["at"].combine_chunks(), names.indices]
        steps, at, attempts = map(values_of, columns)
        whole = np.isfinite(steps) & np.isfinite(at) & np.isfinite(attempts)
        steps, attempts = steps[whole].astype(np.int64), attempts[whole].astype(np.int64)
        return cls(steps, at[whole], attempts, names.dictionary.to_pylist())

    @property
    def redone(self) -> int:
        """How many executions another one replaced."""
        return len(self.steps) - int(np.count_nonzero(np.bincount(self.steps)))

    def at_of(self, steps: np.ndarray) -> np.ndarray:
        """When steps were executed for the last time; NaN if that is not on record."""
        known = np.full(max(self.steps.max(initial=0), steps.max(initial=0)) + 1, np.nan)
        known[self.steps] = self.at  # of several the last one stays
        return known[steps]

    def telling(self, steps: Iterable[int]) -> list[Execution]:
        """Those that a timeline needs: the first and the last of each attempt, and some steps."""
        firsts = np.unique(self.attempts, return_index=True)[1]
        lasts = len(self.steps) - 1 - np.unique(self.attempts[::-1], return_index=True)[1]
        wanted = [*steps, *self.steps[firsts] - 1]
        chosen = np.isin(self.steps, [*wanted, *(step + 1 for step in wanted)])
        chosen[firsts] = chosen[lasts] = True
        return [
            Execution(int(self.steps[i]), "", self.names[self.attempts[i]], float(self.at[i]))
            for i in np.flatnonzero(chosen)
        ]


def curves_of(path: Path, sources: Sequence[str], executed: Executed) -> dict[str, dict[str, Any]]:
    """The curves of a run by their names, each with lists ``step``, ``at`` and ``value``.

    ``sources``: the data sets of a mixture. ``every``: the logged values that each bin stands for.
    """
    fields = dict.fromkeys(("step", *MEASURED), pa.float64())
    if sources:
        fields[BY_SOURCE] = pa.struct([(label, pa.float64()) for label in sources])
    table = read_table(path, fields).flatten()
    all_steps, found = values_of(table["step"].combine_chunks()), {}
    for name in table.column_names[1:]:
        values = values_of(table[name].combine_chunks())
        is_there = np.isfinite(values) & np.isfinite(all_steps)
        if not is_there.any():
            continue
        steps, values = all_steps[is_there].astype(np.int64), values[is_there]
        kept = extremes(values)
        steps, values = steps[kept], values[kept]
        found[name.replace(f"{BY_SOURCE}.", "eval_loss of ")] = {
            "step": steps.tolist(), "at": significant(executed.at_of(steps), 12),
            "value": significant(values, 6), "every": -(-int(is_there.sum()) // BINS),
        }  # fmt: skip
    return found


def extremes(values: np.ndarray) -> np.ndarray:
    """The indices of the values to draw: all, or of each bin the least and the greatest.

    Of the first and the last bin also the ends.
    """
    number = len(values)
    if number <= 2 * BINS:
        return np.arange(number)
    size = -(-number // BINS)
    bins = np.pad(values, (0, -number % size), "edge").reshape(-1, size)
    begins = np.arange(len(bins)) * size
    kept = [begins + bins.argmin(axis=1), begins + bins.argmax(axis=1), [0, number - 1]]
    return np.unique(np.minimum(np.concatenate(kept), number - 1))


def significant(values: np.ndarray, digits: int) -> list[float | None]:
    """As JSON has them, with so many digits that count; None if unknown."""
    return [float(f"{value:.{digits}g}") if value == value else None for value in values.tolist()]
