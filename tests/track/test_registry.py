"""From a finished run to a champion and back, over HTTP, against a real MLflow server."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from recsys_compress.cli import run as command
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.errors import UserError
from recsys_compress.serve.gate import GatePolicy
from recsys_compress.serve.predictor import Predictor
from recsys_compress.track.promotion import promote, rollback
from recsys_compress.track.registry import fetch, fetch_model, located, named, register
from recsys_compress.train.events import RunResult
from tests.serve.clicks import held_out, prepared
from tests.track.conftest import train_twice
from tests.track.versions import ANY, PLAN, aliases

# SQLAlchemy says so of MLflow's own tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


def test_a_run_becomes_a_version_with_its_figures(
    server_uri: str, client: MlflowClient, runs: list[RunResult], tmp_path: Path
) -> None:
    found = register(runs[0].folder, PLAN, name="figures")
    assert found.created
    version = client.get_model_version("figures", found.version)
    assert version.run_id == runs[0].run_id == version.tags["run.id"]
    assert float(version.tags["test.auc"]) == pytest.approx(runs[0].test["auc"], abs=1e-8)
    assert int(version.tags["bytes.tables"]) > 0
    assert version.tags["method"] == "full"
    assert "parent.version" not in version.tags
    assert "as served" in version.description
    assert aliases(client, "figures") == {"challenger": "1"}

    folder = fetch(client, version, tmp_path)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.name != "artifact.json")
    rows = held_out()
    probabilities = Predictor.load(folder).predict(rows)
    with located("models:/figures@challenger", server_uri) as other:
        assert Predictor.load(other).predict(rows).tolist() == probabilities.tolist()
    assert int(version.tags["bytes.artifact"]) <= size

    model = fetch_model(client, version, tmp_path / "model")
    requirements = (model / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)
    assert {"torchrec", "mlflow", "recsys-compress"} <= {r.partition("==")[0] for r in requirements}
    assert not [path for path in model.rglob("*") if path.suffix in (".pkl", ".pickle")]
    example = json.loads((model / "input_example.json").read_text())
    assert set(example["columns"]) == {"user", "item", "price", "tags", "tag_weights", "at"}


def test_registering_again_makes_nothing_twice(client: MlflowClient, runs: list[RunResult]) -> None:
    first = register(runs[0].folder, PLAN, name="twice")
    again = register(runs[0].folder, PLAN, name="twice")
    assert (again.version, again.created) == (first.version, False)
    other = register(runs[0].folder, StoragePlan(types="int8"), name="twice")
    assert other.created
    assert int(other.tags["bytes.tables"]) < int(first.tags["bytes.tables"])
    assert aliases(client, "twice") == {"challenger": other.version}


def test_registering_twice_at_once_makes_one_version(
    client: MlflowClient, runs: list[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def meanwhile(*arguments: object, **more: object) -> object:
        """The other registration runs while this one makes its version."""
        monkeypatch.undo()
        found.append(register(runs[0].folder, PLAN, name="at-once"))
        return real(*arguments, **more)  # type: ignore[arg-type]

    real = MlflowClient.create_model_version
    monkeypatch.setattr(MlflowClient, "create_model_version", meanwhile)
    found.append(register(runs[0].folder, PLAN, name="at-once"))
    assert [registered.version for registered in found] == ["1", "1"]
    assert [v.version for v in client.search_model_versions("name = 'at-once'")] == ["1"]
    assert aliases(client, "at-once") == {"challenger": "1"}


def test_names_of_fields_that_mlflow_does_not_take(server_uri: str, tmp_path: Path) -> None:
    runs = train_twice(prepared(tmp_path, user="k[usd], %"), tmp_path / "runs", server_uri)
    register(runs[0].folder, PLAN, name="odd-names")
    assert promote("odd-names", server_uri, ANY).passed
    found = register(runs[1].folder, PLAN, name="odd-names")
    assert float(found.tags["vectors.k_usd__ _.cosine_distance"]) > 0.1


def test_data_that_has_moved_is_remembered(
    server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepared(tmp_path / "before")
    run = train_twice(dataset, tmp_path / "runs", server_uri)[0]
    dataset.path.rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    register(run.folder, PLAN, name="moved", data=Path("after"))
    monkeypatch.chdir("/")
    assert promote("moved", server_uri, ANY).passed


def test_the_gate_moves_the_champion_and_rollback_moves_it_back(
    server_uri: str, client: MlflowClient, runs: list[RunResult]
) -> None:
    good = register(runs[1].folder, PLAN, name="gate")
    first = promote("gate", server_uri, ANY)
    assert (first.passed, first.champion) == (True, None)
    assert promote("gate", server_uri, ANY).reason == "version 1 is the champion already"

    small = register(runs[1].folder, StoragePlan(types="int8"), name="gate")
    assert small.tags["parent.version"] == good.version
    # The same model but for rounding.
    assert float(small.tags["vectors.user.cosine_distance"]) < 1e-3
    assert float(small.tags["vectors.user.neighbours_changed"]) < 0.2
    assert 390 < int(small.tags["vectors.user.ids"]) <= 400
    second = promote("gate", server_uri, replace(GatePolicy(), min_calibration=None,
                                                 max_calibration=None))  # fmt: skip
    assert second.passed, second.reason
    assert second.report is not None
    assert abs(second.report.figures["auc_difference"]) < 0.01
    assert aliases(client, "gate") == {"challenger": "2", "champion": "2", "previous": "1"}
    tags = client.get_model_version("gate", "2").tags
    assert tags["gate.decision"] == "passed"
    assert tags["gate.against"] == "1"
    assert "promoted" in tags

    worse = register(runs[0].folder, PLAN, name="gate")
    assert float(worse.tags["vectors.user.cosine_distance"]) > 0.1
    third = promote("gate", server_uri, GatePolicy(max_drift=None))
    assert not third.passed
    assert third.report is not None
    assert "auc_difference_low" in third.reason
    assert client.get_model_version("gate", "3").tags["gate.decision"].startswith("failed: ")
    assert aliases(client, "gate")["champion"] == "2"

    back = rollback("gate", server_uri)
    assert (back.version, back.champion) == ("1", "2")
    assert aliases(client, "gate")["champion"] == "1"
    assert "already" in rollback("gate", server_uri).reason
    assert "to version 1" in client.get_model_version("gate", "2").tags["rollback"]
    client.set_registered_model_alias("gate", "challenger", "2")
    refused = promote("gate", server_uri, ANY)
    assert (refused.passed, refused.reason) == (
        False, "version 2 was rolled back; register another",
    )  # fmt: skip


def test_raw_rows_give_the_figures_of_the_prepared_ones(
    server_uri: str, runs: list[RunResult], tmp_path: Path
) -> None:
    register(runs[1].folder, PLAN, name="raw")
    pq.write_table(held_out(), tmp_path / "rows.parquet")
    one = promote("raw", server_uri, replace(ANY, min_auc=0.999))
    other = promote("raw", server_uri, replace(ANY, min_auc=0.999), tmp_path / "rows.parquet")
    assert one.report is not None
    assert other.report is not None
    for name in ("auc", "logloss", "calibration", "rows", "bytes"):
        assert one.report.figures[name] == pytest.approx(other.report.figures[name], abs=1e-6)
    assert one.report.figures["auc"] == pytest.approx(runs[1].test["auc"], abs=1e-6)


def test_statuses_of_the_command_line(
    server_uri: str,
    runs: list[RunResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_uri)
    assert command(["register", str(runs[0].folder), "--name", "statuses", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1"
    limits = tmp_path / "gate.toml"
    limits.write_text("min_auc = 0.99\nmax_bytes = '1kB'\nmin_rows = 1\n")
    assert command(["promote", "statuses", "--policy", str(limits), "--json"]) == 3
    out, err = capsys.readouterr()
    assert {"auc", "bytes"} <= set(json.loads(out)["failed"])
    assert "auc 0.6" in err or "auc 0.7" in err
    assert "must be at least 0.99" in err
    limits.write_text("min_auk = 0.99")
    assert command(["promote", "statuses", "--policy", str(limits)]) == 2
    assert "unknown key 'min_auk'; did you mean 'min_auc'?" in capsys.readouterr().err
    assert command(["rollback", "statuses"]) == 2
    assert command(["promote", "nobody"]) == 2
    assert "no challenger" in capsys.readouterr().err


def test_an_artifact_tampered_with_is_not_promoted_or_served(
    server_uri: str, client: MlflowClient, runs: list[RunResult], tmp_path: Path
) -> None:
    register(runs[0].folder, PLAN, name="tampered")
    promote("tampered", server_uri, ANY)
    bad = register(runs[1].folder, PLAN, name="tampered")
    version = named(client, f"models:/tampered/{bad.version}")
    model = fetch_model(client, version, tmp_path)
    path = model / "artifacts" / "artifact" / "dense.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    place = version.tags["artifact.path"]
    client.log_artifact(str(version.run_id), str(path), f"{place}/artifacts/artifact")
    with pytest.raises(UserError, match="has changed since it was written"):
        promote("tampered", server_uri, ANY)
    with pytest.raises(UserError, match="has changed since it was written"):
        fetch_model(client, version, tmp_path / "again")
    assert aliases(client, "tampered")["champion"] == "1"


def test_other_code_in_the_registry_is_never_run(
    server_uri: str, client: MlflowClient, runs: list[RunResult], tmp_path: Path
) -> None:
    found = register(runs[0].folder, StoragePlan(types="fp16"), name="code")
    version = named(client, "models:/code@challenger")
    code = tmp_path / "pyfunc_code.py"
    struck = tmp_path / "struck"
    code.write_text(f"open({str(struck)!r}, 'w')\n")
    client.log_artifact(str(version.run_id), str(code), found.tags["artifact.path"])
    with pytest.raises(UserError, match="its code is not that of this version"):
        fetch_model(client, version, tmp_path / "model")
    with located("models:/code@challenger", server_uri) as folder:  # runs no code at all
        assert np.isfinite(Predictor.load(folder).predict(held_out())).all()
    assert not struck.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda flavor: flavor.update(data="other"),
        lambda flavor: flavor.update(python_model="python_model.pkl"),
        lambda flavor: flavor["artifacts"]["artifact"].update(path="other"),
    ],
)
def test_a_model_that_names_other_folders_is_not_served(
    change: Callable[[dict[str, Any]], None],
    client: MlflowClient,
    runs: list[RunResult],
    tmp_path: Path,
) -> None:
    found = register(runs[0].folder, StoragePlan(types="fp16"), name="folders")
    version = named(client, f"models:/folders/{found.version}")
    place = version.tags["artifact.path"]
    whole = Path(client.download_artifacts(str(version.run_id), f"{place}/MLmodel", str(tmp_path)))
    model = Model.load(str(whole))
    change(model.flavors["python_function"])
    (tmp_path / "changed").mkdir()
    model.save(str(tmp_path / "changed" / "MLmodel"))
    client.log_artifact(str(version.run_id), str(tmp_path / "changed" / "MLmodel"), place)
    try:
        with pytest.raises(UserError, match="its code is not that of this version"):
            fetch_model(client, version, tmp_path / "model")
    finally:  # a second registration of the same files is the same version
        client.log_artifact(str(version.run_id), str(whole), place)


def test_the_registry_is_away(runs: list[RunResult], tmp_path: Path) -> None:
    away = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="cannot be reached"):
        register(runs[0].folder, PLAN, uri=away)
    with pytest.raises(UserError, match="cannot be reached"):
        promote("any", away, ANY)
    elsewhere = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=f"has no run {runs[0].run_id}"):
        register(runs[0].folder, PLAN, uri=elsewhere)
    copied = shutil.copytree(runs[0].folder, tmp_path / "run")
    (copied / "mlflow.json").unlink()
    with pytest.raises(UserError, match="names no MLflow run"):
        register(copied, PLAN)
