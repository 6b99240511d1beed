"""Any Parquet, CSV or Arrow files, with a TOML file that says what the columns are.

```toml
dense = ["price", "age"]            # finite numbers; a missing one counts as dense_missing
dense_missing = 0.0
categorical = ["user", "item"]      # integers or strings; may be missing
text = ["item"]                     # ids to read as strings although they look like numbers
weight = "sample_weight"            # example weights

[label]
column = "rating"
positive = ">=4"                    # optional rule; without it the column holds 0 and 1

[[multi_valued]]
column = "genres"                   # a list column, or strings to cut at the separator
separator = "|"
weights = "genre_weights"           # one number per id
pooling = "mean"

[[time]]
column = "clicked_at"               # a timestamp, or text like 2017-11-07 09:30:38
parts = ["hour", "weekday"]         # makes fields clicked_at_hour and clicked_at_weekday
zone = "Europe/Berlin"              # for times that name a zone; without it hours are of UTC

[split]                             # without it: random 8:1:1
column = "split"
train = [0]
valid = [1]
test = [2]
# or: fractions = [0.8, 0.1, 0.1] and order = "random" or "stored"
```
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from zoneinfo import available_timezones

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_compress.data.columns import weights
from recsys_compress.data.inputs import (
    DenseInput,
    IdInput,
    Inputs,
    LabelInput,
    TimePart,
    parse_rule,
)
from recsys_compress.data.schema import Pooling
from recsys_compress.data.sources.files import (
    CSV_SUFFIXES,
    CsvFormat,
    check_columns,
    count_rows,
    find_files,
    read_tables,
)
from recsys_compress.data.sources.source import STRICT, Chunk, RawField, RawSchema, Source
from recsys_compress.data.split import (
    DEFAULT_FRACTIONS,
    SPLITS,
    Fractions,
    SplitIndex,
    check_fractions,
    ordered_split,
)
from recsys_compress.errors import UserError
from recsys_compress.files import read_toml
from recsys_compress.settings import parse


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """The label: a column, with a rule for what is positive; or one constant for all rows."""

    __pydantic_config__ = STRICT

    column: str | None = None
    positive: str | None = None
    constant: Literal[0, 1] | None = None

    @property
    def input(self) -> LabelInput | None:
        """What of raw rows is the label; None where no column is."""
        if self.column is None:
            return None
        return LabelInput(column=self.column, positive=self.positive)


@dataclass(frozen=True, kw_only=True)
class MultiValuedColumn:
    """A column of several ids per row."""

    __pydantic_config__ = STRICT

    column: str
    separator: Annotated[str, Field(min_length=1)] | None = None
    weights: str | None = None
    pooling: Pooling = "sum"


@dataclass(frozen=True, kw_only=True)
class TimeColumn:
    """A column of times, of which some parts become categorical fields."""

    __pydantic_config__ = STRICT

    column: str
    parts: tuple[TimePart, ...]
    zone: str | None = None

    def __post_init__(self) -> None:
        """Refuses a zone that is not known.

        Raises:
            ValueError: it is not.
        """
        if self.zone is not None and self.zone not in available_timezones():
            raise ValueError(f"zone {self.zone!r} is not known; name one like Europe/Berlin")


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which rows are in which split: by a column's values, or by shares."""

    __pydantic_config__ = STRICT

    column: str | None = None
    train: tuple[int | str, ...] = ()
    valid: tuple[int | str, ...] = ()
    test: tuple[int | str, ...] = ()
    fractions: Fractions = DEFAULT_FRACTIONS
    order: Literal["random", "stored"] = "random"


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """The contents of the TOML file, as in the module's example."""

    __pydantic_config__ = STRICT

    label: LabelColumn
    dense: tuple[str, ...] = ()
    dense_missing: float = 0.0
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    multi_valued: tuple[MultiValuedColumn, ...] = ()
    time: tuple[TimeColumn, ...] = ()
    weight: str | None = None
    split: SplitRule = field(default_factory=SplitRule)


