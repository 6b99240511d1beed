"""The second order of a trained model's logloss in the vectors of its tables."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-3  # of the greatest eigenvalue; directions that no logit reads count so much at least


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """The second order of the logloss in the vectors of one table.

    With the Gauss-Newton matrix for the Hessian, changes d_r of the rows r raise the mean logloss
    by 1/2 sum_r a_r d_r^T M d_r. M (D x D) is the mean of p (1 - p) g g^T over examples, for the
    predicted probability p and the logit's gradient g by the vector; a_r is the share in its trace
    of the examples that read r: how often it is read times its own mean curvature. That all rows
    have M up to a factor is an assumption; so is that tables do not act on each other.

    Attributes:
        weights: (n,) float64, a_r.
        matrices: (folds, D, D) float64, M on parts of the data.
    """

    weights: Tensor
    matrices: Tensor

    def rise(self, change: Tensor) -> tuple[float, float]:
        """Returns the rise of the mean logloss, and its standard error, for (n, D) changes."""
        change = change.double()
        spread = change.t() @ (self.weights.unsqueeze(1) * change)
        rises = (self.matrices * spread).sum(dim=(1, 2)) / 2
        error = rises.std(correction=min(1, len(rises) - 1)) / len(rises) ** 0.5
        return float(rises.mean()), float(error)

    def roots(self) -> tuple[Tensor, Tensor]:
        """Returns M^1/2 and its inverse, (D, D) float64 each: a change d costs |M^1/2 d|^2 a_r / 2.

        Eigenvalues are raised to a floor, so that there is an inverse; where no logit reads the
        vectors at all, both are the unit matrix.
        """
        values, vectors = torch.linalg.eigh(self.matrices.mean(dim=0))
        greatest = float(values[-1])
        root = values.clamp(min=greatest * _FLOOR).sqrt() if greatest > 0 else values * 0 + 1
        return (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
