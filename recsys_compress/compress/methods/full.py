"""Full tables: one row for each id."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.budget import out_of_reach
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.method import Method, Trained, Values, register


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Uncompressed tables, one row of width D for each id: the reference."""

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the tables as they are; an id is its row."""
        return Lowering(
            tables=tuple(
                PhysicalTable(
                    name=table.name,
                    num_embeddings=table.num_embeddings,
                    embedding_dim=table.embedding_dim,
                    members=(table.name,),
                )
                for table in tables
            ),
            lookups=tuple(
                Lookup(name=feature, feature=feature, table=table.name)
                for table in tables
                for feature in table.feature_names
            ),
            ids=nn.Identity(),
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "Full":
        """Returns itself if the tables fit; they have no knob."""
        need = sum(t.num_embeddings * options.row_bytes(t.embedding_dim) for t in tables)
        if need > budget_bytes:
            raise out_of_reach("full", budget_bytes, need, need)
        return self

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,  # noqa: ARG002
        options: TableOptions,  # noqa: ARG002
    ) -> tuple["Full", Values]:
        """Returns itself and the tables' vectors."""
        return self, Values(tables={table.name: trained.vectors(table.name) for table in tables})
