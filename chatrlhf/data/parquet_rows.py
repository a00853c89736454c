"""Rows of a Parquet file, a part of it in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatrlhf.data.json_row import Row
from chatrlhf.errors import DataError, one_line

BATCH = 1000  # rows


def parquet_rows(path: Path) -> Iterator[Row | DataError]:
    """The rows, and for one whose values cannot be read the error about it.

    Raises:
        DataError: the file is damaged, or two columns have one name.
    """
    number = 0
    for batch in _batches(path):
        for values in _values(batch):
            number += 1
            place = f"{path}, row {number}"
            yield DataError(f"{place}: {values}") if isinstance(values, str) else Row(values, place)


def _batches(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = Counter(file.schema_arrow.names)
            if repeated := [name for name, count in names.items() if count > 1]:
                raise DataError(f"{path}: column {repeated[0]!r} is there twice; rename or remove one")
            yield from file.iter_batches(batch_size=BATCH)
    except ArrowException as error:
        raise DataError(f"{path}: it cannot be read ({one_line(error)}); copy it again") from None


def _values(batch: Any) -> list[dict[str, Any] | str]:
    """The values of each row, or why they cannot be read."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, UnicodeDecodeError):
        return [_row_values(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row_values(row: Any) -> dict[str, Any] | str:
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except (ValueError, OverflowError) as error:
            return f"field {name!r} cannot be read ({one_line(error)}); correct or remove the row"
    return values
