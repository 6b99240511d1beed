"""Mixed dimensions: the more ids a table has, the narrower its rows.

Source: Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient
Recommendation Systems", ISIT 2021 (the popularity-based rule).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.budget import check_choice, solve
from recsys_compress.compress.combine import projected
from recsys_compress.compress.lowering import FP32_BYTES, Lowering, TableOptions
from recsys_compress.compress.method import Method, register
from recsys_compress.errors import UserError

Rounding = Literal["multiple_of_4", "power_of_two", "none"]

MAX_ALPHA = 4.0


@register("mixed_dim")
@dataclass(frozen=True, kw_only=True)
class MixedDim(Method):
    """Mixed-dimension embeddings: rows of width d_f, projected to D by a matrix without bias.

    d_f = lambda * n_f ** -alpha, where n_f is the number of ids and lambda makes the table with
    the fewest ids as wide as `base_dim`. Alpha 0 gives all tables one width. A table is projected
    only where it and its matrix, d_f * (n_f + D) values, are fewer than the table's n_f * D.
    """

    alpha: float | None = field(
        default=None, metadata={"help": "how fast widths fall with the number of ids, from 0 to 4"}
    )
    base_dim: int | None = field(
        default=None, metadata={"help": "width of the table with the fewest ids; None for D"}
    )
    rounding: Rounding = field(
        default="multiple_of_4",
        metadata={"help": 'widths become a "multiple_of_4", a "power_of_two", or whole ("none")'},
    )

    def __post_init__(self) -> None:
        check_choice("mixed_dim.rounding", self.rounding, Rounding)

    def dims(self, tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
        """Returns d_f by table.

        Raises:
            UserError: no alpha was given and no budget fitted, or a knob is out of range.
        """
        if self.alpha is None:
            raise UserError(
                "method 'mixed_dim' needs embedding.budget or embedding.methods.mixed_dim.alpha"
            )
        if not 0 <= self.alpha <= MAX_ALPHA:
            raise UserError(
                f"embedding.methods.mixed_dim.alpha = {self.alpha}: must lie in [0, {MAX_ALPHA}]"
            )
        fewest = min(table.num_embeddings for table in tables)
        return {
            table.name: self._dim(table, (fewest / table.num_embeddings) ** self.alpha)
            for table in tables
        }

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the narrower tables and their projections."""
        return projected(tables, self.dims(tables), mean=False)

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "MixedDim":
        """Finds by bisection the least alpha that fits."""

        def alpha(knob: float) -> float:
            return min(MAX_ALPHA, -math.log(knob))

        def need(knob: float) -> int:
            dims = replace(self, alpha=alpha(knob)).dims(tables)
            return sum(_bytes(table, dims[table.name], options) for table in tables)

        full = sum(_bytes(table, int(table.embedding_dim), options) for table in tables)
        least = math.exp(-MAX_ALPHA)
        knob = solve("mixed_dim", need, budget_bytes, full, least=least, greatest=1.0)
        return replace(self, alpha=alpha(knob))

    def _dim(self, table: EmbeddingBagConfig, share: float) -> int:
        """Returns the rounded width for a share of the base width."""
        ids, dim = int(table.num_embeddings), int(table.embedding_dim)
        base = dim if self.base_dim is None else self.base_dim
        if not 1 <= base <= dim:
            raise UserError(
                f"embedding.methods.mixed_dim.base_dim = {base}: must lie in [1, {dim}]"
            )
        width = base * share
        if self.rounding == "multiple_of_4":
            width = 4 * max(1, round(width / 4))
        elif self.rounding == "power_of_two":
            width = 2 ** max(0, round(math.log2(width)))
        width = min(dim, max(1, round(width)))
        return width if width * (ids + dim) < ids * dim else dim


def _bytes(table: EmbeddingBagConfig, dim: int, options: TableOptions) -> int:
    projection = dim * table.embedding_dim * FP32_BYTES if dim < table.embedding_dim else 0
    return int(table.num_embeddings * options.row_bytes(dim) + projection)
