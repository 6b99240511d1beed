"""A small click log with every kind of raw column, and runs trained on it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.schema import Encoding
from recsys_compress.data.sources.tabular import Tabular
from recsys_compress.train.metrics import BinaryMetrics

SCHEMA = """
dense = ["price"]
dense_missing = -1.0
categorical = ["user", "item"]
weight = "times"
label = { column = "stars", positive = ">=4" }

[[multi_valued]]
column = "tags"
separator = "|"
weights = "tag_weights"
pooling = "mean"

[[time]]
column = "at"
parts = ["hour"]

[split]
column = "split"
train = [0]
valid = [1]
test = [2]
"""
ROWS = 6000


def raw_rows(rows: int = ROWS, seed: int = 0) -> pa.Table:
    """Rows as a source has them: integers, strings, lists in text, times, missing values."""
    random = np.random.default_rng(seed)
    user = random.integers(0, 400, rows)
    item = random.integers(0, 150, rows)
    price = random.normal(size=rows)
    tags = [random.choice(9, size=random.integers(0, 4), replace=False) for _ in range(rows)]
    logit = np.sin(user) * 2 + np.cos(item * 3) * 2 + price / 2 - 0.5
    click = random.random(rows) < 1 / (1 + np.exp(-logit))
    hours = random.integers(0, 24, rows)
    return pa.table(
        {
            "user": pa.array(user, mask=random.random(rows) < 0.05),
            "item": pa.array([f"item-{i}" for i in item], mask=random.random(rows) < 0.05),
            "price": pa.array(price, mask=random.random(rows) < 0.05),
            "tags": pa.array(["|".join(f"t{t}" for t in row) for row in tags]),
            "tag_weights": pa.array(["|".join(f"{1 / (1 + t):.3f}" for t in row) for row in tags]),
            "at": pa.array([f"2026-01-05 {hour:02}:15:00" for hour in hours]),
            "stars": pa.array(np.where(click, 5, 2)),
            "times": pa.array(1 + np.arange(rows) % 3),
            "split": pa.array(np.minimum(np.arange(rows) * 3 // rows, 2)),
        }
    )


def auc(probabilities: npt.ArrayLike, rows: pa.Table) -> float:
    """The AUC of scores of raw rows, by their labels and weights."""
    metrics = BinaryMetrics()
    metrics.update(
        torch.logit(torch.tensor(probabilities, dtype=torch.float64)),
        torch.tensor(rows["stars"].to_numpy() >= 4),
        torch.tensor(rows["times"].to_numpy()),
    )
    return metrics.compute()["auc"]


def prepared(
    folder: Path, encoding: Encoding = "vocabulary", seed: int = 0, user: str = "user"
) -> PreparedDataset:
    """The click log, prepared, with another name of a field; raw rows lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.toml").write_text(SCHEMA.replace('"user"', f'"{user}"'))
    rows = raw_rows(seed=seed).rename_columns({"user": user})
    pq.write_table(rows, folder / "clicks.parquet", row_group_size=1000)
    source = Tabular(path=str(folder / "clicks.parquet"), schema_file=str(folder / "schema.toml"))
    return prepare(source, folder / encoding, encoding=encoding)


def held_out(seed: int = 0) -> pa.Table:
    """The raw rows of the test split."""
    rows = raw_rows(seed=seed)
    return rows.filter(pa.array(rows["split"].to_numpy() == 2))
