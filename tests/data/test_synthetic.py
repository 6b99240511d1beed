from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.data.statistics import BestAccumulator
from recsys_compress.errors import UserError


def rows(source: Synthetic, chunk: int) -> tuple[pa.Table, np.ndarray]:
    chunks = list(source.chunks(chunk))
    odds = [c.probability for c in chunks if c.probability is not None]
    return pa.concat_tables([c.table for c in chunks]).combine_chunks(), np.concatenate(odds)


def test_chunk_size_changes_nothing() -> None:
    source = Synthetic(rows=1000)
    table, odds = rows(source, 1000)
    other, other_odds = rows(source, 77)
    assert table == other
    assert odds.tolist() == other_odds.tolist()


def test_a_longer_table_starts_with_the_shorter_one() -> None:
    short, _ = rows(Synthetic(rows=100), 1000)
    long, _ = rows(Synthetic(rows=500), 1000)
    assert long.slice(0, 100).combine_chunks() == short


def test_seeds_are_different_worlds() -> None:
    assert rows(Synthetic(rows=100), 100)[0] != rows(Synthetic(rows=100, seed=1), 100)[0]


def test_labels_follow_the_odds() -> None:
    table, odds = rows(Synthetic(rows=200_000), 50_000)
    labels = table["label"].to_numpy()
    for low in np.arange(0, 1, 0.1):
        chosen = (odds >= low) & (odds < low + 0.1)
        error = 4 * np.sqrt(0.25 / chosen.sum())
        assert abs(labels[chosen].mean() - odds[chosen].mean()) < error


def test_an_odd_depends_on_every_input() -> None:
    """Rows that agree in all but one input have different odds."""
    source = Synthetic(cardinalities=(50, 50), dense=1)
    ids = [np.array([3, 4, 3, 3]), np.array([7, 7, 8, 7])]
    logits = source._logit(ids, [np.array([0.5, 0.5, 0.5, 0.6])])
    assert len(set(logits.tolist())) == 4


def test_effects_do_not_add_up() -> None:
    """Pairs interact: changing both ids is not the sum of changing each."""
    source = Synthetic(cardinalities=(50, 50), dense=0)
    both, first, second, neither = source._logit(
        [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])], []
    )
    assert abs(both - first - second + neither) > 1e-3


def test_best_is_the_auc_and_loss_of_the_odds() -> None:
    rng = np.random.default_rng(0)
    odds = rng.uniform(0.01, 0.99, 5000)
    labels = (rng.random(5000) < odds).astype(np.int8)
    accumulator = BestAccumulator()
    for part in np.array_split(np.arange(5000), 7):
        accumulator.add(odds[part], labels[part])
    best = accumulator.result()
    pairs = odds[labels == 1][:, None] - odds[labels == 0][None, :]
    assert best is not None
    assert best.auc == pytest.approx((pairs > 0).mean(), abs=1e-4)
    assert best.logloss == pytest.approx(-np.log(np.where(labels, odds, 1 - odds)).mean())


def test_best_is_recorded(synthetic_dataset: PreparedDataset) -> None:
    assert synthetic_dataset.best is not None
    assert 0.7 < synthetic_dataset.best.auc < 0.99
    assert PreparedDataset.open(synthetic_dataset.path).best == synthetic_dataset.best


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Synthetic(rows=0), "rows 0 must be positive"),
        (Synthetic(cardinalities=(5, 0)), r"cardinalities \(5, 0\) must be positive"),
        (Synthetic(cardinalities=()), r"cardinalities \(\) must be positive"),
        (Synthetic(zipf=-1.0), r"zipf -1\.0 not negative"),
        (Synthetic(fractions=(1.0, 0.0, 0.0)), "three positive numbers that sum to 1"),
    ],
)
def test_bad_options(tmp_path: Path, source: Synthetic, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "out")
