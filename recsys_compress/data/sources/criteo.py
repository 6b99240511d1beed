"""Criteo's display-advertising logs: tab-separated label, 13 counts and 26 hashed categories."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa

from recsys_compress.data.columns import labels
from recsys_compress.data.inputs import DenseInput, IdInput, Inputs
from recsys_compress.data.sources.files import (
    CSV_SUFFIXES,
    CsvFormat,
    check_columns,
    count_rows,
    find_files,
    read_tables,
)
from recsys_compress.data.sources.source import Chunk, RawField, RawSchema, Source
from recsys_compress.data.split import DEFAULT_FRACTIONS, Fractions, check_fractions, ordered_split

_DENSE = tuple(f"I{index}" for index in range(1, 14))
_FIELDS = tuple(f"C{index}" for index in range(1, 27))
_COLUMNS = ("label", *_DENSE, *_FIELDS)
_TYPES = (
    {"label": pa.int64()}
    | {name: pa.float64() for name in _DENSE}
    | {name: pa.large_string() for name in _FIELDS}
)
_CSV = CsvFormat(types=_TYPES, names=_COLUMNS)
# Added before the logarithm: the second count starts at -3, all others at 0.
_SHIFT = {name: 4.0 if name == "I2" else 1.0 for name in _DENSE}
_INPUTS = Inputs(
    dense=tuple(DenseInput(name=n, missing=1 - shift, shift=shift) for n, shift in _SHIFT.items()),
    ids=tuple(IdInput(name=name, column=name) for name in _FIELDS),
)


@dataclass(frozen=True, kw_only=True)
class Criteo(Source):
    """Criteo in its original format; counts x become log(x + 1), and log(x + 4) for I2.

    A count below what the logarithm takes becomes 0, and so does a missing one.

    Attributes:
        path: file, folder or glob of tab-separated files (`.tsv`, `.txt` or `.csv`), in time order.
        split: "random" by seed, or "ordered": the first rows train, the last ones test.
        fractions: shares of train, valid and test.
    """

    name: ClassVar[str] = "criteo"

    path: str
    split: Literal["random", "ordered"] = "random"
    fractions: Fractions = DEFAULT_FRACTIONS

    def schema(self) -> RawSchema:
        """Returns the columns."""
        check_fractions(self.fractions, self.name)
        for path in self._files():
            check_columns(path, _COLUMNS, _CSV)
        return RawSchema(
            label="label", dense=_DENSE, categorical=tuple(RawField(name=n) for n in _FIELDS)
        )

    def inputs(self) -> Inputs:
        """Returns what a model needs of raw rows."""
        return _INPUTS

    def random_fractions(self) -> Fractions | None:
        """Returns the shares of the random split, if it is one."""
        return self.fractions if self.split == "random" else None

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time."""
        files = self._files()
        ordered = self.split == "ordered"
        total = count_rows(files, "label", _CSV) if ordered else 0
        first = 0
        for path in files:
            row = 1
            for table in read_tables(path, _COLUMNS, rows, _CSV):
                size = table.num_rows
                yield Chunk(
                    table=_convert(table, str(path), row),
                    split=ordered_split(first, size, self.fractions, total) if ordered else None,
                    where=str(path),
                )
                first, row = first + size, row + size

    def _files(self) -> list[Path]:
        return find_files(self.path, CSV_SUFFIXES)


def _convert(table: pa.Table, where: str, row: int) -> pa.Table:
    label = labels(table["label"], "label", where, row)
    return pa.table({"label": label, **_INPUTS.features(table, where, row)})
