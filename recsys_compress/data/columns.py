"""Raw columns brought to the types that `prepare` takes, with errors that name file and column."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_compress.errors import UserError


def labels(column: pa.ChunkedArray, name: str, where: str, first_row: int) -> pa.ChunkedArray:
    """Returns a label column as int8.

    Args:
        column: numbers or booleans.
        name: of the column.
        where: its file.
        first_row: number of its first row, from 1.

    Raises:
        UserError: a value is neither 0 nor 1.
    """
    if not (_is_number(column.type) or pa.types.is_boolean(column.type)):
        raise UserError(f"{where}: label {name!r} is {column.type}; it must hold 0 and 1")
    numbers = pc.cast(column, pa.float64())
    bad = pc.fill_null(pc.invert(pc.is_in(numbers, value_set=pa.array([0.0, 1.0]))), True)
    row = _first(bad)
    if row is not None:
        raise UserError(
            f"{where}: label {name!r} is {column[row].as_py()!r} in row {first_row + row}; "
            "it must be 0 or 1"
        )
    return pc.cast(numbers, pa.int8())


def floats(
    column: pa.ChunkedArray, name: str, where: str, first_row: int, *, missing: float | None
) -> pa.ChunkedArray:
    """Returns a column of numbers as float32, nulls as `missing`.

    Args:
        column: numbers.
        name: of the column.
        where: its file.
        first_row: number of its first row, from 1.
        missing: stands for null; None refuses null.

    Raises:
        UserError: a value is NaN, infinite or too large for float32, or the type is no number.
    """
    if pa.types.is_null(column.type):
        column = pc.cast(column, pa.float32())
    if not (_is_number(column.type) or pa.types.is_boolean(column.type)):
        raise UserError(f"{where}: column {name!r} is {column.type}; it must hold numbers")
    numbers = pc.cast(column, pa.float32(), safe=False)
    if missing is not None:
        numbers = pc.fill_null(numbers, missing)
    row = _first(pc.fill_null(pc.invert(pc.is_finite(numbers)), True))
    if row is not None:
        raise UserError(
            f"{where}: column {name!r} is {column[row].as_py()!r} in row {first_row + row}; "
            "it must be a finite number"
        )
    return numbers


def ids(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Returns a column of ids as int64 or large_string.

    Raises:
        UserError: the values are neither integers nor strings.
    """
    kind = column.type
    if _is_list(kind):
        raise UserError(f"{where}: column {name!r} holds lists; name it under multi_valued")
    if pa.types.is_dictionary(kind):
        return ids(pc.cast(column, kind.value_type), name, where)
    if _is_string(kind):
        return pc.cast(column, pa.large_string())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        try:
            return pc.cast(column, pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(f"{where}: column {name!r} does not fit 64 bits: {error}") from error
    raise UserError(f"{where}: column {name!r} is {kind}; ids must be integers or strings: cast it")


def texts(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Returns a column of ids as large_string, whatever they are.

    Raises:
        UserError: the values have no text.
    """
    try:
        return pc.cast(column, pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{where}: column {name!r} is {column.type}, which has no text; leave it out of `text`"
        ) from error


def lists(column: pa.ChunkedArray, separator: str | None, name: str, where: str) -> pa.ChunkedArray:
    """Returns a column of lists as it is, and one of strings cut at `separator`.

    Raises:
        UserError: the column holds neither.
    """
    if _is_list(column.type):
        return column
    if not _is_string(column.type) or separator is None:
        if len(column) and column.null_count == len(column):  # of no type that says anything
            return pa.chunked_array([pa.nulls(len(column), pa.list_(pa.null()))])
        raise UserError(
            f"{where}: column {name!r} is {column.type}; a multi-valued column holds lists, or "
            "strings and a separator is given"
        )
    empty = pc.equal(column, "")
    return pc.split_pattern(pc.if_else(empty, None, column), separator)


def id_lists(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Returns lists of int64 or large_string; a null list becomes an empty one.

    Raises:
        UserError: the values are neither integers nor strings.
    """
    array = column.combine_chunks()
    values = ids(pa.chunked_array([array.flatten()]), name, where).combine_chunks()
    return pa.chunked_array([_rebuild(array, values)])


def weights(column: pa.ChunkedArray, name: str, where: str, first_row: int) -> pa.ChunkedArray:
    """Returns a column of example weights as float32; arguments as of `floats`.

    Raises:
        UserError: a weight is missing, negative or not finite.
    """
    numbers = floats(column, name, where, first_row, missing=None)
    row = _first(pc.less(numbers, 0))
    if row is not None:
        raise UserError(
            f"{where}: weight {name!r} is {column[row].as_py()!r} in row {first_row + row}; "
            "weights must not be negative"
        )
    return numbers


def list_weights(
    weights: pa.ChunkedArray, ids: pa.ChunkedArray, name: str, where: str, first_row: int
) -> pa.ChunkedArray:
    """Returns lists of float32, one number per id.

    Args:
        weights: lists of numbers, or of strings that are numbers.
        ids: the lists of ids beside them.
        name: of the column of weights.
        where: its file.
        first_row: number of its first row, from 1.

    Raises:
        UserError: a row has not one number per id, or a number is not finite.
    """
    array = weights.combine_chunks()
    row = _first(pc.not_equal(_lengths(array), _lengths(ids.combine_chunks())))
    if row is not None:
        raise UserError(
            f"{where}: column {name!r} has not one weight per id in row {first_row + row}"
        )
    values = array.flatten()
    try:
        numbers = pc.cast(values, pa.float64()).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{where}: column {name!r} holds no numbers: {error}") from error
    at = _first(pc.fill_null(pc.invert(pc.is_finite(numbers)), True))
    if at is not None:
        row = int(np.searchsorted(np.cumsum(_lengths(array)), at, side="right"))
        raise UserError(
            f"{where}: column {name!r} holds {values[at].as_py()!r} in row {first_row + row}; "
            "it must hold finite numbers"
        )
    return pa.chunked_array([_rebuild(array, numbers)])


def _rebuild(array: pa.Array, values: pa.Array) -> pa.Array:
    """Returns the lists of `array` over other values; a null list becomes an empty one."""
    ends = np.cumsum(_lengths(array).to_numpy(zero_copy_only=False), dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(np.append(np.int64(0), ends)), values)


def _lengths(array: pa.Array) -> pa.Array:
    return pc.fill_null(pc.cast(pc.list_value_length(array), pa.int64()), 0)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_string(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _is_number(kind: pa.DataType) -> bool:
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(check(kind) for check in checks)


def _first(mask: pa.ChunkedArray | pa.Array) -> int | None:
    """Returns the first row that is true."""
    row = pc.index(mask, True).as_py()
    return None if row < 0 else int(row)
