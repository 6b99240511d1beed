"""Figures gathered while rows stream by."""

import numpy as np
import numpy.typing as npt

from recsys_compress.data.dataset import Best, DenseStatistics

_BINS = 1 << 16


class DenseAccumulator:
    """Mean, standard deviation and range of one dense feature."""

    def __init__(self) -> None:
        self._rows = 0
        self._mean = 0.0
        self._squares = 0.0
        self._min = np.inf
        self._max = -np.inf

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Takes in finite values (Chan et al.'s pairwise update of mean and squares)."""
        if not len(values):
            return
        numbers = values.astype(np.float64)
        rows, mean = len(numbers), float(numbers.mean())
        total, delta = self._rows + rows, mean - self._mean
        self._squares += float(np.square(numbers - mean).sum())
        self._squares += delta * delta * self._rows * rows / total
        self._mean += delta * rows / total
        self._rows = total
        self._min = min(self._min, float(numbers.min()))
        self._max = max(self._max, float(numbers.max()))

    def result(self) -> DenseStatistics:
        """Returns the statistics; there must have been values."""
        std = float(np.sqrt(self._squares / self._rows))
        return DenseStatistics(mean=self._mean, std=std, min=self._min, max=self._max)


class BestAccumulator:
    """AUC and log loss of the true odds themselves: no model can do better but by luck."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), dtype=np.int64)
        self._loss = 0.0

    def add(self, probability: npt.NDArray[np.float64], labels: npt.NDArray[np.int8]) -> None:
        """Takes in true odds strictly between 0 and 1, and the labels drawn by them."""
        bins = (probability * _BINS).astype(np.int64)
        for label in (0, 1):
            self._counts[label] += np.bincount(bins[labels == label], minlength=_BINS)
        self._loss -= float(np.log(np.where(labels == 1, probability, 1 - probability)).sum())

    def result(self) -> Best | None:
        """Returns the figures (AUC to 1/65536 of the odds), or None without both labels."""
        negatives, positives = self._counts
        pairs = int(negatives.sum()) * int(positives.sum())
        if not pairs:
            return None
        below = np.cumsum(negatives) - negatives
        wins = float(np.sum(positives * (below + negatives / 2)))
        return Best(auc=wins / pairs, logloss=self._loss / int(self._counts.sum()))
