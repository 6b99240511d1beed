"""A run told by hand, and real places to record it in."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import recsys_compress.track  # noqa: F401  (sets MLflow's environment, so before it)
from recsys_compress.config import DataConfig, Job, TrackingConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.events import RunResult, RunStart
from tests.ports import free_port
from tests.serve.clicks import prepared
from tests.train.jobs import make_job

if TYPE_CHECKING:
    from mlflow import MlflowClient

HISTORY = [
    {"step": 10, "epoch": 0, "train_loss": 0.61, "auc": 0.70, "logloss": 0.60},
    {"step": 20, "epoch": 1, "train_loss": 0.55, "auc": 0.75, "logloss": 0.56},
    {"step": 30, "epoch": 2, "train_loss": 0.50, "auc": 0.74, "logloss": 0.57},
]


@pytest.fixture
def job() -> Job:
    return Job(data=DataConfig(path="nowhere"), tracking=TrackingConfig(experiment="told"))


@pytest.fixture
def start(job: Job, tmp_path: Path) -> RunStart:
    folder = tmp_path / "run"
    folder.mkdir()
    return RunStart(
        job=job,
        folder=folder,
        run_id="0" * 32,
        name="dcnv2-full-1x-s0",
        total_steps=30,
        first_step=0,
        bytes={"tables": 1000, "full": 4000, "ratio": 4.0, "optimizer": 100, "model": 2000},
        size={"total": {"tables": 1000}},
        shards=[
            {
                "table": "t",
                "kind": "row_wise",
                "rank": 1,
                "rows": 1000,
                "columns": 4,
                "parameter_bytes": 16_000,
                "optimizer_bytes": 4000,
            }
        ],
        tags={"torch": "2.13", "dataset": "abc"},
    )


@pytest.fixture
def result(start: RunStart) -> RunResult:
    return RunResult(
        run_id=start.run_id,
        folder=start.folder,
        valid={"auc": 0.75, "logloss": 0.56, "ne": 0.9, "calibration": 1.0, "ece": 0.01},
        test={"auc": 0.74, "logloss": 0.57, "ne": 0.91, "calibration": 1.01, "ece": 0.02},
        bytes=start.bytes,
        samples_per_s=5000.0,
        peak_rss_bytes=10**9,
        seconds=12.0,
        cpu_seconds=11.0,
        steps=30,
        best_step=20,
        history=HISTORY,
        calibration=[
            {"predicted": 0.1, "observed": 0.12, "rows": 500},
            {"predicted": 0.4, "observed": 0.38, "rows": 500},
        ],
    )


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the session: making its tables takes MLflow seconds."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


@pytest.fixture(scope="session")
def server_uri(sqlite_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, on a copy of the database made already."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(sqlite_uri.removeprefix("sqlite:///"), folder)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    # Without it the server starts seven more processes.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(uri, process, folder / "log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)


@pytest.fixture(scope="session")
def client(server_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server_uri, registry_uri=server_uri)


@pytest.fixture(scope="session")
def tracked_runs(server_uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """Two runs on the click log of unequal quality, recorded at the server."""
    folder = tmp_path_factory.mktemp("tracked")
    return train_twice(prepared(folder), folder / "runs", server_uri)


def train_twice(dataset: PreparedDataset, folder: Path, uri: str) -> list[RunResult]:
    from recsys_compress.track.run import tracked_train

    results = []
    for seed, epochs in ((0, 1), (1, 3)):
        job = make_job(dataset, folder, "full", epochs=epochs, threads=1, batch_size=250, seed=seed)
        tracking = replace(job.tracking, uri=uri)
        job = replace(job, tracking=tracking, embedding=replace(job.embedding, min_rows=20))
        results.append(tracked_train(job))
    return results


@pytest.fixture
def runs(tracked_runs: list[RunResult]) -> list[RunResult]:
    return tracked_runs


def wait_for(uri: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no MLflow server: {log.read_text()}")


def recorded_in(job: Job, uri: str) -> Job:
    return replace(job, tracking=replace(job.tracking, uri=uri))
