"""Two models' scores of the same rows: AUC with a paired interval, calibration, drift."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from recsys_compress.errors import UserError

Floats = npt.NDArray[np.float64]

DRIFT_BINS = 10
_LEAST_SHARE = 1e-6  # of rows in a bin, so that an empty one has a finite logarithm


@dataclass(frozen=True, kw_only=True)
class AucDifference:
    """How two models' AUCs on the same rows differ.

    Attributes:
        first: AUC of the first model.
        second: AUC of the second.
        difference: second - first.
        standard_error: of the difference, which takes into account that the rows are the same.
        low: lower end of the confidence interval of the difference.
        high: its upper end.
    """

    first: float
    second: float
    difference: float
    standard_error: float
    low: float
    high: float


def auc_difference(
    labels: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    confidence: float = 0.95,
    weights: npt.ArrayLike | None = None,
) -> AucDifference:
    """Compares two models' AUCs on the same rows by DeLong's method, in O(n log n).

    DeLong et al., Biometrics 1988, computed from mid-ranks as in Sun and Xu, IEEE Signal Processing
    Letters 2014. A tie between rows counts half. A pair of rows counts by the product of their
    weights, and the variance is that of weighted means; with equal weights both are DeLong's.

    Args:
        labels: (N,) 0 or 1.
        first: (N,) scores of the first model; only their order matters.
        second: (N,) scores of the second.
        confidence: of the interval, in (0, 1).
        weights: (N,) of the rows; None where each counts once.

    Raises:
        UserError: there are fewer than two rows of either label.
    """
    label = np.asarray(labels)
    mass = np.ones(len(label)) if weights is None else np.asarray(weights, dtype=np.float64)
    positive, negative = (label == 1) & (mass > 0), (label != 1) & (mass > 0)
    count, others = int(positive.sum()), int(negative.sum())
    if min(count, others) < 2:
        raise UserError(
            f"{count} rows of label 1 and {others} of label 0 are too few to compare models; "
            "give at least two of each"
        )
    own, other = mass[positive], mass[negative]
    wins, losses = [], []  # by row: share of the rows of the other label that are on its right side
    for scores in (first, second):
        values = np.asarray(scores, dtype=np.float64)
        below = _mass_below(values, mass)
        wins.append((below[positive] - _mass_below(values[positive], own)) / other.sum())
        losses.append(1 - (below[negative] - _mass_below(values[negative], other)) / own.sum())
    aucs = [float(np.average(share, weights=own)) for share in wins]
    spread = _variance_of_mean(wins[1] - wins[0], own)
    spread += _variance_of_mean(losses[1] - losses[0], other)
    error, difference = math.sqrt(spread), aucs[1] - aucs[0]
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return AucDifference(
        first=aucs[0],
        second=aucs[1],
        difference=difference,
        standard_error=error,
        low=difference - reach,
        high=difference + reach,
    )


def drift(before: npt.ArrayLike, after: npt.ArrayLike, bins: int = DRIFT_BINS) -> float:
    """Returns the population stability index of scores: 0 for equal shares of rows in all bins.

    It is the sum over bins of (p - q) ln(p / q), with p and q the shares of rows before and after.
    Bins are quantiles of the scores before. Below 0.1 is commonly read as stable, above 0.25 as
    another population.

    Args:
        before: (N,) scores.
        after: (M,) scores.
        bins: number of bins.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    edges = np.unique(np.quantile(old, np.linspace(0, 1, bins + 1)[1:-1]))
    shares = []
    for scores in (old, new):
        index = np.searchsorted(edges, scores, side="right")
        counts = np.bincount(index, minlength=len(edges) + 1)
        shares.append(np.maximum(counts / len(scores), _LEAST_SHARE))
    p, q = shares
    return float(np.sum((p - q) * np.log(p / q)))


def _mass_below(values: Floats, mass: Floats) -> Floats:
    """Returns the mass of the values that are less than each one, and half that of its equals."""
    _, index = np.unique(values, return_inverse=True)
    equals = np.bincount(index, weights=mass)
    middle: Floats = np.cumsum(equals) - equals / 2
    return middle[index]


def _variance_of_mean(values: Floats, mass: Floats) -> float:
    """Returns the variance of the weighted mean of independent values."""
    squares = (mass * (values - np.average(values, weights=mass))) ** 2
    return float(squares.sum() / mass.sum() ** 2 * len(values) / (len(values) - 1))
