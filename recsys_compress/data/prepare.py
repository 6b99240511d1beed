"""Raw data to a prepared dataset, in two streaming passes.

The first pass counts the ids of the training split, the second one encodes and writes. Memory
holds some chunks of rows, and the distinct values of each field; it does not grow with the rows.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.data.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    FileInfo,
    Manifest,
    PreparedDataset,
    checksum,
)
from recsys_compress.data.encode import FieldEncoder, flat, kind, make_encoder
from recsys_compress.data.hashing import HASH_VERSION
from recsys_compress.data.inputs import Inputs
from recsys_compress.data.progress import RowProgress
from recsys_compress.data.schema import CategoricalField, Encoding, Schema
from recsys_compress.data.sources.source import Chunk, RawSchema, Source
from recsys_compress.data.split import SPLITS, SplitIndex, check_fractions, random_split
from recsys_compress.data.statistics import BestAccumulator, DenseAccumulator
from recsys_compress.data.writer import ShardWriter, file_info
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import atomic_folder

_FORBIDDEN = set("./\\#@")


def prepare(
    source: Source,
    out: Path | str,
    *,
    encoding: Encoding = "vocabulary",
    min_count: int = 1,
    seed: int = 0,
    chunk_rows: int = 1 << 17,
    rows_per_file: int = 1 << 21,
    row_group_rows: int = 1 << 16,
    progress: bool = False,
) -> PreparedDataset:
    """Writes a prepared dataset to the new folder `out`, whole or not at all.

    Args:
        source: the raw data.
        out: folder that does not exist yet, or is empty.
        encoding: "vocabulary" or "hash", of all categorical fields.
        min_count: vocabulary only: values rarer in the training split are unknown.
        seed: of the random split, where the source leaves the split open.
        chunk_rows: most rows in work at a time; without influence on the result.
        rows_per_file: rows of a shard.
        row_group_rows: rows of a row group, the unit of shuffling on disk.
        progress: whether progress is shown on stderr.

    Returns:
        The dataset, open.

    Raises:
        UserError: the source or a setting is bad, or `out` cannot be written.
    """
    counts = {
        "min_count": min_count,
        "chunk_rows": chunk_rows,
        "rows_per_file": rows_per_file,
        "row_group_rows": row_group_rows,
    }
    for key, value in counts.items():
        if value < 1:
            raise UserError(f"{key} {value}: must be at least 1")
    if encoding not in get_args(Encoding):
        raise UserError(
            f"encoding {encoding!r} is unknown; {nearest(encoding, get_args(Encoding))}"
        )
    if encoding == "hash" and min_count > 1:
        raise UserError(f"min_count {min_count}: hash encoding keeps every value; leave it at 1")
    with atomic_folder(Path(out)) as folder:
        run = _Preparation(source, folder, encoding, min_count, seed, chunk_rows)
        with RowProgress("counting ids", shown=progress) as bar:
            rows = run.count(bar)
        ids = run.write_ids()
        with RowProgress("writing", shown=progress, total=rows) as bar:
            manifest = run.write_rows(bar, ids, rows_per_file, row_group_rows)
        text = json.dumps(dataclasses.asdict(manifest), indent=2, default=str)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return PreparedDataset.open(Path(out))


@dataclass
class _Preparation:
    """The state of one call of `prepare`."""

    source: Source
    folder: Path
    encoding: Encoding
    min_count: int
    seed: int
    chunk_rows: int

    def __post_init__(self) -> None:
        self.raw = self.source.schema()
        _check_names(self.raw, self.source.name)
        fractions = self.source.random_fractions()
        if fractions is not None:
            check_fractions(fractions, self.source.name)
        self.encoders = {
            field.name: make_encoder(self.encoding, self.min_count)
            for field in self.raw.categorical
        }
        self.types: dict[str, tuple[pa.DataType, str]] = {}

    def count(self, bar: RowProgress) -> int:
        """First pass: counts the ids of the training split; returns the number of all rows."""
        rows = np.zeros(len(SPLITS), dtype=np.int64)
        for chunk, split in self._chunks(bar):
            rows += np.bincount(split, minlength=len(SPLITS))
            train = pa.array(split == SPLITS.index("train"))
            for name, encoder in self.encoders.items():
                column = chunk.table[name]
                self._check_type(column, name, chunk.where)
                encoder.count(flat(column.filter(train)))
        for name, number in zip(SPLITS, rows, strict=True):
            if number == 0:
                raise UserError(
                    f"{self.source.name}: split {name!r} has no rows (of {rows.sum()}); "
                    "every split needs some"
                )
        return int(rows.sum())

    def write_ids(self) -> dict[str, FileInfo]:
        """Writes id counts and vocabularies."""
        (self.folder / "ids").mkdir()
        infos = {}
        for name, encoder in self.encoders.items():
            table = encoder.freeze()
            path = self.folder / "ids" / f"{name}.parquet"
            pq.write_table(table, path)
            infos[name] = file_info(self.folder, path, table.num_rows)
        return infos

    def write_rows(
        self, bar: RowProgress, ids: dict[str, FileInfo], rows_per_file: int, row_group_rows: int
    ) -> Manifest:
        """Second pass: writes the shards; returns the manifest."""
        dense = {name: DenseAccumulator() for name in self.raw.dense}
        best = BestAccumulator()
        writers = [
            ShardWriter(
                self.folder,
                split,
                label=self.raw.label,
                rows_per_file=rows_per_file,
                row_group_rows=row_group_rows,
            )
            for split in SPLITS
        ]
        with contextlib.ExitStack() as stack:
            for writer in writers:
                stack.callback(writer.abort)
            for chunk, split in self._chunks(bar):
                encoded = self._encode(chunk.table)
                for index, (name, writer) in enumerate(zip(SPLITS, writers, strict=True)):
                    chosen = split == index
                    rows = encoded.filter(pa.array(chosen))
                    writer.write(rows)
                    if name == "train":
                        for column, accumulator in dense.items():
                            accumulator.add(rows[column].to_numpy())
                    if name == "test" and chunk.probability is not None:
                        best.add(chunk.probability[chosen], rows[self.raw.label].to_numpy())
            splits = {split: w.close() for split, w in zip(SPLITS, writers, strict=True)}
        manifest = Manifest(
            format=FORMAT_VERSION,
            hash_version=HASH_VERSION,
            checksum="",
            source=self.source.name,
            options={
                **dataclasses.asdict(self.source),
                "encoding": self.encoding,
                "min_count": self.min_count,
                "split_seed": self.seed,
            },
            schema=self._schema(),
            inputs=self._inputs(),
            splits=splits,
            ids=ids,
            dense={name: accumulator.result() for name, accumulator in dense.items()},
            best=best.result(),
        )
        return dataclasses.replace(manifest, checksum=checksum(manifest))

    def _chunks(self, bar: RowProgress) -> Iterator[tuple[Chunk, SplitIndex]]:
        """Yields the chunks of a pass with the split of each row."""
        fractions = self.source.random_fractions()
        first = 0
        for chunk in self.source.chunks(self.chunk_rows):
            rows = chunk.table.num_rows
            split = chunk.split
            if split is None:
                if fractions is None:
                    raise TypeError(f"{self.source.name}: a chunk without a split")
                split = random_split(first, rows, fractions, self.seed)
            yield chunk, split
            first += rows
            bar.advance(rows)

    def _check_type(self, column: pa.ChunkedArray, name: str, where: str) -> None:
        """Checks that a field holds integers everywhere or strings everywhere."""
        found = column.type.value_type if pa.types.is_large_list(column.type) else column.type
        if flat(column).null_count == len(flat(column)):
            return
        first, first_where = self.types.setdefault(name, (found, where))
        if found != first:
            raise UserError(
                f"{where}: column {name!r} holds {kind(found)}s, but {kind(first)}s in "
                f"{first_where}; ids must be of one type"
            )

    def _encode(self, table: pa.Table) -> pa.Table:
        """Returns rows as they are stored."""
        raw = self.raw
        columns = {raw.label: table[raw.label]}
        for name in (*([] if raw.weight is None else [raw.weight]), *raw.dense):
            columns[name] = table[name]
        for field in raw.categorical:
            encoder = self.encoders[field.name]
            columns[field.name] = _encode_column(encoder, table[field.name])
            if field.weighted:
                weights = f"{field.name}.weights"
                columns[weights] = table[weights].cast(pa.list_(pa.float32()))
        return pa.table(columns)

    def _inputs(self) -> Inputs:
        """Returns what raw rows hold, with the kind of ids that was found in them."""
        inputs = self.source.inputs()
        kinds = {name: kind(found) for name, (found, _) in self.types.items()}
        fields = (dataclasses.replace(f, kind=kinds.get(f.name)) for f in inputs.ids)
        return dataclasses.replace(inputs, ids=tuple(fields))

    def _schema(self) -> Schema:
        return Schema(
            label=self.raw.label,
            dense=self.raw.dense,
            categorical=tuple(
                CategoricalField(
                    name=field.name,
                    num_embeddings=self.encoders[field.name].num_embeddings,
                    encoding=self.encoding,
                    multi_valued=field.multi_valued,
                    weighted=field.weighted,
                    pooling=field.pooling,
                )
                for field in self.raw.categorical
            ),
            weight=self.raw.weight,
        )


def _encode_column(encoder: FieldEncoder, column: pa.ChunkedArray) -> pa.Array:
    ids = pa.array(encoder.encode(flat(column)))
    if encoder.num_embeddings <= 2**31:
        ids = ids.cast(pa.int32())
    if not pa.types.is_large_list(column.type):
        return ids
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), ids)


def _check_names(raw: RawSchema, source: str) -> None:
    """Checks the names of columns, which become names of features, tables and files."""
    fields = [field.name for field in raw.categorical]
    names = [raw.label, *([] if raw.weight is None else [raw.weight]), *raw.dense, *fields]
    if not fields:
        raise UserError(f"{source}: no categorical column; there is nothing to embed")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{source}: column {name!r} is used twice; use it once")
        if not name or _FORBIDDEN & set(name) or not name.isprintable():
            raise UserError(
                f"{source}: column {name!r} cannot name a feature (empty, or one of "
                f"{' '.join(sorted(_FORBIDDEN))} in it); rename it"
            )
