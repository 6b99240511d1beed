"""Raw rows through a deployed model: the figures of training, and what rows may hold."""

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recsys_compress
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.data.schema import Encoding
from recsys_compress.errors import UserError
from recsys_compress.serve import PACKAGES
from recsys_compress.serve.export import export
from recsys_compress.serve.predictor import Predictor
from recsys_compress.train.events import RunResult
from tests.serve.clicks import auc, held_out
from tests.serve.conftest import train_clicks

INPUTS = ["user", "item", "price", "tags", "tag_weights", "at"]


@pytest.fixture(scope="module")
def predictor(artifact: Path) -> Predictor:
    return Predictor.load(artifact)


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return held_out()


@pytest.mark.parametrize("kind", ["arrow", "pandas", "parquet"])
def test_raw_rows_reach_the_auc_of_training(
    predictor: Predictor, rows: pa.Table, clicks_run: RunResult, kind: str, tmp_path: Path
) -> None:
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=300)
    given = {"arrow": rows, "pandas": rows.to_pandas(), "parquet": tmp_path / "rows.parquet"}[kind]
    probabilities = predictor.predict(given)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (rows.num_rows,)
    assert clicks_run.test["auc"] > 0.6
    assert auc(probabilities, rows) == pytest.approx(clicks_run.test["auc"], abs=1e-6)


@pytest.mark.parametrize(
    ("encoding", "embedding"), [("hash", "unified"), ("vocabulary", "dynamic_sparse")]
)
def test_every_encoding_and_storage_type_reaches_the_stored_figures(
    encoding: Encoding, embedding: str, rows: pa.Table, tmp_path: Path
) -> None:
    run = train_clicks(tmp_path, encoding, embedding)
    for storage in ("fp32", "int8"):
        out = tmp_path / storage
        found = export(run.folder, out, StoragePlan(types=storage))  # type: ignore[arg-type]
        stored = found.test["auc"]
        assert stored is not None
        assert auc(Predictor.load(out).predict(rows), rows) == pytest.approx(stored, abs=1e-6)
        assert found.trained == run.test
    size = sum((tmp_path / name / "tables.safetensors").stat().st_size for name in ("int8", "fp32"))
    assert size > 0
    assert (tmp_path / "int8" / "tables.safetensors").stat().st_size < (
        tmp_path / "fp32" / "tables.safetensors"
    ).stat().st_size


def test_numbers_too_small_for_the_processor_are_zero_in_each_thread(
    predictor: Predictor, rows: pa.Table
) -> None:
    torch.set_flush_denormal(False)

    def left() -> int:
        predictor.predict(rows.slice(0, 5))
        return int((torch.full((4,), 1e-39) * 0.5).count_nonzero())

    with ThreadPoolExecutor(2) as pool:
        assert [pool.submit(left).result() for _ in range(2)] == [0, 0]


def test_layers_in_int8_reach_the_stored_figures_in_fewer_bytes(
    predictor: Predictor, rows: pa.Table, clicks_run: RunResult, tmp_path: Path
) -> None:
    plan = StoragePlan(types="int8")
    stored = export(clicks_run.folder, tmp_path / "int8", plan, layers="int8")
    loaded = Predictor.load(tmp_path / "int8")
    probabilities = loaded.predict(rows)
    assert auc(probabilities, rows) == pytest.approx(stored.test["auc"], abs=1e-6)
    assert stored.test["auc"] == pytest.approx(clicks_run.test["auc"], abs=0.002)
    assert np.abs(probabilities - predictor.predict(rows)).max() < 0.05
    assert np.array_equal(loaded.predict(rows.slice(5, 1)), probabilities[5:6])
    layers = "dense.safetensors"
    assert stored.files[layers].bytes < predictor.artifact.files[layers].bytes
    assert "linear layers in int8" in (tmp_path / "int8" / "README.md").read_text()


def test_rows_do_not_depend_on_their_neighbours_or_on_other_columns(
    predictor: Predictor, rows: pa.Table
) -> None:
    whole = predictor.predict(rows)
    some = rows.take([5, 1700, 3]).append_column("extra", pa.array([[1], None, [2]]))
    np.testing.assert_allclose(predictor.predict(some), whole[[5, 1700, 3]], atol=1e-6)
    assert predictor.predict(rows.slice(0, 0)).shape == (0,)
    assert predictor.predict(rows.select(INPUTS[::-1])).tolist() == whole.tolist()


def with_column(rows: pa.Table, name: str, values: object) -> pa.Table:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return rows.set_column(rows.column_names.index(name), name, array)


