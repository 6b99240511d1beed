"""The rows of a split as one sequence of row groups, read in part into arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.data.dataset import PreparedDataset, damaged
from recsys_compress.data.schema import CategoricalField, Schema
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError

Ids = npt.NDArray[np.signedinteger]
Floats = npt.NDArray[np.float32]

_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a row group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Jagged:
    """The bags of a multi-valued field: row i holds values[offsets[i]:offsets[i + 1]].

    Attributes:
        values: (total ids,) ids.
        offsets: (N + 1,) int64.
        weights: (total ids,) float32, or None where the field has none.
    """

    values: Ids
    offsets: npt.NDArray[np.int64]
    weights: Floats | None

    def take(self, positions: npt.NDArray[np.int64]) -> "Jagged":
        """Returns the bags at `positions`."""
        starts = self.offsets[positions]
        lengths = self.offsets[positions + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        index = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
        return Jagged(
            values=self.values[index],
            offsets=np.concatenate([[0], ends]),
            weights=None if self.weights is None else self.weights[index],
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows in memory.

    Attributes:
        labels: (N,) float32.
        weights: (N,) float32 example weights, or None.
        dense: (N, D) float32.
        single: (N, S) ids of the S single-valued fields, in schema order. Rows are contiguous, so
            that taking random ones touches few cache lines.
        jagged: bags by name of the multi-valued field.
    """

    labels: Floats
    weights: Floats | None
    dense: Floats
    single: Ids
    jagged: dict[str, Jagged]

    def __len__(self) -> int:
        return len(self.labels)


class Shards:
    """The shards of one split; every id handed out is checked against its field.

    Args:
        dataset: the prepared dataset.
        split: which split.

    Attributes:
        group_rows: (number of row groups,) rows of each row group, over all shards.

    Raises:
        UserError: a shard cannot be read or has other rows than the dataset says.
    """

    def __init__(self, dataset: PreparedDataset, split: Split) -> None:
        self.schema = dataset.schema
        self._groups: list[tuple[Path, int]] = []
        rows: list[int] = []
        for path, info in zip(
            dataset.files(split), dataset.manifest.splits[split].files, strict=True
        ):
            groups = _group_rows(path, info.rows)
            self._groups += [(path, index) for index in range(len(groups))]
            rows += groups
        self.group_rows = np.array(rows, dtype=np.int64)
        self._columns = _columns(self.schema)
        self._id_type = _id_type(self.schema)
        self._last: tuple[int, pa.Table] | None = None

    def read(self, pieces: list[Piece]) -> Rows:
        """Returns the rows of `pieces`, one after the other.

        Raises:
            UserError: a shard cannot be read, or holds an id that its field does not have.
        """
        schema = self.schema
        size = sum(piece.stop - piece.start for piece in pieces)
        single = [field for field in schema.categorical if not field.multi_valued]
        rows = Rows(
            labels=np.empty(size, dtype=np.float32),
            weights=None if schema.weight is None else np.empty(size, dtype=np.float32),
            dense=np.empty((size, len(schema.dense)), dtype=np.float32),
            single=np.empty((size, len(single)), dtype=self._id_type),
            jagged={},
        )
        bags: dict[str, list[Jagged]] = {f.name: [] for f in schema.categorical if f.multi_valued}
        first = 0
        for piece in pieces:
            path = self._groups[piece.group][0]
            table = self._table(piece.group).slice(piece.start, piece.stop - piece.start)
            here = slice(first, first + table.num_rows)
            rows.labels[here] = _numpy(table, schema.label)
            if rows.weights is not None and schema.weight is not None:
                rows.weights[here] = _numpy(table, schema.weight)
            _interleave([_numpy(table, name) for name in schema.dense], rows.dense[here])
            ids = [_checked(_numpy(table, field.name), field, path) for field in single]
            _interleave(ids, rows.single[here])
            for name, parts in bags.items():
                parts.append(_bags(table, self._field(name), path))
            first = here.stop
        rows.jagged.update(
            {name: _concatenate(parts, self._field(name).weighted) for name, parts in bags.items()}
        )
        return rows

    def joined(self, parts: Sequence[tuple[Rows, npt.NDArray[np.int64]]]) -> tuple[Rows, Ids]:
        """Returns rows out of several places as one, and their positions there."""
        none = self.read([])
        found = [none, *(_taken(rows, positions) for rows, positions in parts)]
        weights = [rows.weights for rows in found if rows.weights is not None]
        joined = Rows(
            labels=np.concatenate([rows.labels for rows in found]),
            weights=np.concatenate(weights) if weights else None,
            dense=np.concatenate([rows.dense for rows in found]),
            single=np.concatenate([rows.single for rows in found]),
            jagged={
                name: _concatenate([rows.jagged[name] for rows in found], bags.weights is not None)
                for name, bags in none.jagged.items()
            },
        )
        return joined, np.arange(len(joined))

    def _field(self, name: str) -> CategoricalField:
        return next(field for field in self.schema.categorical if field.name == name)

    def _table(self, group: int) -> pa.Table:
        """Returns a row group; the last one read is kept, as buffers may meet inside it."""
        last = self._last
        if last is not None and last[0] == group:
            return last[1]
        path, index = self._groups[group]
        try:
            with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
                table = file.read_row_group(index, columns=self._columns, use_threads=False)
            table = table.select(self._columns).combine_chunks()
        except (OSError, KeyError, pa.ArrowException) as error:
            raise damaged(path, error) from error
        self._last = (group, table)
        return table


