"""Columns of Parquet, CSV and Arrow files, some rows at a time."""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

from recsys_compress.errors import UserError, nearest

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
SUFFIXES = (".parquet", ".arrow", ".feather", *CSV_SUFFIXES)

_CSV_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class CsvFormat:
    """How text files are read; other formats say so themselves.

    Attributes:
        types: types of columns that are not to be guessed from the first rows.
        names: of the columns, where the files have no header.
    """

    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    names: tuple[str, ...] | None = None


def find_files(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Returns the data files that `path` names: one file, a folder's, or those of a glob.

    Raises:
        UserError: there are none.
    """
    place = Path(path)
    if place.is_dir():
        found = sorted(f for f in place.rglob("*") if f.suffix in suffixes and f.is_file())
    else:
        found = [place] if place.is_file() else [Path(f) for f in sorted(glob.glob(path))]
    bad = [f for f in found if f.suffix not in suffixes]
    if bad or not found:
        what = f"{bad[0]}: is no data file" if bad else f"{path}: no data file there"
        raise UserError(f"{what}; name a file, folder or glob of {', '.join(suffixes)}")
    return found


def check_columns(path: Path, names: Iterable[str], csv: CsvFormat) -> None:
    """Checks that a file has some columns.

    Raises:
        UserError: it cannot be read, is empty, or lacks a column.
    """
    known = column_names(path, csv)
    for name in names:
        if name not in known:
            raise UserError(f"{path}: column {name!r} is missing; {nearest(name, known)}")
        if known.count(name) > 1:
            raise UserError(f"{path}: column {name!r} is there {known.count(name)} times; rename")


def column_names(path: Path, csv: CsvFormat | None = None) -> list[str]:
    """Returns the names of a file's columns.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        return _column_names(path, csv or CsvFormat())
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def read_tables(
    path: Path, columns: Iterable[str], rows: int, csv: CsvFormat
) -> Iterator[pa.Table]:
    """Yields some columns of a file, at most `rows` rows at a time.

    Args:
        path: the file.
        columns: which columns; they must exist.
        rows: most rows per table.
        csv: how to read it, if it is a text file.

    Raises:
        UserError: the file cannot be read, or holds values of other types than expected.
    """
    names = list(dict.fromkeys(columns))
    batches = _batches(path, names, rows, csv)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error, csv) from error
        if batch is None:
            return
        table = pa.Table.from_batches([batch]).select(names)
        for first in range(0, table.num_rows, rows):
            yield table.slice(first, rows)


def count_rows(files: Iterable[Path], column: str, csv: CsvFormat) -> int:
    """Returns the rows of all files, by reading one column."""
    return sum(t.num_rows for path in files for t in read_tables(path, [column], 1 << 20, csv))


def unreadable(path: Path, error: Exception, csv: CsvFormat | None = None) -> UserError:
    """Returns the error for a raw file that cannot be read, on one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"In CSV column #(\d+): (.*)", reason)
    if found is None or csv is None:
        return UserError(f"{path}: cannot be read: {reason}")
    column = _column_names(path, csv)[int(found[1])]
    return UserError(
        f"{path}: column {column!r} is of mixed types: {found[2]}; mend the values, or read the "
        f"column as text"
    )


def _column_names(path: Path, csv: CsvFormat) -> list[str]:
    if path.suffix == ".parquet":
        return list(pq.read_schema(path).names)
    if path.suffix in CSV_SUFFIXES:
        with _open_csv(path, None, csv) as reader:
            return list(reader.schema.names)
    with pa.memory_map(str(path)) as file, _open_ipc(file) as reader:
        return list(reader.schema.names)


def _batches(path: Path, columns: list[str], rows: int, csv: CsvFormat) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns, use_threads=False)
    elif path.suffix in CSV_SUFFIXES:
        with _open_csv(path, columns, csv) as reader:
            yield from reader
    else:
        with pa.memory_map(str(path)) as file, _open_ipc(file) as reader:
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
            else:
                yield from reader


def _open_csv(path: Path, columns: list[str] | None, csv: CsvFormat) -> pa.csv.CSVStreamingReader:
    return pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(
            block_size=_CSV_BLOCK_BYTES, use_threads=False, column_names=csv.names
        ),
        parse_options=pa.csv.ParseOptions(delimiter="," if path.suffix == ".csv" else "\t"),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict(csv.types),
            include_columns=columns,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _open_ipc(file: pa.NativeFile) -> pa.ipc.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)
