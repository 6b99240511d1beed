"""Double hashing: two hash functions into one smaller table a feature.

Source: Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender
Systems", RecSys 2020; here for all ids, without the exact rows that they give frequent ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.budget import check_choice, check_share, half_dim, solve
from recsys_compress.compress.combine import Pairwise
from recsys_compress.compress.hashing import Region, SaltedHash, salt
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.method import register
from recsys_compress.compress.sharing import SharedRows

Operation = Literal["concat", "add"]


@register("double_hash")
@dataclass(frozen=True, kw_only=True)
class DoubleHash(SharedRows):
    """Double hashing: e(id) = E[h_1(id)] o E[h_2(id)] with one smaller table E for each table.

    Two ids get the same vector only if both hashes agree, or, in a sum, agree crosswise. The
    operation o concatenates rows of width D / 2, of which E has ceil(2 * share * n), or adds rows
    of width D, ceil(share * n).
    """

    share: float | None = field(
        default=None, metadata={"help": "values kept of each table, as a share of all its values"}
    )
    operation: Operation = field(
        default="concat", metadata={"help": '"concat" or "add" of the two rows'}
    )
    seed: int = field(default=0, metadata={"help": "of the hash functions"})

    def __post_init__(self) -> None:
        check_choice("double_hash.operation", self.operation, Operation)

    def table(self, table: EmbeddingBagConfig) -> PhysicalTable:
        """Returns the smaller table.

        Raises:
            UserError: no share was given and no budget fitted, or it is not in (0, 1].
        """
        share = check_share("double_hash", self.share)
        concat = self.operation == "concat"
        return PhysicalTable(
            name=table.name,
            num_embeddings=math.ceil(int(table.num_embeddings) * share * (2 if concat else 1)),
            embedding_dim=half_dim("double_hash", table) if concat else table.embedding_dim,
            members=(table.name,),
            part="whole" if concat else "addend",
        )

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns one smaller table for each table, read twice."""
        physical = {table.name: self.table(table) for table in tables}
        features = [(feature, table.name) for table in tables for feature in table.feature_names]
        reads = [(i, probe) for i in range(len(features)) for probe in range(2)]
        if self.operation == "add":
            reads.sort(key=lambda read: read[1])
        lookups = tuple(
            Lookup(name=f"{features[i][0]}#{probe}", feature=features[i][0], table=features[i][1])
            for i, probe in reads
        )
        width = sum(table.embedding_dim * len(table.feature_names) for table in tables)
        return Lowering(
            tables=tuple(physical.values()),
            lookups=lookups,
            ids=SaltedHash(
                source=[i for i, _ in reads],
                salts=[salt(features[i][1], probe, self.seed) for i, probe in reads],
                regions=[Region(rows=physical[x.table].num_embeddings) for x in lookups],
                names=[lookup.name for lookup in lookups],
            ),
            combine=Pairwise(width, product=False) if self.operation == "add" else None,
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "DoubleHash":
        """Finds by bisection the greatest share that fits; one share for all tables."""

        def need(share: float) -> int:
            physical = [replace(self, share=share).table(table) for table in tables]
            return sum(t.num_embeddings * options.row_bytes(t.embedding_dim) for t in physical)

        full = sum(t.num_embeddings * options.row_bytes(t.embedding_dim) for t in tables)
        share = solve("double_hash", need, budget_bytes, full, least=1e-18, greatest=1.0)
        return replace(self, share=share)