def _group_rows(path: Path, expected: int) -> list[int]:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if sum(rows) != expected:
        raise UserError(f"{path}: has {sum(rows)} rows, not {expected}; prepare the dataset anew")
    return rows


def _columns(schema: Schema) -> list[str]:
    weights = [f"{field.name}.weights" for field in schema.categorical if field.weighted]
    example_weight = [] if schema.weight is None else [schema.weight]
    ids = [field.name for field in schema.categorical]
    return [schema.label, *example_weight, *schema.dense, *ids, *weights]


def _id_type(schema: Schema) -> type[np.int32] | type[np.int64]:
    sizes = [field.num_embeddings for field in schema.categorical if not field.multi_valued]
    return np.int32 if max(sizes, default=0) <= 2**31 else np.int64


def _numpy(table: pa.Table, name: str) -> npt.NDArray[np.generic]:
    column = table[name]
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _interleave(columns: Sequence[npt.NDArray[np.generic]], out: npt.NDArray[np.generic]) -> None:
    """Writes n columns of R values into `out`, shape (R, n), block by block to stay in cache."""
    for start in range(0, len(out) if columns else 0, _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        np.stack([column[start:stop] for column in columns], axis=1, out=out[start:stop])


def _checked(ids: npt.NDArray[np.generic], field: CategoricalField, path: Path) -> Ids:
    """Returns the ids if all lie in the field's range: a kernel would read and train row 0."""
    if ids.dtype.kind != "i":
        raise UserError(f"{path}: column {field.name!r} holds no ids; prepare the dataset anew")
    for id_ in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= id_ < field.num_embeddings:
            raise UserError(
                f"{path}: column {field.name!r} holds id {id_}, outside "
                f"[0, {field.num_embeddings}); prepare the dataset anew"
            )
    return ids  # type: ignore[return-value]


def _bags(table: pa.Table, field: CategoricalField, path: Path) -> Jagged:
    lists = table[field.name].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    weights = None
    if field.weighted:
        weights = table[f"{field.name}.weights"].combine_chunks().flatten().to_numpy()
    values = _checked(lists.flatten().to_numpy(), field, path)
    if weights is not None and len(weights) != len(values):
        raise UserError(
            f"{path}: column {field.name!r} has {len(values)} ids and {len(weights)} weights; "
            "prepare the dataset anew"
        )
    return Jagged(values=values, offsets=offsets - offsets[0], weights=weights)


def _taken(rows: Rows, positions: npt.NDArray[np.int64]) -> Rows:
    return Rows(
        labels=rows.labels[positions],
        weights=None if rows.weights is None else rows.weights[positions],
        dense=rows.dense[positions],
        single=rows.single[positions],
        jagged={name: bags.take(positions) for name, bags in rows.jagged.items()},
    )


def _concatenate(parts: list[Jagged], weighted: bool) -> Jagged:
    lengths = [np.empty(0, dtype=np.int64), *(np.diff(part.offsets) for part in parts)]
    weights = [part.weights for part in parts if part.weights is not None]
    empty = [np.empty(0, dtype=np.float32)]
    return Jagged(
        values=np.concatenate([np.empty(0, dtype=np.int32), *(part.values for part in parts)]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        weights=np.concatenate([*empty, *weights]) if weighted else None,
    )
