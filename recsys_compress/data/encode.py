"""Raw values to ids, by vocabulary or by hash, and how often each occurs."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_compress.data.hashing import fold, hash_values
from recsys_compress.data.inputs import Kind
from recsys_compress.data.schema import (
    HASH_NUM_EMBEDDINGS,
    MISSING_ID,
    NUM_RESERVED_IDS,
    UNKNOWN_ID,
    Encoding,
)

Int64s = npt.NDArray[np.int64]

_COMPACT_ROWS = 1 << 20


class Counter:
    """Counts distinct values of a stream; memory grows with the distinct values only."""

    def __init__(self) -> None:
        self.missing = 0
        self._counts: pa.Table | None = None
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, values: pa.Array) -> None:
        """Counts an int64 or large_string array; all arrays without nulls are of one type."""
        self.missing += values.null_count
        counts = pc.value_counts(values.drop_null())
        if not len(counts):
            return
        self._pending.append(
            pa.table({"value": counts.field("values"), "count": counts.field("counts")})
        )
        self._pending_rows += len(counts)
        known = 0 if self._counts is None else self._counts.num_rows
        if self._pending_rows > max(_COMPACT_ROWS, known):
            self._compact()

    def result(self) -> pa.Table:
        """Returns columns value and count, by falling count, equal counts by value."""
        self._compact()
        if self._counts is None:
            return pa.table({"value": pa.array([], pa.int64()), "count": pa.array([], pa.int64())})
        return self._counts.sort_by([("count", "descending"), ("value", "ascending")])

    def _compact(self) -> None:
        tables = self._pending if self._counts is None else [self._counts, *self._pending]
        if self._pending:
            groups = pa.concat_tables(tables).group_by("value", use_threads=False)
            self._counts = groups.aggregate([("count", "sum")]).rename_columns(["value", "count"])
        self._pending, self._pending_rows = [], 0


class FieldEncoder(ABC):
    """Turns the raw values of one field into ids, after it has counted the training split."""

    @abstractmethod
    def count(self, values: pa.Array) -> None:
        """Takes in values of the training split."""

    @abstractmethod
    def freeze(self) -> pa.Table:
        """Ends counting; returns columns id and count, and value where values are kept."""

    @abstractmethod
    def encode(self, values: pa.Array) -> Int64s:
        """Returns the id of each value of an int64 or large_string array."""

    @property
    @abstractmethod
    def num_embeddings(self) -> int:
        """Ids lie in [0, num_embeddings)."""


class VocabularyEncoder(FieldEncoder):
    """Ids by falling training frequency; a value rarer than `min_count` is unknown."""

    def __init__(self, min_count: int) -> None:
        self._min_count = min_count
        self._counter = Counter()
        self._index = _Index(pa.array([], pa.int64()))

    @classmethod
    def of(cls, values: pa.Array) -> "VocabularyEncoder":
        """Returns the encoder of a known vocabulary: distinct values, in the order of their ids."""
        encoder = cls(min_count=1)
        encoder._index = _Index(values)
        return encoder

    @property
    def num_embeddings(self) -> int:
        """One more than the greatest id there may be."""
        return len(self._index) + NUM_RESERVED_IDS

    @property
    def values(self) -> pa.Array:
        """The known values, in the order of their ids."""
        return self._index.values

    def count(self, values: pa.Array) -> None:
        """Takes in values of the training split."""
        self._counter.add(values)

    def freeze(self) -> pa.Table:
        """Ends counting; returns the counts by id."""
        counted, missing = self._counter.result(), self._counter.missing
        self._counter = Counter()
        counts = counted["count"].to_numpy()
        known = int(np.searchsorted(-counts, -self._min_count, side="right"))
        values = counted["value"].slice(0, known).combine_chunks()
        self._index = _Index(values)
        return pa.table(
            {
                "id": np.arange(self.num_embeddings),
                "count": np.concatenate([[missing, counts[known:].sum()], counts[:known]]),
                "value": pa.concat_arrays([pa.nulls(NUM_RESERVED_IDS, values.type), values]),
            }
        )

    def encode(self, values: pa.Array) -> Int64s:
        """Returns the id of each value."""
        if pa.types.is_integer(values.type):  # to find one costs less than to know it again
            known = values.fill_null(0) if values.null_count else values
            found = self._ids(known)
            if values.null_count:
                found[values.is_null().to_numpy(zero_copy_only=False)] = MISSING_ID
            return found
        distinct = values.dictionary_encode()
        distinct_ids = self._ids(distinct.dictionary)
        indices = distinct.indices.fill_null(len(distinct_ids)).to_numpy()
        ids: Int64s = np.append(distinct_ids, MISSING_ID)[indices]
        return ids

    def _ids(self, values: pa.Array) -> Int64s:
        """Returns the id of each value of an array without nulls."""
        positions = self._index.find(values)
        return np.where(positions < 0, UNKNOWN_ID, positions + NUM_RESERVED_IDS)


class HashEncoder(FieldEncoder):
    """Ids by a stable 64-bit hash; any value has one, seen in training or not."""

    def __init__(self) -> None:
        self._counter = Counter()

    @property
    def num_embeddings(self) -> int:
        """One more than the greatest id there may be."""
        return HASH_NUM_EMBEDDINGS

    def count(self, values: pa.Array) -> None:
        """Takes in values of the training split."""
        known = values.drop_null()
        self._counter.missing += values.null_count
        self._counter.add(pa.array(fold(hash_values(known))))

    def freeze(self) -> pa.Table:
        """Ends counting; returns the counts by id."""
        counted, missing = self._counter.result(), self._counter.missing
        self._counter = Counter()
        ids = np.concatenate([[MISSING_ID, UNKNOWN_ID], counted["value"].to_numpy()])
        counts = np.concatenate([[missing, 0], counted["count"].to_numpy()])
        return pa.table({"id": ids, "count": counts})

    def encode(self, values: pa.Array) -> Int64s:
        """Returns the id of each value."""
        ids = np.full(len(values), MISSING_ID, dtype=np.int64)
        known = values.is_valid().to_numpy(zero_copy_only=False)
        ids[known] = fold(hash_values(values.drop_null()))
        return ids


def make_encoder(encoding: Encoding, min_count: int) -> FieldEncoder:
    """Returns the encoder of one field."""
    return VocabularyEncoder(min_count) if encoding == "vocabulary" else HashEncoder()


def flat(column: pa.ChunkedArray) -> pa.Array:
    """Returns all ids of a column, of values or of lists, in one array."""
    if pa.types.is_large_list(column.type):
        chunks = [chunk.flatten() for chunk in column.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], column.type.value_type)
    return column.combine_chunks()


def kind(values: pa.DataType) -> Kind:
    """Returns what ids of a type are."""
    return "string" if pa.types.is_large_string(values) else "integer"


class _Index:
    """Finds values in an array of distinct ones: a hash table whose buckets are sorted runs.

    The values' hashes are sorted, and a bucket is the run of those that share their first bits: one
    or two, so that a value is found in about as many reads. Binary search for random values takes
    several times as long. Arrow's own look-up builds its hash table anew for every
    chunk, which costs more than the chunk as soon as the vocabulary is larger.
    """

    def __init__(self, values: pa.Array) -> None:
        hashes = hash_values(values)
        self.values = values
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        bits = max(1, len(hashes).bit_length() - 1)
        self._shift = np.uint64(64 - bits)
        first_hashes = np.arange(2**bits, dtype=np.uint64) << self._shift
        starts = np.searchsorted(self._hashes, first_hashes)
        self._starts = np.append(starts, len(hashes)).astype(np.uint32)

    def __len__(self) -> int:
        return len(self.values)

    def find(self, values: pa.Array) -> Int64s:
        """Returns the position of each value of an array without nulls, -1 where it is absent."""
        found = np.full(len(values), -1, dtype=np.int64)
        wanted = hash_values(values)
        bucket = (wanted >> self._shift).view(np.int64)
        slot, end = self._starts[bucket].astype(np.int64), self._starts[bucket + 1]
        rows = np.flatnonzero(slot < end)
        while len(rows):
            hits = rows[self._hashes[slot[rows]] == wanted[rows]]
            positions = self._order[slot[hits]]
            same = self._are_equal(positions, values, hits)
            found[hits[same]] = positions[same]
            slot[rows] += 1
            rows = rows[(slot[rows] < end[rows]) & (found[rows] < 0)]
        return found

    def _are_equal(
        self, positions: Int64s, values: pa.Array, rows: Int64s
    ) -> npt.NDArray[np.bool_]:
        """Returns whether values of the index are the given ones, where their hashes are equal."""
        if pa.types.is_integer(values.type) or not len(rows):  # integers have no hash in common
            return np.ones(len(rows), dtype=np.bool_)
        same = pc.equal(self.values.take(pa.array(positions)), values.take(pa.array(rows)))
        equal: npt.NDArray[np.bool_] = same.to_numpy(zero_copy_only=False)
        return equal
