"""Raw rows to what a model reads: the same columns, types and ids as in training."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.data.encode import FieldEncoder, flat, kind
from recsys_compress.data.inputs import IdInput, Inputs
from recsys_compress.data.schema import Schema
from recsys_compress.errors import UserError

EXACT = 2**53  # integers up to here are exact in float64

Features = Mapping[str, pa.ChunkedArray]


def check_columns(names: Sequence[str], inputs: Inputs, where: str) -> None:
    """Checks that rows have all columns that a model reads, each once.

    Raises:
        UserError: names all that are missing, or one that is there several times.
    """
    missing = [name for name in inputs.columns() if name not in names]
    if missing:
        raise UserError(
            f"{where}: columns are missing: {', '.join(missing)}; the model reads "
            f"{', '.join(inputs.columns())}"
        )
    for name in inputs.columns():
        check_once(names, name, where)


def check_once(names: Sequence[str], name: str, where: str) -> None:
    """Checks that no other column has a column's name.

    Raises:
        UserError: one has.
    """
    if names.count(name) > 1:
        raise UserError(f"{where}: column {name!r} is there {names.count(name)} times; rename")


def to_table(rows: Any, inputs: Inputs, where: str) -> pa.Table:
    """Returns the columns that a model reads, of a pandas DataFrame or Arrow table.

    Raises:
        UserError: it is neither, lacks a column, or a column is of mixed types.
    """
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        check_columns(rows.column_names, inputs, where)
        return rows.select(inputs.columns())
    pandas = sys.modules.get("pandas")  # who gives a DataFrame has imported it
    if pandas is None or not isinstance(rows, pandas.DataFrame):
        raise UserError(
            f"{where}: are {type(rows).__name__}; give a pandas DataFrame, an Arrow table or the "
            "path of a Parquet file"
        )
    check_columns(list(rows.columns), inputs, where)
    dense = {column.name for column in inputs.dense}
    arrays = {}
    for name in inputs.columns():
        arrays[name] = _from_pandas(rows[name], name, where, dense=name in dense)
    return pa.table(arrays)


def features(table: pa.Table, inputs: Inputs, where: str, row: int = 1) -> Features:
    """Returns the features of raw rows, ids not yet encoded.

    Args:
        table: has the columns that the model reads.
        inputs: which ones, and how they become features.
        where: their file, for messages.
        row: number of the first row, from 1.

    Raises:
        UserError: a column holds what it must not, or ids of another kind than in training.
    """
    found = inputs.features(table, where, row)
    for field in inputs.ids:
        _check_kind(found[field.name], field, where)
    return found


def tensors(
    found: Features, schema: Schema, encoders: Mapping[str, FieldEncoder]
) -> tuple[Tensor, KeyedJaggedTensor]:
    """Returns (B, N) dense features and the ids of B rows.

    Args:
        found: features as `features` gives them.
        schema: the model's features.
        encoders: by categorical field.
    """
    columns = [found[name].to_numpy().astype(np.float32, copy=False) for name in schema.dense]
    rows = len(found[schema.categorical[0].name])
    dense = np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.float32)
    any_weighted = any(field.weighted for field in schema.categorical)
    values, lengths, weights = [], [], []
    for field in schema.categorical:
        column = found[field.name]
        ids = torch.from_numpy(encoders[field.name].encode(flat(column)))
        values.append(ids)
        lengths.append(_lengths(column, rows))
        if any_weighted:
            weights.append(
                torch.tensor(flat(found[f"{field.name}.weights"]).to_numpy())
                if field.weighted
                else torch.ones(len(ids))
            )
    sparse = KeyedJaggedTensor(
        keys=[field.name for field in schema.categorical],
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if any_weighted else None,
        stride=rows,
        length_per_key=[len(ids) for ids in values],
    )
    return torch.from_numpy(dense), sparse


def _lengths(column: pa.ChunkedArray, rows: int) -> Tensor:
    if not pa.types.is_large_list(column.type):
        return torch.ones(rows, dtype=torch.int64)
    lengths = [chunk.value_lengths().to_numpy() for chunk in column.chunks]
    return torch.from_numpy(np.concatenate(lengths).astype(np.int64, copy=False))


def _check_kind(column: pa.ChunkedArray, field: IdInput, where: str) -> None:
    values = flat(column)
    if field.kind is None or values.null_count == len(values) or kind(values.type) == field.kind:
        return
    raise UserError(
        f"{where}: column {field.column!r} holds {kind(values.type)}s, but {field.kind}s in "
        "training; cast it"
    )


def _from_pandas(series: Any, name: str, where: str, *, dense: bool) -> pa.Array:
    """Returns a column, its NaN and None as null.

    pandas makes floats of integers as soon as one is missing; whole numbers become integers again.
    """
    if not dense and series.dtype.kind == "f":
        present = series[series.notna()]
        odd = present[(present != present.round()) | (present.abs() > EXACT)]
        if len(odd):
            raise UserError(
                f"{where}: column {name!r} holds {odd.iloc[0]!r}; ids must be integers or strings"
            )
        series = series.astype("Int64")
    try:
        array = pa.Array.from_pandas(series)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{where}: column {name!r} is of mixed types: {error}") from error
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
