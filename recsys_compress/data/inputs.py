"""What raw rows hold, and how their columns become features: the same in training and serving."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from recsys_compress.data.columns import (
    floats,
    id_lists,
    ids,
    labels,
    list_weights,
    lists,
    texts,
)
from recsys_compress.errors import UserError

TimePart = Literal["hour", "weekday", "day", "month"]
Kind = Literal["integer", "string"]

_COMPARISONS = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    ">": pc.greater,
    "<": pc.less,
}
_PARTS = {"hour": pc.hour, "weekday": pc.day_of_week, "day": pc.day, "month": pc.month}


@dataclass(frozen=True, kw_only=True)
class LabelInput:
    """The label.

    Attributes:
        column: the raw column.
        positive: rule for what is positive, like ">=4"; None where the column holds 0 and 1.
    """

    column: str
    positive: str | None = None

    def labels(self, table: pa.Table, where: str, row: int) -> pa.ChunkedArray:
        """Returns the labels as int8; arguments as of `Inputs.features`."""
        column = table[self.column]
        if self.positive is None:
            return labels(column, self.column, where, row)
        comparison, value = parse_rule(self.positive)
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        try:
            positive = _COMPARISONS[comparison](column, value if text else float(value))
        except (ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{where}: label {self.column!r} is {column.type} and cannot be compared with "
                f"{value!r}; mend label.positive"
            ) from error
        return labels(positive, self.column, where, row)


@dataclass(frozen=True, kw_only=True)
class DenseInput:
    """A dense feature.

    Attributes:
        name: of the raw column and of the feature.
        missing: stands for a missing number; None where none may be missing.
        shift: where there is one, the feature is ln(max(x + shift, 1)).
    """

    name: str
    missing: float | None = None
    shift: float | None = None

    def feature(self, table: pa.Table, where: str, row: int) -> pa.ChunkedArray:
        """Returns the feature as float32; arguments as of `features`."""
        numbers = floats(table[self.name], self.name, where, row, missing=self.missing)
        if self.shift is None:
            return numbers
        logarithms = pc.ln(pc.max_element_wise(pc.add(numbers, self.shift), 1.0))
        return pc.cast(logarithms, pa.float32())


@dataclass(frozen=True, kw_only=True)
class IdInput:
    """A categorical field.

    Attributes:
        name: of the field.
        column: the raw column it is made of.
        text: whether integers are read as text.
        part: what of a time is the id, where the column holds times.
        zone: in which times that name a zone are told; UTC where it is None.
        multi_valued: whether a row holds several ids.
        separator: cuts strings into several ids.
        weights: the raw column with a weight for each id, if there is one.
        kind: what the ids were in training; None where that is not known.
    """

    name: str
    column: str
    text: bool = False
    part: TimePart | None = None
    zone: str | None = None
    multi_valued: bool = False
    separator: str | None = None
    weights: str | None = None
    kind: Kind | None = None

    def columns(self) -> list[str]:
        """Returns the raw columns it is made of."""
        return [self.column, *([] if self.weights is None else [self.weights])]

    def features(self, table: pa.Table, where: str, row: int) -> dict[str, pa.ChunkedArray]:
        """Returns its ids and, if it has them, their weights; arguments as of `features`."""
        column = table[self.column]
        if self.text:
            column = texts(column, self.column, where)
        if self.part is not None:
            stamps = _wall_times(column, self.zone, self.column, where)
            return {self.name: pc.cast(_PARTS[self.part](stamps), pa.int64())}
        if not self.multi_valued:
            return {self.name: ids(column, self.column, where)}
        values = lists(column, self.separator, self.column, where)
        found = {self.name: id_lists(values, self.column, where)}
        if self.weights is not None:
            raw = lists(table[self.weights], self.separator, self.weights, where)
            weights = list_weights(raw, values, self.weights, where, row)
            found[f"{self.name}.weights"] = weights
        return found


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a model reads of raw rows.

    Attributes:
        dense: the dense features.
        ids: the categorical fields.
        label: what of raw rows is the label, which scoring does not read; None where it is a column
            of 0 and 1 of the label's name.
    """

    dense: tuple[DenseInput, ...] = ()
    ids: tuple[IdInput, ...]
    label: LabelInput | None = None

    def columns(self) -> list[str]:
        """Returns the raw columns, each once."""
        names = [dense.name for dense in self.dense]
        names += [column for field in self.ids for column in field.columns()]
        return list(dict.fromkeys(names))

    def features(self, table: pa.Table, where: str, row: int) -> dict[str, pa.ChunkedArray]:
        """Returns the features of raw rows, before ids are encoded.

        Args:
            table: has the raw columns.
            where: its file, for messages.
            row: number of its first row, from 1.

        Raises:
            UserError: a column holds what it must not.
        """
        found = {dense.name: dense.feature(table, where, row) for dense in self.dense}
        for field in self.ids:
            found |= field.features(table, where, row)
        return found


def parse_rule(text: str) -> tuple[str, str]:
    """Returns the comparison and the value of a rule like ">=4".

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", text)
    if found is None:
        raise UserError(f'label.positive = {text!r}: write it like ">=4" or "==click"')
    return found[1], found[2]


def plain(dense: Sequence[str], categorical: Sequence[str]) -> Inputs:
    """Returns inputs whose raw columns are the features: one id a row, no number missing."""
    return Inputs(
        dense=tuple(DenseInput(name=name) for name in dense),
        ids=tuple(IdInput(name=name, column=name) for name in categorical),
    )


def _wall_times(
    column: pa.ChunkedArray, zone: str | None, name: str, where: str
) -> pa.ChunkedArray:
    """Returns times as a clock in a zone shows them, in whatever zone they are written.

    Those that name none are taken as they stand.
    """
    if pa.types.is_integer(column.type):
        raise UserError(
            f"{where}: column {name!r} holds no times: integers do not say their unit; store "
            "timestamps, or text like 2017-11-07 09:30:38"
        )
    try:
        if not pa.types.is_timestamp(column.type):
            column = _parsed(column)
        if column.type.tz is None:
            return column
        if zone is None:  # Arrow counts in UTC
            return pc.cast(column, pa.timestamp(column.type.unit))
        return pc.local_timestamp(pc.cast(column, pa.timestamp(column.type.unit, zone)))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{where}: column {name!r} holds no times: {' '.join(str(error).split())}"
        ) from error


def _parsed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return pc.cast(column, pa.timestamp("us"))
    except pa.ArrowInvalid:
        return pc.cast(column, pa.timestamp("us", "UTC"))  # text that names a zone
