"""A prepared dataset on disk.

```
dataset.json                 schema, splits, shards with rows and checksums, source, statistics
train/00000.parquet ...      shards; also valid/ and test/
ids/<field>.parquet          id, count in the training split and (vocabulary encoding) raw value
```
A shard's columns: the label (int8), the weight (float32) if there is one, dense features
(float32), ids (int32 or int64; lists for multi-valued fields) and, for a weighted field,
`<field>.weights` (lists of float32). No column holds nulls.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.data.inputs import Inputs
from recsys_compress.data.schema import CategoricalField, Schema
from recsys_compress.data.split import SPLITS, Split
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import read_manifest, sha256
from recsys_compress.settings import parse

FORMAT_VERSION = 1
MANIFEST = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One Parquet file of the dataset.

    Attributes:
        path: relative to the dataset's folder.
        rows: number of rows.
        bytes: size.
        sha256: of its bytes, in hexadecimal.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split: its shards in row order, their rows and the mean label."""

    files: tuple[FileInfo, ...]
    rows: int
    label_rate: float


@dataclass(frozen=True, kw_only=True)
class DenseStatistics:
    """One dense feature over the training split, after the source's transform."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Best:
    """What a perfect model reaches on the test split, where the source knows the true odds."""

    auc: float
    logloss: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `dataset.json`.

    Attributes:
        format: version of the folder's layout.
        hash_version: version of the hash of raw values.
        checksum: SHA-256 over the schema and the checksums of all other files.
        source: name of the source.
        options: the options it was prepared with.
        schema: the columns.
        inputs: the raw columns that they were made of; None in datasets of earlier versions.
        splits: by name of the split.
        ids: the file of id counts, by field.
        dense: by dense feature.
        best: None unless the source knows it.
    """

    format: int
    hash_version: int
    checksum: str
    source: str
    options: dict[str, Any]
    schema: Schema
    inputs: Inputs | None = None
    splits: dict[Split, SplitInfo]
    ids: dict[str, FileInfo]
    dense: dict[str, DenseStatistics]
    best: Best | None


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset, opened for reading.

    Attributes:
        path: its folder.
        manifest: what it holds.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> "PreparedDataset":
        """Opens the dataset in folder `path`; looks at the sizes of its files, reads none of them.

        Raises:
            UserError: `path` holds no dataset of this version, or a file is missing or truncated.
        """
        path = Path(path)
        dataset = cls(path, _read_manifest(path / MANIFEST))
        for info in dataset._all_files():
            _check_size(path / info.path, info)
        return dataset

    @property
    def schema(self) -> Schema:
        """The columns."""
        return self.manifest.schema

    @property
    def checksum(self) -> str:
        """The checksum of schema and files."""
        return self.manifest.checksum

    @property
    def best(self) -> Best | None:
        """What a perfect model reaches on the test split, if that is known."""
        return self.manifest.best

    def rows(self, split: Split) -> int:
        """Returns the number of rows of a split."""
        return self.manifest.splits[split].rows

    def files(self, split: Split) -> tuple[Path, ...]:
        """Returns the shards of a split in row order."""
        return tuple(self.path / info.path for info in self.manifest.splits[split].files)

    def field(self, name: str) -> CategoricalField:
        """Returns the categorical field `name`.

        Raises:
            UserError: there is no such field.
        """
        fields = {field.name: field for field in self.schema.categorical}
        if name not in fields:
            raise UserError(f"{self.path}: has no field {name!r}; {nearest(name, fields)}")
        return fields[name]

    def id_counts(self, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns the ids of a field and how often each occurs in the training split.

        Ids 0 and 1 come first, whatever their counts; the others follow by falling count. Under
        vocabulary encoding ids are 0, 1, 2, ..., under hash encoding those that occur.
        """
        table = self._ids(name, ["id", "count"])
        return table["id"].to_numpy(), table["count"].to_numpy()

    def frequencies(self, name: str) -> npt.NDArray[np.int64]:
        """Returns, by id, how often each id of a vocabulary-encoded field occurs in training.

        Raises:
            UserError: the field is hash-encoded: its ids are too many for an array.
        """
        self._require_vocabulary(name)
        return self.id_counts(name)[1]

    def vocabulary(self, name: str) -> pa.Array:
        """Returns, by id, the raw values of a vocabulary-encoded field; ids 0 and 1 are null.

        Raises:
            UserError: the field is hash-encoded: raw values were not kept.
        """
        self._require_vocabulary(name)
        return self._ids(name, ["value"])["value"].combine_chunks()

    def verify(self) -> None:
        """Reads every file and compares its checksum.

        Raises:
            UserError: a file has changed since it was written.
        """
        for info in self._all_files():
            if sha256(self.path / info.path) != info.sha256:
                raise UserError(
                    f"{self.path / info.path}: has changed since it was written; prepare it anew"
                )
        if checksum(self.manifest) != self.manifest.checksum:
            raise UserError(f"{self.path / MANIFEST}: has been edited; prepare the dataset anew")

    def _require_vocabulary(self, name: str) -> None:
        if self.field(name).encoding != "vocabulary":
            raise UserError(
                f"{self.path}: field {name!r} is hash-encoded and has no vocabulary; "
                "prepare it with vocabulary encoding"
            )

    def _ids(self, name: str, columns: list[str]) -> pa.Table:
        self.field(name)
        return read_table(self.path / self.manifest.ids[name].path, columns)

    def _all_files(self) -> list[FileInfo]:
        shards = [info for split in SPLITS for info in self.manifest.splits[split].files]
        return shards + list(self.manifest.ids.values())


def checksum(manifest: Manifest) -> str:
    """Returns the checksum of a dataset: equal for equal schemas and files."""
    splits = {split: [f.sha256 for f in manifest.splits[split].files] for split in SPLITS}
    ids = {name: info.sha256 for name, info in manifest.ids.items()}
    content = [manifest.format, dataclasses.asdict(manifest.schema), splits, ids]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Reads columns of one of the dataset's files.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """Returns the error for a file of the dataset that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: cannot be read ({reason}); prepare the dataset anew")


def _read_manifest(path: Path) -> Manifest:
    raw = read_manifest(
        path,
        FORMAT_VERSION,
        of="prepared dataset",
        made_by="recsys-compress prepare",
        mend="prepare the dataset anew",
    )
    return parse(Manifest, raw, where=str(path))


def _check_size(path: Path, info: FileInfo) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: is missing; prepare the dataset anew") from error
    if size != info.bytes:
        raise UserError(
            f"{path}: has {size} bytes, not {info.bytes} (truncated or replaced); "
            "prepare the dataset anew"
        )
