"""Shards of one split, written as their row groups fill."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_compress.data.dataset import FileInfo, SplitInfo
from recsys_compress.files import sha256


class ShardWriter:
    """Writes the rows of one split as `<root>/<split>/00000.parquet`, ...

    The files depend on the rows only, not on the pieces in which they come.

    Args:
        root: the dataset's folder.
        split: name of the split.
        label: name of the label column.
        rows_per_file: rows of every file but the last.
        row_group_rows: rows of every row group but a file's last.
    """

    def __init__(
        self, root: Path, split: str, *, label: str, rows_per_file: int, row_group_rows: int
    ) -> None:
        self._root = root
        self._split = split
        self._label = label
        self._rows_per_file = rows_per_file
        self._row_group_rows = row_group_rows
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._file_rows = 0
        self._positives = 0
        self._files: list[FileInfo] = []
        (root / split).mkdir()

    def write(self, table: pa.Table) -> None:
        """Takes in rows."""
        self._positives += pc.sum(table[self._label]).as_py() or 0
        self._pending.append(table)
        self._pending_rows += table.num_rows
        while self._pending_rows >= self._row_group_rows:
            self._flush()

    def close(self) -> SplitInfo:
        """Writes what is left; returns what was written."""
        while self._pending_rows:
            self._flush()
        self._finish_file()
        rows = sum(info.rows for info in self._files)
        return SplitInfo(
            files=tuple(self._files), rows=rows, label_rate=self._positives / rows if rows else 0.0
        )

    def abort(self) -> None:
        """Lets go of the open file after a failure."""
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        """Writes one row group: as many pending rows as fit it and the file."""
        table = pa.concat_tables(self._pending)
        size = min(self._row_group_rows, self._rows_per_file - self._file_rows, table.num_rows)
        group = table.slice(0, size).combine_chunks()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path(),
                group.schema,
                # Ids repeat and numbers seldom do; reading is a third faster than by default.
                compression="none",
                use_dictionary=_id_columns(group.schema),
            )
        self._writer.write_table(group, row_group_size=size)
        self._file_rows += size
        self._pending, self._pending_rows = [table.slice(size)], table.num_rows - size
        if self._file_rows == self._rows_per_file:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._files.append(file_info(self._root, self._path(), self._file_rows))
        self._writer, self._file_rows = None, 0

    def _path(self) -> Path:
        return self._root / self._split / f"{len(self._files):05}.parquet"


def _id_columns(schema: pa.Schema) -> list[str]:
    """Returns the Parquet paths of integer columns and of lists of integers."""
    lists = [f.name for f in schema if pa.types.is_list(f.type)]
    return [f.name for f in schema if pa.types.is_integer(f.type)] + [
        f"{name}.list.element" for name in lists
    ]


def file_info(root: Path, path: Path, rows: int) -> FileInfo:
    """Describes a finished file of the dataset in `root`."""
    return FileInfo(
        path=path.relative_to(root).as_posix(),
        rows=rows,
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )
