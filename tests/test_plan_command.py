"""The command `plan`, and `train` with what it wrote."""

import dataclasses
import json
from pathlib import Path

import pytest

from recsys_compress.cli import run
from recsys_compress.config import RuleConfig, dump_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.trainer import train
from tests.train.jobs import EMBEDDINGS, make_job

FEW = ("--methods", "full, low_rank")

pytestmark = [
    pytest.mark.usefixtures("place"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
]


@pytest.fixture
def place(
    synthetic_dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with `job.toml`, in which the command runs."""
    job = make_job(synthetic_dataset, tmp_path / "runs", "full", epochs=1, threads=1)
    embedding = dataclasses.replace(
        EMBEDDINGS["full"],
        optimizer="adam",
        learning_rate=0.01,
        budget="2x",  # which a plan's own takes the place of
        rules=(RuleConfig(table="field_0", method="full"),),
    )
    (tmp_path / "job.toml").write_text(dump_job(dataclasses.replace(job, embedding=embedding)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


def test_a_plan_is_written_and_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "job.toml", "--budget", "0.4x", *FEW)
    assert run([*plan, "--dry-run", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert not list(place.glob("plan.*"))
    assert run(plan) == 0
    out, err = capsys.readouterr()
    assert f"{first['bytes']['training']:,}" in out
    assert "grade data" in out
    assert "next: recsys-compress train job.toml --plan plan.toml\n" in err
    changed = ("--set", "train.batch_size=500", "--set", "embedding.min_rows=30")
    assert run([*plan, *changed, "--out", "other.toml"]) == 0
    assert "--plan other.toml --set train.batch_size=500\n" in capsys.readouterr().err
    (place / "file").touch()
    assert "cannot be written" in fails(capsys, *plan, "--out", "file/plan.toml")
    assert (place / "plan.html").read_text().startswith("<!doctype html>")
    assert run(["train", "job.toml", "--plan", "plan.toml", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"]["tables"] == first["bytes"]["parameters"]
    assert "-plan-" in result["folder"]
    assert run(["compress", result["folder"], "--storage", "planned", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["bytes"]["tables"] == first["bytes"]["serving"]
    assert set(stored["types"].values()) == {"fp32"}


def test_a_reference_is_trained_where_none_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ("plan", "job.toml", "--budget", "0.4x", "--grade", "reference", *FEW)
    assert run(plan) == 0
    out, err = capsys.readouterr()
    assert "the reference has" in out
    (folder,) = (place / "runs").iterdir()
    assert f"--start {folder}" in err


def test_a_plan_too_small_to_begin_with_a_model_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("--set", "embedding.rules=[]", "--set", "embedding.min_rows=0", "--json")
    train = ("train", "job.toml", "--set", "train.epochs=4", *settings)
    assert run(train) == 0
    folder = json.loads(capsys.readouterr().out)["folder"]
    for budget, says in (("0.9x", False), ("0.01x", True)):
        plan = ("plan", "job.toml", "--budget", budget, "--reference", folder, *settings)
        assert run(plan) == 0
        assert ("add --grade probes" in capsys.readouterr().err) is says


def test_bad_plans_leave_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*arguments: str) -> str:
        return fails(capsys, "plan", "job.toml", *arguments)

    assert "either --budget or --max-auc-loss" in plan()
    assert "at least" in plan("--budget", "10B", *FEW)
    assert "did you mean 'low_rank'" in plan("--budget", "0.5x", "--methods", "lowrank")
    assert "none: is no run's folder" in plan("--budget", "0.5x", "--reference", "none")
    both = ("train", "job.toml", "--plan", "none.toml", "--set", "embedding.budget=1x")
    assert "--plan says what --set embedding.budget would" in fails(capsys, *both)
    both = (*both[:-1], "embedding.method = hash")
    assert "--plan says what --set embedding.method would" in fails(capsys, *both)
    assert "p.html: is no plan file" in plan("--budget", "0.5x", "--out", "p.html")
    assert "goes with --plan" in fails(capsys, "train", "job.toml", "--start", "runs")
    assert "none.toml: cannot be read" in fails(capsys, "train", "job.toml", "--plan", "none.toml")
    assert [path.name for path in place.iterdir()] == ["job.toml"]


def test_the_reference_is_of_the_same_tables(
    place: Path, synthetic_dataset: PreparedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make_job(synthetic_dataset, place / "runs", "full", epochs=1)).folder
    arguments = ("--budget", "0.5x", "--reference", str(folder), "--set", "embedding.dim=12")
    assert "embedding_dim = 8 there and 12" in fails(capsys, "plan", "job.toml", *arguments)
