import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from recsys_compress.train.metrics import BinaryMetrics

# Few distinct values, so that most examples hold ties.
LOGITS = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-20, 20, allow_subnormal=False, width=32)
)
ROWS = st.lists(
    st.tuples(LOGITS, st.booleans(), st.floats(0.125, 8, width=32)), min_size=1, max_size=40
)


def metrics(logits, labels, weights=None, *, batch=7):
    collected = BinaryMetrics()
    columns = [torch.tensor(logits), torch.tensor(labels, dtype=torch.float32)]
    if weights is not None:
        columns.append(torch.tensor(weights))
    for parts in zip(*(column.split(batch) for column in columns), strict=True):
        collected.update(*parts)
    return collected


def sigmoid(logits):
    return torch.tensor(logits, dtype=torch.float64).sigmoid().numpy()


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, weighted=st.booleans())
def test_matches_scikit_learn(rows, weighted):
    logits, labels, weights = (list(column) for column in zip(*rows, strict=True))
    if not weighted:
        weights = None
    result = metrics(logits, labels, weights).compute()
    expected = log_loss(labels, sigmoid(logits), sample_weight=weights, labels=[False, True])
    assert result["logloss"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert result["rows"] == len(rows)
    if len(set(labels)) == 1:
        assert math.isnan(result["auc"])
        assert math.isnan(result["ne"])
    else:
        expected = roc_auc_score(labels, logits, sample_weight=weights)
        assert result["auc"] == pytest.approx(expected, abs=1e-12)
        rate = np.average(labels, weights=weights)
        entropy = log_loss(labels, np.full(len(labels), rate), sample_weight=weights)
        assert result["ne"] == pytest.approx(result["logloss"] / entropy)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_integer_weights_are_repeated_rows(rows):
    logits, labels, weights = (list(column) for column in zip(*rows, strict=True))
    counts = [1 + int(weight) for weight in weights]
    repeated = metrics(np.repeat(logits, counts).tolist(), np.repeat(labels, counts).tolist())
    weighted = metrics(logits, labels, [float(count) for count in counts])
    result, expected = weighted.compute(), repeated.compute()
    for name in ("auc", "logloss", "ne", "calibration", "ece"):
        assert result[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_order_and_batches_do_not_matter(rows, seed):
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    first = metrics(*(list(c) for c in zip(*rows, strict=True)), batch=3)
    second = metrics(*(list(c) for c in zip(*shuffled, strict=True)), batch=11)
    assert first.compute() == pytest.approx(second.compute(), nan_ok=True)
    for a, b in zip(first.reliability(), second.reliability(), strict=True):
        assert a == pytest.approx(b)


def test_calibration_and_reliability_of_a_known_case():
    # 100 rows at each of 3 predictions; observed 0.1, 0.5 and 1.0.
    logits = np.repeat([-2.0, 0.0, 2.0], 100).tolist()
    labels = [1] * 10 + [0] * 90 + [1] * 50 + [0] * 50 + [1] * 100
    collected = metrics(logits, labels)
    low, high = sigmoid([-2.0, 2.0])
    assert collected.compute()["calibration"] == pytest.approx((low + 0.5 + high) / 1.6)
    expected = (abs(low - 0.1) + 0 + abs(high - 1)) / 3
    assert collected.compute()["ece"] == pytest.approx(expected)
    assert collected.reliability(bins=3) == [
        pytest.approx({"predicted": low, "observed": 0.1, "rows": 100}),
        pytest.approx({"predicted": 0.5, "observed": 0.5, "rows": 100}),
        pytest.approx({"predicted": high, "observed": 1.0, "rows": 100}),
    ]


def test_bins_have_equal_mass():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3000, generator=generator), torch.zeros(3000)
    collected = BinaryMetrics()
    collected.update(logits, labels)
    assert [entry["rows"] for entry in collected.reliability()] == [200] * 15
    weighted = BinaryMetrics()
    weighted.update(logits, labels, (logits > 0).float() * 9 + 1)
    below = sum(entry["predicted"] < 0.5 for entry in weighted.reliability(bins=11))
    assert below == 1


def test_tied_rows_share_the_bin_of_their_middle():
    collected = metrics([-1.0] * 3 + [0.0] * 5 + [1.0] * 2, [0, 1] * 5)
    assert [entry["rows"] for entry in collected.reliability(bins=2)] == [3, 7]


def test_extreme_logits_stay_exact():
    # float32 probabilities would be 0 and 1 here, and the logloss infinite.
    result = metrics([-200.0, 200.0], [1, 0]).compute()
    assert result["logloss"] == pytest.approx(200)
    right = metrics([-math.inf, -math.inf, math.inf, math.inf], [0, 0, 1, 1]).compute()
    assert (right["auc"], right["logloss"]) == (1.0, 0.0)
    assert metrics([-math.inf, 1.0], [1, 0]).compute()["logloss"] == math.inf
    assert metrics([math.inf, math.inf], [1, 0]).compute()["auc"] == 0.5


@pytest.mark.parametrize(
    "collected",
    [
        BinaryMetrics(),
        metrics([0.5, math.nan], [0, 1]),
        metrics([0.5, 1.0], [0, 1], [0.0, 0.0]),
    ],
    ids=["no rows", "nan logit", "no weight"],
)
def test_undefined_metrics_are_nan(collected):
    result = collected.compute()
    assert result.pop("rows") in (0, 2)
    assert all(math.isnan(value) for value in result.values())
    assert len(result) == 5
    collected.reliability()


def test_one_class_leaves_the_rest_defined():
    result = metrics([0.0, 0.0], [0, 0]).compute()
    assert result["logloss"] == pytest.approx(math.log(2))
    assert result["ece"] == pytest.approx(0.5)
    assert math.isnan(result["calibration"])


def test_parts_of_ranks_merge_with_and_without_weights():
    whole = metrics([0.1, 0.7, -0.3, 2.0], [0, 1, 0, 1], [1.0, 1.0, 2.0, 3.0])
    merged = BinaryMetrics()
    merged.update(*metrics([0.1, 0.7], [0, 1]).columns())
    merged.update(*metrics([-0.3, 2.0], [0, 1], [2.0, 3.0]).columns())
    assert merged.compute() == whole.compute()


def test_keeps_a_copy_of_what_it_is_given():
    logits, labels = torch.tensor([0.0, 1.0], requires_grad=True), torch.tensor([0.0, 1.0])
    collected = BinaryMetrics()
    collected.update(logits, labels)
    labels.fill_(0)
    assert collected.compute()["auc"] == 1.0


def test_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(B,\), not \[\(3, 1\), \(3,\)\]"):
        BinaryMetrics().update(torch.zeros(3, 1), torch.zeros(3))
