"""What trained vectors become where ids share rows: the values that are nearest to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.method import Method, Trained, Values, method_name
from recsys_compress.compress.reads import rows_read
from recsys_compress.errors import UserError

_LEAST = 1e-6  # weight of an id that training has not seen: it counts only where it is alone
_SWEEPS = 12
_RIDGE = 1e-3


def id_weights(trained: Trained, table: EmbeddingBagConfig) -> Tensor:
    """Returns (n,) float64, how much each id of a table counts; alike where nothing says."""
    if trained.weights is None:
        return torch.ones(table.num_embeddings, dtype=torch.float64)
    return trained.weights(table.name).double().clamp(min=_LEAST)


def shared_means(
    lowering: Lowering, tables: Sequence[EmbeddingBagConfig], trained: Trained
) -> Values:
    """Returns rows that are the weighted means of what the ids that read them had there.

    Of all rows they have the least squared error, for look-ups that are concatenated.

    Args:
        lowering: of the tables; without `combine`.
        tables: the logical tables.
        trained: their vectors, and how much each id counts.
    """
    physical = {t.name: t for t in lowering.tables}
    sums = {n: torch.zeros(t.num_embeddings, t.embedding_dim).double() for n, t in physical.items()}
    totals = {n: torch.zeros(t.num_embeddings).double() for n, t in physical.items()}
    for table in tables:
        vectors, weights = trained.vectors(table.name).double(), id_weights(trained, table)
        start = 0
        for lookup, who, rows in rows_read(
            lowering, table.feature_names[0], torch.arange(table.num_embeddings)
        ):
            end = start + physical[lookup.table].embedding_dim
            part = weights[who].unsqueeze(1) * vectors[who, start:end]
            sums[lookup.table].index_add_(0, rows, part)
            totals[lookup.table].index_add_(0, rows, weights[who])
            start = end
    return Values(
        tables={
            name: (sums[name] / totals[name].clamp(min=1e-30).unsqueeze(1)).float()
            for name in physical
        }
    )


def two_factors(
    vectors: Tensor, weights: Tensor, first: Tensor, second: Tensor, *, product: bool
) -> tuple[Tensor, Tensor]:
    """Returns two tables whose rows, multiplied or added, come near the vectors.

    Alternating least squares: with one table fixed, the best rows of the other have a closed form.

    Args:
        vectors: (n, D) float64.
        weights: (n,) float64, how much each counts.
        first: (n,) row of each id in the first table.
        second: (n,) row of each id in the second.
        product: whether rows are multiplied, or else added.
    """
    weight = weights.unsqueeze(1)

    def best(rows: Tensor, others: Tensor) -> Tensor:
        scale = others if product else torch.ones_like(others)
        target = vectors if product else vectors - others
        sums = vectors.new_zeros(int(rows.max()) + 1, vectors.shape[1])
        norms = sums.clone()
        sums.index_add_(0, rows, weight * scale * target)
        norms.index_add_(0, rows, weight * scale.square())
        # Rows whose partners are nearly zero would grow without bound.
        return sums / (norms + _RIDGE * norms.mean()).clamp(min=1e-300)

    # A factor of ones, and an addend of zeros, leave the first table the means of its ids.
    start = torch.ones if product else torch.zeros
    right = start(int(second.max()) + 1, vectors.shape[1], dtype=vectors.dtype)
    left = best(first, right[second])
    for _ in range(_SWEEPS):
        right = best(second, left[first])
        left = best(first, right[second])
    if product:  # both of one size, which suits training and storage
        scale = (right.square().mean() / left.square().mean().clamp(min=1e-30)) ** 0.25
        left, right = left * scale, right / scale
    return left, right


@dataclass(frozen=True, kw_only=True)
class SharedRows(Method):
    """A method whose rows are read by several ids, and can be the means of their vectors."""

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple[Method, Values]:
        """Returns the fitted method, and rows that are means of the vectors that share them.

        Raises:
            UserError: the budget is out of reach, or rows are combined by more than concatenation.
        """
        method = self if budget_bytes is None else self.fit(tables, budget_bytes, options)
        lowering = method.lower(tables)
        if lowering.combine is not None:
            raise UserError(
                f"method {method_name(self)!r}: cannot take over trained tables where rows are "
                "added; use operation 'concat', or train it from scratch"
            )
        return method, shared_means(lowering, tables, trained)
