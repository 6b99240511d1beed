import logging
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from recsys_compress.config import Job, load_job
from recsys_compress.errors import UserError
from recsys_compress.track.run import MLflowListener
from recsys_compress.train.events import RunResult, RunStart
from tests.track.conftest import recorded_in

# SQLAlchemy says so of MLflow's own tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


def tell(listener: MLflowListener, start: RunStart, result: RunResult) -> None:
    """A whole run."""
    listener.started(start)
    tell_rest(listener, result)


def tell_rest(listener: MLflowListener, result: RunResult) -> None:
    for entry in result.history:
        step = int(entry["step"])
        listener.metrics(step, {"train/loss": entry["train_loss"], "eval/auc": entry["auc"]})
    listener.finished(result)


@pytest.fixture(params=["sqlite_uri", "server_uri"])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_everything_of_a_run_reads_back(
    uri: str, job: Job, start: RunStart, result: RunResult, tmp_path: Path
) -> None:
    job = recorded_in(job, uri)
    listener = MLflowListener(job)
    kept = {"rows": {"user": [8.0, 4.0]}, "most": 8.0, "label": "dims", "columns": "block"}
    tell(listener, replace(start, job=job), replace(result, kept=[kept]))

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(listener.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == start.name
    assert run.data.params["embedding.budget"] == "None"
    assert run.data.params["model.dcnv2.hidden"] == "(256, 128)"
    assert run.data.params["tracking.uri"] == uri
    assert run.data.tags["dataset"] == "abc"
    assert run.data.metrics["size/table_bytes"] == 1000
    assert run.data.metrics["size/ratio"] == 4
    assert run.data.metrics["test/auc"] == 0.74
    assert run.data.metrics["best/auc"] == 0.75
    assert run.data.metrics["perf/peak_rss_bytes"] == 1e9
    curve = client.get_metric_history(listener.run_id, "eval/auc")
    assert [(m.step, m.value) for m in curve] == [(10, 0.70), (20, 0.75), (30, 0.74)]

    names = {artifact.path for artifact in client.list_artifacts(listener.run_id)}
    pictures = {"calibration.png", "learning_curve.png", "kept.png"}
    assert names == {"job.toml", "size.json", "sharding.json", "history.json"} | pictures
    local = Path(client.download_artifacts(listener.run_id, "", str(tmp_path)))
    assert load_job(local / "job.toml") == job
    assert all((local / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_artifacts_lie_beside_the_database(
    sqlite_uri: str, job: Job, start: RunStart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    listener = MLflowListener(recorded_in(job, sqlite_uri))
    listener.started(start)
    folder = Path(sqlite_uri.removeprefix("sqlite:///")).parent / "mlruns"
    assert list(folder.rglob(f"{listener.run_id}/artifacts/job.toml"))
    assert list(elsewhere.iterdir()) == []


def test_a_resumed_run_goes_on_in_its_mlflow_run(
    sqlite_uri: str, job: Job, start: RunStart, result: RunResult
) -> None:
    job = recorded_in(job, sqlite_uri)
    first = MLflowListener(job)
    tell(first, start, replace(result, interrupted=True))
    client = MlflowClient(tracking_uri=sqlite_uri)
    assert client.get_run(first.run_id).info.status == "KILLED"

    second = MLflowListener(job)
    second.started(replace(start, first_step=30))
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.metrics(40, {"eval/auc": 0.8})
    second.finished(result)
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(first.run_id, "eval/auc")) == 4


def test_a_run_deleted_in_between_is_made_anew(
    sqlite_uri: str, job: Job, start: RunStart, result: RunResult
) -> None:
    job = recorded_in(job, sqlite_uri)
    first, second = MLflowListener(job), MLflowListener(job)
    tell(first, start, replace(result, interrupted=True))
    MlflowClient(tracking_uri=sqlite_uri).delete_run(first.run_id)
    second.started(start)
    assert second.run_id not in ("", first.run_id)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("odd"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_failed_run_keeps_its_figures_and_its_error(
    sqlite_uri: str, job: Job, start: RunStart, error: BaseException, status: str
) -> None:
    listener = MLflowListener(recorded_in(job, sqlite_uri))
    listener.started(start)
    listener.metrics(5, {"train/loss": 0.6})
    listener.failed(error)
    run = MlflowClient(tracking_uri=sqlite_uri).get_run(listener.run_id)
    assert run.info.status == status
    assert run.data.metrics["train/loss"] == 0.6
    assert run.data.tags["error"].startswith(type(error).__name__)


def test_failing_before_the_start_records_nothing(job: Job, tmp_path: Path) -> None:
    listener = MLflowListener(recorded_in(job, f"sqlite:///{tmp_path}/new/mlflow.db"))
    listener.failed(UserError("unreachable budget"))
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_the_users_error(
    sqlite_uri: str, job: Job, start: RunStart
) -> None:
    client = MlflowClient(tracking_uri=sqlite_uri)
    client.delete_experiment(client.create_experiment("gone"))
    tracking = replace(job.tracking, experiment="gone", uri=sqlite_uri)
    job = replace(job, tracking=tracking)
    with pytest.raises(UserError, match="'gone': is deleted in MLflow"):
        MLflowListener(job).started(replace(start, job=job))


def test_losing_the_database_midway_is_a_warning(
    sqlite_uri: str,
    job: Job,
    start: RunStart,
    result: RunResult,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    database = Path(shutil.copy(sqlite_uri.removeprefix("sqlite:///"), tmp_path))
    listener = MLflowListener(recorded_in(job, f"sqlite:///{database}"))
    listener.started(start)
    database.write_bytes(b"damaged" * 1000)
    with caplog.at_level(logging.WARNING):
        tell_rest(listener, result)
    assert "MLflow at sqlite" in caplog.text
    assert (start.folder / "learning_curve.png").exists()


def test_recording_costs_little(sqlite_uri: str, job: Job, start: RunStart) -> None:
    listener = MLflowListener(recorded_in(job, sqlite_uri))
    listener.started(start)
    before = time.perf_counter()
    for step in range(1000):
        listener.metrics(step, {"train/loss": 0.5, "perf/samples_per_s": 1e4})
    assert time.perf_counter() - before < 0.5


AT_ONCE = """
import sys
from pathlib import Path
from recsys_compress.config import DataConfig, Job, TrackingConfig
from recsys_compress.track.run import MLflowListener
from recsys_compress.train.events import RunStart
job = Job(data=DataConfig(path="x"), tracking=TrackingConfig(uri=sys.argv[1]))
listener = MLflowListener(job)
sizes = {"tables": 1, "full": 1, "ratio": 1.0, "optimizer": 1, "model": 1}
listener.started(
    RunStart(job=job, folder=Path(sys.argv[2]), run_id="0", name="n", total_steps=1, first_step=0,
             bytes=sizes, size={}, shards=[], tags={})
)
"""


def test_two_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    commands = [[sys.executable, "-c", AT_ONCE, uri, str(tmp_path / str(n))] for n in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    errors = [process.communicate()[1].decode()[-500:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("recsys-compress")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