def test_missing_and_unknown_values_have_ids_of_their_own(
    predictor: Predictor, rows: pa.Table
) -> None:
    ten = rows.slice(0, 10)
    one, other = (
        predictor.predict(with_column(ten, "user", pa.array([value] * 10, pa.int64())))
        for value in (10**12, -7)
    )
    assert one.tolist() == other.tolist()  # both unknown
    missing = predictor.predict(with_column(ten, "user", pa.nulls(10)))
    assert missing.tolist() != one.tolist()
    for nothing in (pd.NA, None, np.nan):
        frame = ten.to_pandas().assign(user=nothing)
        assert predictor.predict(frame).tolist() == missing.tolist()
    # A missing price stands where the schema said.
    without = predictor.predict(with_column(ten, "price", pa.nulls(10, pa.float64())))
    assert without.tolist() == predictor.predict(with_column(ten, "price", [-1.0] * 10)).tolist()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", ["a"] * 3, "column 'user' holds strings, but integers in training"),
        ("item", [1, 2, 3], "column 'item' holds integers, but strings in training"),
        ("user", [[1]] * 3, "column 'user' holds lists"),
        ("user", [0.5] * 3, "column 'user' is double; ids must be integers or strings"),
        ("price", ["x"] * 3, "column 'price' is string; it must hold numbers"),
        ("price", [0.0, float("nan"), 0.0], "column 'price' is nan in row 2"),
        ("price", [0.0, 0.0, float("inf")], "column 'price' is inf in row 3"),
        ("tag_weights", ["1|2|3|4|5"] * 3, "has not one weight per id in row 1"),
        ("at", ["noon"] * 3, "column 'at' holds no times"),
    ],
)
def test_wrong_values_are_one_clear_error(
    predictor: Predictor, rows: pa.Table, column: str, values: list[object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predictor.predict(with_column(rows.slice(0, 3), column, values))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "rows: are list; give a pandas DataFrame"),
        (pd.DataFrame({"user": [1]}), "columns are missing: price, item, at, tags, tag_weights"),
        ("nowhere.parquet", "nowhere.parquet: no data file there"),
    ],
)
def test_what_are_no_rows(predictor: Predictor, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predictor.predict(given)


def test_rows_without_a_finite_score_are_told(artifact: Path, rows: pa.Table) -> None:
    loaded = Predictor.load(artifact)
    with torch.inference_mode():
        next(iter(loaded._model.parameters())).fill_(math.nan)
    with pytest.raises(UserError, match="rows: row 1 has no score"):
        loaded.predict(rows.slice(0, 3))


def test_a_request_may_lack_all_lists(predictor: Predictor, rows: pa.Table) -> None:
    one = rows.slice(0, 1)
    for name in ("tags", "tag_weights"):
        place = one.column_names.index(name)
        one = one.set_column(place, name, pa.nulls(1))
    beside = pa.concat_tables([one, rows.slice(1, 1)], promote_options="default")
    np.testing.assert_allclose(predictor.predict(one), predictor.predict(beside)[:1], atol=1e-6)


def test_pandas_columns_of_mixed_types(predictor: Predictor, rows: pa.Table) -> None:
    frame = rows.slice(0, 3).to_pandas()
    with pytest.raises(UserError, match="column 'user' is of mixed types"):
        predictor.predict(frame.assign(user=pd.Series([1, "a", None], dtype=object)))
    with pytest.raises(UserError, match=r"column 'user' holds .*1\.5.*; ids must be integers"):
        predictor.predict(frame.assign(user=[1.5, 2, 3]))
    with pytest.raises(UserError, match="column 'user' is there 2 times"):
        predictor.predict(pd.concat([frame, frame[["user"]]], axis=1))


SERVE = """
import sys
from recsys_compress.serve.predictor import Predictor
print(*Predictor.load(sys.argv[1]).predict(sys.argv[2])[:5].tolist())
"""
# torchrec's metadata asks for the CUDA build of FBGEMM, and the CPU build for none.
CPU_BUILD = {"torchrec": {"fbgemm-gpu"}}


def needed(names: Iterable[str]) -> set[str]:
    """The packages of these names and, by their metadata, all that they need."""
    found: set[str] = set()
    todo = [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            other = canonicalize_name(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and other not in CPU_BUILD.get(name, set()):
                todo.append(other)
    return found


def test_the_named_packages_alone_serve_without_the_training_data(
    predictor: Predictor, rows: pa.Table, artifact: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    packages = needed(PACKAGES)
    assert not packages & {"mlflow", "matplotlib", "pandas", "sqlalchemy", "typer", "rich"}
    for name in packages:
        for top in {file.parts[0] for file in metadata.files(name) or []} - {".."}:
            if not (site / top).is_symlink():
                found = metadata.distribution(name).locate_file(top)
                (site / top).symlink_to(str(found))
    (site / "recsys_compress").symlink_to(Path(recsys_compress.__file__).parent)
    pq.write_table(rows, tmp_path / "rows.parquet")
    done = subprocess.run(
        [sys.executable, "-S", "-c", SERVE, artifact, tmp_path / "rows.parquet"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [float(value) for value in done.stdout.split()]
    np.testing.assert_allclose(printed, predictor.predict(rows)[:5], atol=1e-6)
