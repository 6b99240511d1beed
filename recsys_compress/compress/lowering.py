"""What a compression method says about tables: how ids become rows, and rows become vectors.

Shapes in this package: B batch, F features, K look-ups, T tables, L ids in a bag, D dim.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from recsys_compress.compress.hook import Hook
from recsys_compress.config import DataType, TableOptimizerName
from recsys_compress.errors import UserError, nearest

FP32_BYTES = 4
FUSED_DIM_MULTIPLE = 4  # FBGEMM's rule for tables that are updated inside the backward pass

Part = Literal["whole", "addend", "factor"]


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How physical tables start and are trained.

    Attributes:
        optimizer: "rowwise_adagrad", "adagrad" and "sgd" are fused into the backward pass and touch
            looked-up rows only; "adam" is dense: every row, every step.
        learning_rate: step size.
        weight_decay: times the weights, added to the gradient of every row (an L2 term inside
            Adam, not decoupled); "adam" only.
        epsilon: added to the root of the sums of squared gradients; Adagrad only.
        init_range: values start uniform in [-init_range, init_range].
        dense_rows: the largest table, in rows, that "adam" may train.
        storage: type in which rows are to be served. Tables of different types are not merged.
    """

    optimizer: TableOptimizerName = "rowwise_adagrad"
    learning_rate: float = 0.02
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    init_range: float = 0.05
    dense_rows: int = 100_000
    storage: DataType = "fp32"

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(TableOptimizerName):
            hint = nearest(self.optimizer, get_args(TableOptimizerName))
            raise UserError(f"embedding.optimizer = {self.optimizer!r}: unknown; {hint}")
        if self.weight_decay and self.fused:
            raise UserError(
                f"embedding.weight_decay = {self.weight_decay}: the fused {self.optimizer} kernel "
                "has no weight decay on CPU; set it to 0, or use optimizer 'adam' on small tables"
            )

    @property
    def fused(self) -> bool:
        """Whether the optimizer runs inside the backward pass."""
        return self.optimizer != "adam"

    def stored_dim(self, embedding_dim: int) -> int:
        """Returns the width in memory of rows of `embedding_dim`, padding included."""
        multiple = FUSED_DIM_MULTIPLE if self.fused else 1
        return -(-embedding_dim // multiple) * multiple

    def row_bytes(self, embedding_dim: int) -> int:
        """Returns the bytes in memory of one row of `embedding_dim`, padding included."""
        return self.stored_dim(embedding_dim) * FP32_BYTES

    def state_bytes(self, rows: int, stored_dim: int) -> int:
        """Returns the bytes of optimizer state for a table of `rows` x `stored_dim`."""
        values = {
            "rowwise_adagrad": rows,
            "adagrad": rows * stored_dim,
            "sgd": 0,
            "adam": 2 * rows * stored_dim + 1,  # two moments, and one step count
        }
        return values[self.optimizer] * FP32_BYTES

    def starting_as(self, part: "Part") -> "TableOptions":
        """Returns the options of tables whose rows are such a part of a feature's vector."""
        ranges = {
            "whole": self.init_range,
            "addend": self.init_range / 2,
            "factor": math.sqrt(self.init_range),
        }
        return replace(self, init_range=ranges[part])


@dataclass(frozen=True, kw_only=True)
class PhysicalTable:
    """A table that exists in memory.

    Attributes:
        name: unique within a lowering.
        num_embeddings: rows.
        embedding_dim: width that the lowering reads; padding is the collection's business.
        members: logical tables whose ids are looked up here.
        part: what its rows are of a feature's vector. Two addends, or two factors, start such that
            their sum or product has the range of a full table's rows.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    members: tuple[str, ...]
    part: Part = "whole"


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One read of a physical table for one feature.

    Attributes:
        name: unique key of the look-up, like "user_id" or "user_id#1".
        feature: the logical feature it serves.
        table: the physical table it reads.
    """

    name: str
    feature: str
    table: str


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """Logical tables, lowered.

    All look-ups are pooled over a bag's ids. Then, without `combine`, the vector of a feature is
    the concatenation of its look-ups' vectors, in their order; concatenation commutes with sums.

    Attributes:
        tables: the physical tables.
        lookups: in the order in which `ids` emits them.
        ids: a parameter-free module, KeyedJaggedTensor of the F logical features -> one of the K
            look-ups, whose values are rows of the physical tables. Maps of ids that cannot be
            computed are its buffers: they are saved, counted as bytes, and on a real device from
            the start.
        combine: a module of two arguments: the pooled vectors of all look-ups in their order,
            (B, sum of their widths), and the features' `Bags`. It returns the features' vectors,
            each as wide as its logical table, (B, sum of D). Features come in the order of
            `features`.
            What it does must commute with the sum over a bag, or else `ids` must refuse bags of
            several ids. Its parameters belong to the dense part: they are on a real device from the
            start, and the dense optimizer trains them, but for those that `hook` trains.
        hook: what the method does while its tables train; None for nothing.
        order: of the features, where it is another than that of the look-ups.
    """

    tables: tuple[PhysicalTable, ...]
    lookups: tuple[Lookup, ...]
    ids: nn.Module
    combine: nn.Module | None = None
    hook: Hook | None = None
    order: tuple[str, ...] = ()

    @property
    def features(self) -> list[str]:
        """The logical features, in `order` or else as the look-ups first name them."""
        return list(self.order or dict.fromkeys(lookup.feature for lookup in self.lookups))
