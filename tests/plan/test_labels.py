"""What fields say about the label, and what methods leave of it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources import make_source
from recsys_compress.plan.labels import LabelCounts, label_counts, redundancy
from recsys_compress.train.build import logical_tables

ROWS, USERS = 8000, 400
SCHEMA = """
categorical = ["user", "city", "noise"]
label = { column = "click" }
[[multi_valued]]
column = "tags"
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Users who click at rates of their own, their cities, ids of no meaning, and bags of tags."""
    folder = tmp_path_factory.mktemp("labels")
    generator = np.random.default_rng(0)
    users = generator.integers(0, USERS, ROWS)
    rates = generator.uniform(0.1, 0.9, USERS)
    columns = {
        "click": (generator.random(ROWS) < rates[users]).astype(np.int8),
        "user": users,
        "city": users % 20,
        "noise": generator.integers(0, USERS, ROWS),
        "tags": pa.array([[int(u % 7), int(u % 5)] for u in users]),
    }
    pq.write_table(pa.table(columns), folder / "raw.parquet")
    (folder / "schema.toml").write_text(SCHEMA)
    options = {"path": str(folder / "raw.parquet"), "schema_file": str(folder / "schema.toml")}
    return prepare(make_source("parquet", options), folder / "data")


def test_counts_are_those_of_the_training_split(dataset: PreparedDataset) -> None:
    for name in ("user", "tags"):
        counts = LabelCounts.of(dataset, name)
        assert counts.counts.sum() == dataset.rows("train") * (2 if name == "tags" else 1)
        assert (counts.positives <= counts.counts).all()
        rate = dataset.manifest.splits["train"].label_rate
        assert counts.positives[0].sum() == pytest.approx(rate * counts.counts.sum(), rel=1e-6)


def test_many_ids_without_meaning_say_nothing(dataset: PreparedDataset) -> None:
    """Where noise is not taken off, 400 random ids seem to say a fifth of what users do."""
    noise, user = (LabelCounts.of(dataset, name) for name in ("noise", "user"))
    found, error = noise.information()
    whole, _ = user.information()
    assert whole > 0.05
    assert found < 0.05 * whole
    assert 0 < error < 0.1 * whole
    raw = noise._divergence(np.zeros(len(noise.ids), dtype=np.int64))[0].sum()
    assert raw > 0.15 * whole


def test_a_function_of_another_field_is_redundant(dataset: PreparedDataset) -> None:
    assert redundancy(dataset, ["user", "city", "noise"]) == {"city": "user"}
    found = label_counts(dataset, ["user", "city", "noise", "tags"])
    alone = LabelCounts.of(dataset, "city").information()[0]
    assert found["city"].information()[0] == pytest.approx(0.05 * alone)
    assert found["user"].share == found["tags"].share == 1


def test_sharing_and_narrowness_lose_more_and_more(dataset: PreparedDataset) -> None:
    counts = LabelCounts.of(dataset, "user")
    (table,) = (t for t in logical_tables(dataset.schema, 16) if t.name == "user")

    def lost(method: Full | Hash | LowRank) -> float:
        return counts.lost(counts.kept(method.lower([table]), "user", 16))[0]

    whole = counts.information()[0]
    assert lost(Full()) == 0
    hashed = [lost(Hash(share=share)) for share in (0.5, 0.25, 0.1, 0.01)]
    narrow = [lost(LowRank(rank=rank)) for rank in (12, 8, 4, 1)]
    for losses in (hashed, narrow):
        assert losses == sorted(losses)
        assert 0 < losses[0] < losses[-1] <= whole
