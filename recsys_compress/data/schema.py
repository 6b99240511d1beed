"""What a prepared dataset holds: its columns and what their ids mean."""

from dataclasses import dataclass
from typing import Literal

MISSING_ID = 0
UNKNOWN_ID = 1
NUM_RESERVED_IDS = 2
HASH_NUM_EMBEDDINGS = 2**62

Encoding = Literal["vocabulary", "hash"]
Pooling = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class CategoricalField:
    """One categorical feature, which is one logical embedding table.

    Attributes:
        name: column name, feature name and logical table name.
        num_embeddings: ids lie in [0, num_embeddings). Id 0 stands for a missing value, id 1 for
            one not seen (often enough) in the training split.
        encoding: "vocabulary" (dense ids, known values listed in the dataset) or "hash" (a stable
            64-bit hash folded into [2, 2**62), no vocabulary kept).
        multi_valued: the column holds a list of ids per row, of any length.
        weighted: multi-valued only: a float32 weight stands beside each id.
        pooling: how the vectors of a row's ids become one.
    """

    name: str
    num_embeddings: int
    encoding: Encoding = "vocabulary"
    multi_valued: bool = False
    weighted: bool = False
    pooling: Pooling = "sum"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a prepared dataset, in the order in which batches hold them.

    Attributes:
        label: name of the 0/1 column.
        dense: names of the float32 columns.
        categorical: the categorical fields.
        weight: name of the float32 column of example weights, if there is one.
    """

    label: str
    dense: tuple[str, ...] = ()
    categorical: tuple[CategoricalField, ...]
    weight: str | None = None
