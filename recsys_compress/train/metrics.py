"""Exact metrics of binary predictions: every prediction is kept until the end."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_compress.ranks import Ranks
from recsys_compress.train.events import Metrics

RELIABILITY_BINS = 15

_Floats = NDArray[np.float64]
_NAMES = ("auc", "logloss", "ne", "calibration", "ece")


class BinaryMetrics:
    """Collects predictions over batches and computes metrics over all of them.

    Keeps 8 bytes a row, 12 with weights, on the predictions' device.
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._weights: list[Tensor | None] = []

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds B predictions.

        Args:
            logits: (B,) log-odds of label 1; of probabilities, give `torch.logit`.
            labels: (B,) 0 or 1.
            weights: (B,) example weights; None where every example counts once.

        Raises:
            ValueError: the shapes are not the same (B,).
        """
        shapes = [tuple(t.shape) for t in (logits, labels, weights) if t is not None]
        if len(shapes[0]) != 1 or len(set(shapes)) > 1:
            raise ValueError(f"logits, labels and weights must all be (B,), not {shapes}")
        self._logits.append(_copy(logits))
        self._labels.append(_copy(labels))
        self._weights.append(None if weights is None else _copy(weights))

    def of_all(self, ranks: Ranks) -> "BinaryMetrics":
        """Returns the same over the rows of all processes, each of which has to call it."""
        if ranks.size == 1:
            return self
        logits, labels, weights = self.columns()
        # Batches that were filled up have weights, others none.
        weighted = any(ranks.gather(weights is not None))
        gathered = BinaryMetrics()
        gathered.update(
            ranks.concat(logits),
            ranks.concat(labels),
            ranks.concat(torch.ones_like(labels) if weights is None else weights)
            if weighted
            else None,
        )
        return gathered

    def columns(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns all logits, labels and weights so far: float32, on the CPU."""
        weights = None
        if any(part is not None for part in self._weights):
            parts = zip(self._weights, self._labels, strict=True)
            weights = _join([torch.ones_like(y) if w is None else w for w, y in parts])
        return _join(self._logits), _join(self._labels), weights

    def compute(self) -> Metrics:
        """Returns the metrics over all rows, each row counting by its weight.

        * "auc": area under the ROC curve; a tie counts half (mid-ranks).
        * "logloss": mean binary cross-entropy in nats.
        * "ne": normalised entropy, logloss over the entropy of the base rate of these very rows
          (He et al., ADKDD 2014).
        * "calibration": sum of predicted probabilities over sum of labels.
        * "ece": expected calibration error, the mean |predicted - observed| over 15 bins of equal
          mass (see `reliability`), weighted by their mass.
        * "rows": number of rows.

        A metric that is not defined is nan: all of them without rows or with a nan among the
        logits, "auc" and "ne" with one class only, "calibration" without a positive.
        """
        ties = _Ties.of(*self.columns())
        rows = float(ties.rows.sum())
        mass, positives = float(ties.mass.sum()), float(ties.positives.sum())
        if mass == 0 or np.isnan(ties.logits[-1]):  # nan sorts last
            return {**dict.fromkeys(_NAMES, math.nan), "rows": rows}
        logloss = ties.logloss()
        bin_mass, predicted, observed, _ = ties.bins(RELIABILITY_BINS)
        return {
            "auc": ties.auc(),
            "logloss": logloss,
            "ne": _ratio(logloss, _entropy(positives / mass)),
            "calibration": _ratio(float(ties.mass @ ties.predicted), positives),
            "ece": float(bin_mass @ abs(predicted - observed)) / mass,
            "rows": rows,
        }

    def reliability(self, bins: int = RELIABILITY_BINS) -> list[Metrics]:
        """Returns the reliability curve: mean prediction against observed rate, by prediction.

        Rows, sorted by prediction, fall into bins of equal mass (sum of weights). Rows with the
        same prediction share a bin, so that bins do not depend on the order of rows; a bin left
        empty by that is not returned.
        """
        _, predicted, observed, rows = _Ties.of(*self.columns()).bins(bins)
        return [
            {"predicted": float(p), "observed": float(o), "rows": float(n)}
            for p, o, n in zip(predicted, observed, rows, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class _Ties:
    """Rows grouped by prediction, lowest first; all metrics depend on rows only through this.

    Attributes:
        logits: (G,) the distinct logits.
        predicted: (G,) their probabilities.
        rows: (G,) rows with that logit.
        mass: (G,) sum of their weights.
        positives: (G,) sum of the weights of those labelled 1.
    """

    logits: _Floats
    predicted: _Floats
    rows: _Floats
    mass: _Floats
    positives: _Floats

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weights: Tensor | None) -> "_Ties":
        """Groups (rows,) float32 columns."""
        scores = logits.numpy()
        order = np.argsort(scores)
        scores = scores[order]
        first = np.ones(len(scores), dtype=np.bool_)
        np.not_equal(scores[1:], scores[:-1], out=first[1:])
        starts = np.flatnonzero(first)
        distinct = torch.from_numpy(scores[starts]).double()
        rows = np.diff(starts, append=len(scores)).astype(np.float64)
        hits = labels.numpy()[order].astype(np.float64)
        mass = rows
        if weights is not None:
            row_mass = weights.numpy()[order].astype(np.float64)
            hits *= row_mass
            mass = np.add.reduceat(row_mass, starts) if len(starts) else rows
        return cls(
            logits=distinct.numpy(),
            predicted=distinct.sigmoid().numpy(),
            rows=rows,
            mass=mass,
            positives=np.add.reduceat(hits, starts) if len(starts) else rows,
        )

    def auc(self) -> float:
        """Returns the share of (positive, negative) pairs in the right order, ties as a half."""
        negatives = self.mass - self.positives
        below = np.cumsum(negatives) - negatives / 2
        return _ratio(float(self.positives @ below), self.positives.sum() * negatives.sum())

    def logloss(self) -> float:
        """Returns the mean cross-entropy from logits, without rounding probabilities to 0 or 1."""
        negatives = self.mass - self.positives
        loss = np.zeros_like(self.mass)
        # Only where there is mass: an infinite logit costs nothing on the right side.
        for mass, margin in ((self.positives, self.logits), (negatives, -self.logits)):
            present = mass > 0
            loss[present] += mass[present] * np.logaddexp(0, -margin[present])
        return float(loss.sum() / self.mass.sum())

    def bins(self, count: int) -> tuple[_Floats, _Floats, _Floats, _Floats]:
        """Returns mass, mean prediction, observed rate and rows of each bin that has mass."""
        middle = (np.cumsum(self.mass) - self.mass / 2) / (self.mass.sum() or 1.0)
        index = np.minimum((middle * count).astype(np.int64), count - 1)
        mass, predicted, positives, rows = (
            np.bincount(index, weights=values).astype(np.float64)
            for values in (self.mass, self.mass * self.predicted, self.positives, self.rows)
        )
        kept = mass > 0
        mass = mass[kept]
        return mass, predicted[kept] / mass, positives[kept] / mass, rows[kept]


def _copy(values: Tensor) -> Tensor:
    """Returns a float32 copy: the caller may reuse its buffer."""
    return values.detach().to(dtype=torch.float32, copy=True)


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts]) if parts else torch.empty(0)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _entropy(rate: float) -> float:
    """Returns the entropy in nats of a coin that shows 1 at `rate`."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