@dataclass(frozen=True, kw_only=True)
class Tabular(Source):
    """Any Parquet, CSV or Arrow files.

    Attributes:
        path: file, folder or glob.
        schema_file: TOML file that says what the columns are.
    """

    name: ClassVar[str] = "parquet"

    path: str
    schema_file: str

    def schema(self) -> RawSchema:
        """Returns the columns."""
        spec = self._spec
        for path in find_files(self.path):
            check_columns(path, self._used, self._csv)
        fields = [RawField(name=name) for name in spec.categorical]
        fields += [RawField(name=f"{t.column}_{part}") for t in spec.time for part in t.parts]
        fields += [
            RawField(
                name=m.column,
                multi_valued=True,
                weighted=m.weights is not None,
                pooling=m.pooling,
            )
            for m in spec.multi_valued
        ]
        return RawSchema(
            label=spec.label.column or "label",
            dense=spec.dense,
            categorical=tuple(fields),
            weight=spec.weight,
        )

    def inputs(self) -> Inputs:
        """Returns what a model needs of raw rows."""
        spec = self._spec
        fields = [IdInput(name=n, column=n, text=n in spec.text) for n in spec.categorical]
        fields += [
            IdInput(name=f"{time.column}_{part}", column=time.column, part=part, zone=time.zone)
            for time in spec.time
            for part in time.parts
        ]
        fields += [
            IdInput(
                name=m.column,
                column=m.column,
                multi_valued=True,
                separator=m.separator,
                weights=m.weights,
            )
            for m in spec.multi_valued
        ]
        dense = tuple(DenseInput(name=n, missing=spec.dense_missing) for n in spec.dense)
        return Inputs(dense=dense, ids=tuple(fields), label=spec.label.input)

    def random_fractions(self) -> Fractions | None:
        """Returns the shares of the random split, if it is one."""
        split = self._spec.split
        return split.fractions if split.column is None and split.order == "random" else None

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time."""
        files = find_files(self.path)
        split = self._spec.split
        stored = split.column is None and split.order == "stored"
        total = count_rows(files, self._used[0], self._csv) if stored else 0
        first = 0
        for path in files:
            row = 1
            for table in read_tables(path, self._used, rows, self._csv):
                size = table.num_rows
                index = None
                if stored:
                    index = ordered_split(first, size, split.fractions, total)
                elif split.column is not None:
                    index = _split_by_column(table[split.column], split, str(path), row)
                yield Chunk(
                    table=self._convert(table, str(path), row), split=index, where=str(path)
                )
                first, row = first + size, row + size

    @cached_property
    def _spec(self) -> TableSchema:
        path = Path(self.schema_file)
        spec = parse(TableSchema, read_toml(path, "name a TOML file"), where=self.schema_file)
        _check(spec, self.schema_file)
        return spec

    @cached_property
    def _used(self) -> list[str]:
        """The columns that are read, each once."""
        spec = self._spec
        single = [spec.label.column, spec.weight, spec.split.column]
        multi = [name for m in spec.multi_valued for name in (m.column, m.weights)]
        times = [time.column for time in spec.time]
        names = [*single, *spec.dense, *spec.categorical, *multi, *times]
        return list(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def _csv(self) -> CsvFormat:
        spec = self._spec
        numbers = [*spec.dense, *([] if spec.weight is None else [spec.weight])]
        strings = [name for m in spec.multi_valued for name in (m.column, m.weights) if name]
        return CsvFormat(
            types={name: pa.float64() for name in numbers}
            | {name: pa.large_string() for name in (*strings, *spec.text)}
        )

    def _convert(self, table: pa.Table, where: str, row: int) -> pa.Table:
        spec = self._spec
        label = spec.label.input
        if label is None:
            constant = np.full(table.num_rows, spec.label.constant, dtype=np.int8)
            columns = {"label": pa.array(constant)}
        else:
            columns = {label.column: label.labels(table, where, row)}
        if spec.weight is not None:
            columns[spec.weight] = weights(table[spec.weight], spec.weight, where, row)
        if Path(where).suffix in CSV_SUFFIXES:
            for name in spec.categorical:
                if name not in spec.text:
                    _check_one_type(table[name], name, where, row)
        columns |= self.inputs().features(table, where, row)
        return pa.table(columns)


def _check_one_type(column: pa.ChunkedArray, name: str, where: str, row: int) -> None:
    """Checks that a column that CSV made text is not numbers with a stray word among them."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    number = pc.match_substring_regex(column, r"^[+-]?\d+$")
    if pc.any(number).as_py() and not pc.all(number).as_py():
        at = pc.index(number, pa.scalar(False)).as_py()
        raise UserError(
            f"{where}: column {name!r} is of mixed types: {column[at].as_py()!r} in row {row + at} "
            "among integers; mend the values, or list the column under text to read all as text"
        )


def _split_by_column(column: pa.ChunkedArray, split: SplitRule, where: str, row: int) -> SplitIndex:
    values = column.to_numpy()
    index = np.full(len(values), len(SPLITS), dtype=np.uint8)
    for position, names in enumerate((split.train, split.valid, split.test)):
        for name in names:
            index[values == name] = position
    lost = np.flatnonzero(index == len(SPLITS))
    if len(lost):
        raise UserError(
            f"{where}: column {split.column!r} is {column[int(lost[0])].as_py()!r} in row "
            f"{row + int(lost[0])}, which no split names; add it to train, valid or test"
        )
    return index


def _check(spec: TableSchema, where: str) -> None:
    """Checks what the types alone do not say."""
    label, split = spec.label, spec.split
    if (label.column is None) == (label.constant is None):
        raise UserError(f"{where}: label: give either column or constant")
    if label.positive is not None:
        parse_rule(label.positive)
    check_fractions(split.fractions, where)
    named = (split.train, split.valid, split.test)
    if any(named) != (split.column is not None) or (any(named) and not all(named)):
        raise UserError(f"{where}: split: column, train, valid and test go together")
    for name in spec.text:
        if name not in spec.categorical:
            raise UserError(f"{where}: text: {name!r} is not one of the categorical columns")
