"""Frappe (Baltrunas et al., 2015): which app was used in which context, in its official splits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from recsys_compress.data.columns import ids, labels
from recsys_compress.data.inputs import Inputs, plain
from recsys_compress.data.sources.files import CsvFormat, check_columns, read_tables
from recsys_compress.data.sources.source import Chunk, RawField, RawSchema, Source
from recsys_compress.data.split import SPLITS
from recsys_compress.errors import UserError

_FIELDS = (
    "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country",
    "city",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Frappe(Source):
    """Frappe.

    Attributes:
        path: folder with train, valid and test as `.parquet` or `.csv`.
    """

    name: ClassVar[str] = "frappe"

    path: str

    def schema(self) -> RawSchema:
        """Returns the columns."""
        for split in SPLITS:
            path = self._file(split)
            check_columns(path, ("label", *_FIELDS), CsvFormat())
        return RawSchema(label="label", categorical=tuple(RawField(name=name) for name in _FIELDS))

    def inputs(self) -> Inputs:
        """Returns what a model needs of raw rows."""
        return plain((), _FIELDS)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time."""
        for index, split in enumerate(SPLITS):
            path = self._file(split)
            first = 1
            for table in read_tables(path, ("label", *_FIELDS), rows, CsvFormat()):
                columns = {"label": labels(table["label"], "label", str(path), first)}
                columns |= {name: ids(table[name], name, str(path)) for name in _FIELDS}
                yield Chunk(
                    table=pa.table(columns),
                    split=np.full(table.num_rows, index, dtype=np.uint8),
                    where=str(path),
                )
                first += table.num_rows

    def _file(self, split: str) -> Path:
        for suffix in (".parquet", ".csv"):
            path = Path(self.path) / f"{split}{suffix}"
            if path.is_file():
                return path
        raise UserError(
            f"{self.path}: has neither {split}.parquet nor {split}.csv; name a Frappe folder"
        )
