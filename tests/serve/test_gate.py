"""The gate without a registry: limits, and which rows are fit for it."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.errors import UserError
from recsys_compress.serve.export import export
from recsys_compress.serve.gate import Check, GatePolicy, judge, load_policy
from recsys_compress.serve.predictor import Predictor
from recsys_compress.train.events import RunResult
from tests.serve.clicks import held_out, prepared


@pytest.fixture(scope="module")
def predictor(artifact: Path) -> Predictor:
    return Predictor.load(artifact)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    pq.write_table(held_out(), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_a_model_against_itself_and_against_its_rounded_form(
    clicks_run: RunResult, predictor: Predictor, rows: Path, tmp_path: Path
) -> None:
    policy = GatePolicy(min_calibration=None, max_calibration=None)
    same = judge(predictor, predictor, rows, policy)
    assert not same.failed
    for name in ("auc_difference", "auc_difference_low", "logloss_increase", "drift"):
        assert same.figures[name] == 0
    assert same.figures["auc"] == pytest.approx(clicks_run.test["auc"], abs=1e-6)
    assert same.figures["logloss"] == pytest.approx(clicks_run.test["logloss"], abs=1e-6)
    export(clicks_run.folder, tmp_path / "int2", StoragePlan(types="int2"))
    rough = judge(Predictor.load(tmp_path / "int2"), predictor, rows, policy)
    assert rough.figures["auc_difference"] != 0
    assert rough.figures["bytes"] < same.figures["bytes"]


@pytest.mark.parametrize(
    ("limit", "figure"),
    [
        ({"min_auc": 0.999}, "auc"),
        ({"max_bytes": "1kB"}, "bytes"),
        ({"max_latency_ms": 1e-6}, "latency_ms"),
        ({"min_rows": 10**6}, "rows"),
        ({"min_auc_difference": 0.1}, "auc_difference_low"),
    ],
)
def test_each_limit_fails_by_its_name(
    predictor: Predictor, rows: Path, limit: dict[str, float], figure: str
) -> None:
    policy = replace(GatePolicy(min_calibration=None, max_calibration=None), **limit)  # type: ignore[arg-type]
    failed = judge(predictor, predictor, rows, policy).failed
    assert [check.figure for check in failed] == [figure]
    assert str(failed[0]).startswith(f"{figure} ")


def test_a_figure_that_is_not_defined_keeps_no_limit() -> None:
    nan = float("nan")
    assert not Check(figure="auc", value=nan, limit=0, least=True).passed
    assert not Check(figure="drift", value=nan, limit=1, least=False).passed


def test_rows_that_are_not_fit(predictor: Predictor, rows: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"is not what run .* was trained on"):
        judge(predictor, None, other.path, GatePolicy())
    pq.write_table(held_out().drop(["stars"]), rows)
    with pytest.raises(UserError, match="has no column 'stars'; held-out rows need the label"):
        judge(predictor, None, rows, GatePolicy())
    pq.write_table(held_out().drop(["times"]), rows)
    with pytest.raises(UserError, match="has no column 'times'; held-out rows need their weights"):
        judge(predictor, None, rows, GatePolicy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_auk = 1", "unknown key 'min_auk'; did you mean 'min_auc'"),
        ("min_auc = 'x'", "min_auc = 'x'"),
        ("max_bytes = 'big'", "size 'big' is not understood"),
        ("confidence = 1.5", "confidence = 1.5"),
        ("a = [", "is not valid TOML"),
    ],
)
def test_a_policy_that_is_not_valid(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "gate.toml")


def test_the_policy_in_pipelines_is_valid() -> None:
    path = Path(__file__).parents[2] / "pipelines" / "gate.toml"
    assert load_policy(path).min_rows == 10_000
    assert load_policy(None) == GatePolicy()
