"""What the fields of a prepared dataset are like, and what their tables cost."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from recsys_compress.data.dataset import PreparedDataset, damaged
from recsys_compress.data.schema import MISSING_ID, NUM_RESERVED_IDS, UNKNOWN_ID, CategoricalField
from recsys_compress.data.split import SPLITS, Split
from recsys_compress.errors import UserError

_FLOAT_BYTES = 4
_MOST_EXPONENT = 8.0


@dataclass(frozen=True, kw_only=True)
class FieldProfile:
    """One categorical field. Shares are of occurrences; the skew is that of the training split.

    Attributes:
        name: of the field.
        ids: distinct ids of the training split, missing and unknown left out.
        top_1_percent: share of the most frequent 1 % of ids (rounded up).
        top_10_percent: the same for 10 %.
        zipf: exponent s for which frequencies proportional to rank**-s are likeliest.
        cold: share in the valid and test splits that is unknown to the training split.
        missing: share of missing values in the training split; for a multi-valued field, of bags
            without ids.
        ids_per_row: mean length of a bag in the training split.
        bytes: of a float32 table with a row for each id, missing and unknown.
    """

    name: str
    ids: int
    top_1_percent: float
    top_10_percent: float
    zipf: float
    cold: float
    missing: float
    ids_per_row: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A dataset: rows and label rate per split, and every field at one dim."""

    dim: int
    rows: dict[Split, int]
    label_rate: dict[Split, float]
    fields: tuple[FieldProfile, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns the profile as plain data."""
        return dataclasses.asdict(self)


def profile(dataset: PreparedDataset, dim: int = 16) -> Profile:
    """Profiles a dataset; `dim` is the embedding dim at which bytes are counted.

    Raises:
        UserError: `dim` is not positive, or a file of the dataset cannot be read.
    """
    if dim < 1:
        raise UserError(f"dim {dim}: must be at least 1")
    fields = tuple(_field(dataset, field, dim) for field in dataset.schema.categorical)
    return Profile(
        dim=dim,
        rows={split: dataset.rows(split) for split in SPLITS},
        label_rate={split: dataset.manifest.splits[split].label_rate for split in SPLITS},
        fields=fields,
        bytes=sum(field.bytes for field in fields),
    )


def render(profile: Profile) -> Table:
    """Returns the profile as a table for the terminal."""
    rows = ", ".join(f"{split} {rows:,}" for split, rows in profile.rows.items())
    table = Table(title=f"{rows} rows; bytes at dim {profile.dim}", show_footer=True)
    table.add_column("field", footer="all")
    for name in ("ids", "top 1 %", "top 10 %", "zipf", "cold", "missing", "ids/row"):
        table.add_column(name, justify="right")
    table.add_column("bytes", justify="right", footer=f"{profile.bytes:,}")
    for field in profile.fields:
        table.add_row(
            field.name,
            f"{field.ids:,}",
            f"{field.top_1_percent:.1%}",
            f"{field.top_10_percent:.1%}",
            f"{field.zipf:.2f}",
            f"{field.cold:.2%}",
            f"{field.missing:.2%}",
            f"{field.ids_per_row:.2f}",
            f"{field.bytes:,}",
        )
    return table


def zipf_exponent(counts: npt.NDArray[np.int64]) -> float:
    """Returns the likeliest exponent s of counts, in falling order, drawn as rank**-s.

    The likelihood is greatest where the mean of log(rank) under the law equals that of the counts;
    the first falls with s, so bisection finds it. 0 stands for no skew, 8 for that or more.
    """
    if len(counts) < 2:
        return 0.0
    logs = np.log(np.arange(1, len(counts) + 1))
    observed = float(counts @ logs) / float(counts.sum())
    low, high = 0.0, _MOST_EXPONENT
    for _ in range(30):
        middle = (low + high) / 2
        weights = np.exp(-middle * logs)
        if float(weights @ logs) / float(weights.sum()) > observed:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _field(dataset: PreparedDataset, field: CategoricalField, dim: int) -> FieldProfile:
    ids, counts = dataset.id_counts(field.name)
    known = counts[NUM_RESERVED_IDS:]
    total = max(int(known.sum()), 1)
    table_rows = len(known) + NUM_RESERVED_IDS
    rows = dataset.rows("train")
    empty = _empty_bags(dataset, field.name) if field.multi_valued else int(counts[MISSING_ID])
    return FieldProfile(
        name=field.name,
        ids=len(known),
        top_1_percent=int(known[: -(-len(known) // 100)].sum()) / total,
        top_10_percent=int(known[: -(-len(known) // 10)].sum()) / total,
        zipf=zipf_exponent(known),
        cold=_cold_share(dataset, field, ids),
        missing=empty / rows,
        ids_per_row=int(counts.sum()) / rows,
        bytes=table_rows * dim * _FLOAT_BYTES,
    )


def _cold_share(
    dataset: PreparedDataset, field: CategoricalField, ids: npt.NDArray[np.int64]
) -> float:
    """Returns the share of valid and test occurrences whose id the training split has not."""
    trained = np.sort(ids)
    cold = total = 0
    for split in ("valid", "test"):
        for column in _columns(dataset, split, field.name):
            values = column.flatten() if field.multi_valued else column
            found = values.to_numpy()
            total += len(found)
            if field.encoding == "vocabulary":
                cold += int(np.count_nonzero(found == UNKNOWN_ID))
            else:
                slots = np.minimum(np.searchsorted(trained, found), len(trained) - 1)
                cold += int(np.count_nonzero(trained[slots] != found))
    return cold / max(total, 1)


def _empty_bags(dataset: PreparedDataset, name: str) -> int:
    return sum(
        pc.sum(pc.equal(column.value_lengths(), 0)).as_py() or 0
        for column in _columns(dataset, "train", name)
    )


def _columns(dataset: PreparedDataset, split: Split, name: str) -> Iterator[pa.Array]:
    """Yields a column of a split, one row group at a time."""
    for path in dataset.files(split):
        try:
            with pq.ParquetFile(path) as file:
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns=[name])[name].combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from error
