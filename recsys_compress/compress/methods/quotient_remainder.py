"""Quotient-remainder: an id is told apart by two rows of two small tables.

Source: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
Recommendation Systems", KDD 2020.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.budget import check_choice, check_share, half_dim, solve
from recsys_compress.compress.combine import Pairwise
from recsys_compress.compress.hashing import along_keys, check_range
from recsys_compress.compress.lowering import Lookup, Lowering, Part, PhysicalTable, TableOptions
from recsys_compress.compress.method import Method, Trained, Values, register
from recsys_compress.compress.sharing import SharedRows, id_weights, two_factors
from recsys_compress.errors import UserError

Operation = Literal["mult", "add", "concat"]

_PARTS: dict[Operation, Part] = {"mult": "factor", "add": "addend", "concat": "whole"}


@register("quotient_remainder")
@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(SharedRows):
    """Quotient-remainder embeddings: e(id) = Q[id // m] o R[id mod m], no two ids alike.

    R has m rows and Q has ceil(n / m) of them, which is also how many ids share a row of R. The
    operation o multiplies, adds, or concatenates halves of width D / 2. From m = sqrt(n) up, the
    more rows the less sharing, so a table has m = max(ceil(sqrt(n)), ceil(share * n)). Tables that
    this does not make smaller stay as they are.

    A product of sums is not the sum of products: "mult" refuses bags of several ids.
    """

    share: float | None = field(
        default=None,
        metadata={"help": "rows m of each remainder table, as a share of the table's ids"},
    )
    operation: Operation = field(
        default="mult", metadata={"help": '"mult", "add" or "concat" of the two rows'}
    )

    def __post_init__(self) -> None:
        check_choice("quotient_remainder.operation", self.operation, Operation)

    def modulus(self, table: EmbeddingBagConfig) -> int | None:
        """Returns m for `table`, or None if it stays as it is.

        Raises:
            UserError: no share was given and no budget fitted, or it is not in (0, 1].
        """
        share = check_share("quotient_remainder", self.share)
        ids, dim = int(table.num_embeddings), int(table.embedding_dim)
        modulus = max(math.isqrt(ids - 1) + 1, math.ceil(share * ids))
        rows = modulus + -(-ids // modulus)
        return modulus if rows * self._row_dim(table) < ids * dim else None

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the two tables of each table, and the operation unless it concatenates."""
        moduli = {table.name: self.modulus(table) for table in tables}
        features = [(feature, table.name) for table in tables for feature in table.feature_names]
        split = [(f, t, part) for f, t in features if moduli[t] for part in "qr"]
        if self.operation != "concat":
            split.sort(key=lambda lookup: lookup[2])
        plain = [(f, t, "") for f, t in features if not moduli[t]]
        reads = split + plain
        lookups = tuple(
            Lookup(name=f"{f}#{part}" if part else f, feature=f, table=f"{t}#{part}" if part else t)
            for f, t, part in reads
        )
        order = list(dict.fromkeys(feature for feature, _, _ in reads))
        owner = dict(features)
        sizes = {table.name: int(table.num_embeddings) for table in tables}
        widths = {f: int(t.embedding_dim) for t in tables for f in t.feature_names}
        combine = None
        if split and self.operation != "concat":
            width = sum(widths[f] for f, _, part in split if part == "q")
            combine = Pairwise(width, product=self.operation == "mult")
        return Lowering(
            tables=tuple(part for table in tables for part in self._parts(table)),
            lookups=lookups,
            ids=QuotientsAndRemainders(
                features=order,
                moduli=[moduli[owner[feature]] or 1 for feature in order],
                sizes=[sizes[owner[feature]] for feature in order],
                reads=[(order.index(feature), part == "r") for feature, _, part in reads],
                single=self.operation == "mult",
            ),
            combine=combine,
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "QuotientRemainder":
        """Finds by bisection the greatest share that fits; one share for all tables."""

        def need(share: float) -> int:
            method = replace(self, share=share)
            return sum(
                part.num_embeddings * options.row_bytes(part.embedding_dim)
                for table in tables
                for part in method._parts(table)
            )

        full = sum(t.num_embeddings * options.row_bytes(t.embedding_dim) for t in tables)
        share = solve("quotient_remainder", need, budget_bytes, full, least=1e-18, greatest=1.0)
        return replace(self, share=share)

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple[Method, Values]:
        """Returns the fitted method, and the rows whose pairs come nearest to the vectors."""
        if self.operation == "concat":
            return super().adopt(tables, trained, budget_bytes, options)
        method = self if budget_bytes is None else self.fit(tables, budget_bytes, options)
        values = {}
        for table in tables:
            vectors, modulus = trained.vectors(table.name), method.modulus(table)
            if modulus is None:
                values[table.name] = vectors
                continue
            ids = torch.arange(table.num_embeddings)
            values[f"{table.name}#q"], values[f"{table.name}#r"] = two_factors(
                vectors.double(),
                id_weights(trained, table),
                ids // modulus,
                ids % modulus,
                product=method.operation == "mult",
            )
        return method, Values(tables=values)

    def _row_dim(self, table: EmbeddingBagConfig) -> int:
        if self.operation == "concat":
            return half_dim("quotient_remainder", table)
        return int(table.embedding_dim)

    def _parts(self, table: EmbeddingBagConfig) -> list[PhysicalTable]:
        modulus = self.modulus(table)
        whole = PhysicalTable(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            members=(table.name,),
        )
        if modulus is None:
            return [whole]
        rows = {"q": -(-table.num_embeddings // modulus), "r": modulus}
        return [
            replace(
                whole,
                name=f"{table.name}#{part}",
                num_embeddings=count,
                embedding_dim=self._row_dim(table),
                part=_PARTS[self.operation],
            )
            for part, count in rows.items()
        ]


class QuotientsAndRemainders(nn.Module):
    """Maps ids to their quotients and remainders by the modulus of their feature.

    Args:
        features: (F,) in the order of the batches.
        moduli: (F,) of the features; a quotient by 1 is the id.
        sizes: (F,) ids of the features' tables; the last quotient has room for more.
        reads: (K,) the feature's position, and whether its remainders are read, for each look-up.
        single: whether rows are multiplied: bags of several ids are refused, and an id's weight
            goes to only one of its two rows.
    """

    def __init__(
        self,
        *,
        features: Sequence[str],
        moduli: Sequence[int],
        sizes: Sequence[int],
        reads: Sequence[tuple[int, bool]],
        single: bool,
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.moduli = tuple(moduli)
        self.sizes = tuple(sizes)
        self.single = single
        self.keys = [f"{feature}#{part}" for part in "qr" for feature in features]
        order = [position + len(features) * remainder for position, remainder in reads]
        self.order = None if order == list(range(len(self.keys))) else order
        self.multiplied = [position for position, remainder in reads if remainder]

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the K look-ups' bags with values in the tables' ranges.

        Raises:
            UserError: a bag has several ids where rows are multiplied.
            ValueError: an id lies outside its table.
        """
        check_range(features.values(), self.sizes, features.length_per_key(), self.features)
        lengths, weights = features.lengths(), features.weights_or_none()
        if self.single:
            self._refuse_several(lengths.view(len(self.features), -1))
        values, moduli = along_keys(features.values(), self.moduli, features.length_per_key())
        quotients = values.div(moduli, rounding_mode="floor")
        remainders = values - quotients * moduli
        if weights is not None:
            weights = torch.cat([weights, torch.ones_like(weights) if self.single else weights])
        both = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat([quotients.view(-1), remainders.view(-1)]),
            weights=weights,
            lengths=torch.cat([lengths, lengths]),
            stride=features.stride(),
            length_per_key=2 * features.length_per_key(),
        )
        return both if self.order is None else both.permute(self.order)

    def _refuse_several(self, lengths: Tensor) -> None:
        """Refuses (F, B) lengths above 1 of features whose rows are multiplied."""
        if lengths.device.type != "cpu":
            several = (lengths[self.multiplied] > 1).any()
            torch._assert_async(~several, "a bag of several ids cannot be multiplied")
            return
        # A maximum is all that the common case costs.
        if not lengths.numel() or int(lengths.max()) <= 1:
            return
        several = (lengths[self.multiplied] > 1).any(dim=1).nonzero()
        if len(several):
            feature = self.features[self.multiplied[int(several[0])]]
            raise UserError(
                f"feature {feature!r}: a bag has several ids, which 'quotient_remainder' with "
                "operation 'mult' cannot pool; use operation 'add' or 'concat'"
            )
