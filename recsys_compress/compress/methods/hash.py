"""The hashing trick: each table keeps fewer rows, and ids share them by remainder.

Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.budget import check_share, solve
from recsys_compress.compress.hashing import along_keys
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.method import register
from recsys_compress.compress.sharing import SharedRows


@register("hash")
@dataclass(frozen=True, kw_only=True)
class Hash(SharedRows):
    """Per-table modulo hashing: row = id mod ceil(share * n); the usual baseline."""

    share: float | None = field(
        default=None, metadata={"help": "rows kept of each table, as a share of its ids"}
    )

    def rows(self, table: EmbeddingBagConfig) -> int:
        """Returns the rows kept of `table`.

        Raises:
            UserError: no share was given and no budget fitted, or it is not in (0, 1].
        """
        share = check_share("hash", self.share)
        return max(1, math.ceil(int(table.num_embeddings) * share))

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns one smaller table for each table."""
        lookups = tuple(
            Lookup(name=feature, feature=feature, table=table.name)
            for table in tables
            for feature in table.feature_names
        )
        rows = {table.name: self.rows(table) for table in tables}
        return Lowering(
            tables=tuple(
                PhysicalTable(
                    name=table.name,
                    num_embeddings=rows[table.name],
                    embedding_dim=table.embedding_dim,
                    members=(table.name,),
                )
                for table in tables
            ),
            lookups=lookups,
            ids=Remainder([rows[lookup.table] for lookup in lookups]),
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "Hash":
        """Finds by bisection the greatest share that fits; one share for all tables."""

        def need(share: float) -> int:
            return sum(
                replace(self, share=share).rows(t) * options.row_bytes(t.embedding_dim)
                for t in tables
            )

        share = solve("hash", need, budget_bytes, need(1.0), least=1e-18, greatest=1.0)
        return replace(self, share=share)


class Remainder(nn.Module):
    """Maps each id to its remainder by the rows of its table.

    Args:
        rows: (F,) rows of each feature's table.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.rows = tuple(rows)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the same bags with values in [0, rows)."""
        ids, rows = along_keys(features.values(), self.rows, features.length_per_key())
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=ids.remainder(rows).view(-1),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            stride=features.stride(),
            length_per_key=features.length_per_key(),
        )
