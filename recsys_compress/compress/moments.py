"""Streaming first and second moments of vectors, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_compress.ranks import Ranks


@dataclass
class Moments:
    """Sums from which mean and covariance follow, whatever the number of vectors.

    Attributes:
        count: total weight of the vectors.
        total: (D,) float64, their weighted sum.
        outer: (D, D) float64, the weighted sum of their outer products.
    """

    count: float
    total: Tensor
    outer: Tensor

    @staticmethod
    def zeros(dim: int) -> "Moments":
        """Returns the moments of no vectors."""
        return Moments(
            count=0.0,
            total=torch.zeros(dim, dtype=torch.float64),
            outer=torch.zeros(dim, dim, dtype=torch.float64),
        )

    def add(self, vectors: Tensor, weights: Tensor | None = None) -> None:
        """Counts (N, D) vectors in, each once or with its weight of (N,)."""
        vectors = vectors.detach().double().cpu()
        weighted = vectors if weights is None else vectors * weights.double().unsqueeze(1)
        self.count += len(vectors) if weights is None else float(weights.sum())
        self.total += weighted.sum(dim=0)
        self.outer.addmm_(vectors.t(), weighted)

    def over(self, ranks: Ranks) -> None:
        """Makes these the moments of the vectors of all processes."""
        self.count = sum(ranks.gather(self.count))
        ranks.sum_(self.total)
        ranks.sum_(self.outer)

    def mean(self) -> Tensor:
        """Returns (D,) the mean."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Returns (D, D) the covariance, symmetric."""
        mean = self.mean()
        covariance = self.outer / self.count - torch.outer(mean, mean)
        return (covariance + covariance.t()) / 2
