"""DeLong's method against its definition, and the drift of scores."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_compress.errors import UserError
from recsys_compress.serve.compare import auc_difference, drift


def naive(labels: Sequence[int], first: list[float], second: list[float]) -> tuple[float, ...]:
    """AUCs and the variance of their difference, by DeLong's own formulas: every pair."""
    positives = [i for i, label in enumerate(labels) if label]
    negatives = [i for i, label in enumerate(labels) if not label]
    kernels = [
        np.array(
            [[float(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for j in negatives] for i in positives]
        )
        for s in (first, second)
    ]
    by_positive = np.array([kernel.mean(axis=1) for kernel in kernels])
    by_negative = np.array([kernel.mean(axis=0) for kernel in kernels])
    covariance = np.cov(by_positive) / len(positives) + np.cov(by_negative) / len(negatives)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return kernels[0].mean(), kernels[1].mean(), variance


ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(-3, 3)), min_size=6, max_size=40
).filter(lambda rows: 2 <= sum(row[0] for row in rows) <= len(rows) - 2)


@settings(max_examples=60)
@given(ROWS)
def test_equals_the_definition(rows: list[tuple[int, int, int]]) -> None:
    labels, first, second = (list(column) for column in zip(*rows, strict=True))
    found = auc_difference(labels, first, second)
    one, other, variance = naive(labels, first, second)
    assert found.first == pytest.approx(one, abs=1e-12)
    assert found.second == pytest.approx(other, abs=1e-12)
    assert found.standard_error**2 == pytest.approx(variance, abs=1e-12)
    assert found.low <= found.difference <= found.high


@settings(max_examples=60)
@given(ROWS, st.data())
def test_a_weight_counts_a_row_so_often(
    rows: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    sizes = st.lists(st.integers(1, 4), min_size=len(rows), max_size=len(rows))
    times = data.draw(sizes)
    labels, first, second = (np.array(column) for column in zip(*rows, strict=True))
    found = auc_difference(labels, first, second, weights=times)
    again = (np.repeat(column, times) for column in (labels, first, second))
    one, other, _ = naive(*again)
    assert found.first == pytest.approx(one, abs=1e-12)
    assert found.second == pytest.approx(other, abs=1e-12)
    same = auc_difference(labels, first, second)
    half = auc_difference(labels, first, second, weights=np.full(len(rows), 0.5))
    assert half.standard_error == pytest.approx(same.standard_error, abs=1e-12)
    more = [np.append(column, [1, 0, 0]) for column in (labels, first, second)]
    with_none = auc_difference(*more, weights=[1] * len(rows) + [0, 0, 0])
    assert with_none.standard_error == pytest.approx(same.standard_error, abs=1e-12)
    assert with_none.difference == pytest.approx(same.difference, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(weighted: bool) -> None:
    random = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        labels = random.integers(0, 2, 400)
        shared = labels + random.normal(size=400)
        first, second = (shared + random.normal(size=400) for _ in range(2))  # equally good
        # Weights that hang on what is scored: of the first kind of rows, few stand for many.
        weights = np.where(shared > 0.5, 3.0, 1.0) if weighted else None
        found = auc_difference(labels, first, second, 0.9, weights)
        covered.append(found.low <= 0 <= found.high)
    assert 0.86 < np.mean(covered) < 0.94


def test_a_model_against_itself_and_many_rows() -> None:
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 500_000), random.random(500_000)
    found = auc_difference(labels, scores, scores)
    assert found.difference == found.standard_error == 0
    assert auc_difference(labels, scores, scores**3).difference == 0


def test_one_label_alone_cannot_be_ranked() -> None:
    with pytest.raises(UserError, match="1 rows of label 1 and 2 of label 0 are too few"):
        auc_difference([0, 1, 0], [1, 2, 3], [1, 2, 3])


def test_drift() -> None:
    random = np.random.default_rng(0)
    scores = random.random(20_000)
    assert drift(scores, scores) == 0
    assert drift(scores, random.random(20_000)) < 0.01
    assert drift(scores, np.clip(scores + 0.1, 0, 1)) > 0.1
    assert drift(scores, np.zeros(5)) > 1
    assert np.isfinite(drift(np.zeros(10), np.ones(10)))
    # Two bins of half the rows; then 0.8 and 0.2: (0.5-0.8) ln(0.5/0.8) + (0.5-0.2) ln(0.5/0.2).
    half = np.array([0.0] * 5 + [1.0] * 5)
    expected = -0.3 * np.log(0.5 / 0.8) + 0.3 * np.log(0.5 / 0.2)
    assert drift(half, [0.0] * 8 + [1.0] * 2, bins=2) == pytest.approx(expected)
