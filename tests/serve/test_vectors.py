"""Vectors of ids as a file, and how far they move."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.errors import UserError
from recsys_compress.serve.export import export
from recsys_compress.serve.predictor import Predictor
from recsys_compress.serve.vectors import movement, write_vectors
from recsys_compress.train.events import RunResult
from tests.serve.clicks import raw_rows
from tests.serve.conftest import train_clicks


@pytest.fixture(scope="module")
def predictor(artifact: Path) -> Predictor:
    return Predictor.load(artifact)


def test_each_known_value_has_the_vector_that_is_looked_up(
    predictor: Predictor, tmp_path: Path
) -> None:
    path = tmp_path / "items.parquet"
    rows = write_vectors(predictor, "item", path)
    found = pq.read_table(path)
    train = raw_rows().slice(0, 2000)["item"].drop_null()
    assert set(found["id"].to_pylist()) == set(train.to_pylist())
    assert rows == found.num_rows == len(set(train.to_pylist()))
    vectors = np.array(found["vector"].to_pylist(), dtype=np.float32)
    ids = predictor.encoders["item"].encode(found["id"].combine_chunks())
    state = predictor.embeddings.state_dict()
    tables = [table.numpy() for name, table in state.items() if name.endswith(".weight")]
    places = {row.tobytes() for table in tables for row in table}
    assert all(vector.tobytes() in places for vector in vectors)
    assert sorted(ids) == list(range(2, 2 + rows))


def test_movement(clicks_run: RunResult, predictor: Predictor, tmp_path: Path) -> None:
    same = movement(predictor, predictor, "item")
    assert same is not None
    assert same.cosine_distance == pytest.approx(0, abs=1e-6)
    assert same.neighbours_changed == 0
    export(clicks_run.folder, tmp_path / "int4", StoragePlan(types="int4"))
    rounded = movement(predictor, Predictor.load(tmp_path / "int4"), "item")
    assert rounded is not None
    assert rounded.cosine_distance is not None
    assert 0 < rounded.cosine_distance < 0.1
    assert 0 < rounded.neighbours_changed < 0.6


def test_hashed_and_absent_fields(predictor: Predictor, tmp_path: Path) -> None:
    run = train_clicks(tmp_path, "hash", "unified")
    export(run.folder, tmp_path / "hashed", StoragePlan(types="fp32"))
    hashed = Predictor.load(tmp_path / "hashed")
    assert movement(predictor, hashed, "item") is None
    assert movement(hashed, predictor, "item") is None
    with pytest.raises(UserError, match="field 'item': is hashed"):
        write_vectors(hashed, "item", tmp_path / "items.parquet")
    with pytest.raises(UserError, match="did you mean 'item'"):
        write_vectors(predictor, "items", tmp_path / "items.parquet")
