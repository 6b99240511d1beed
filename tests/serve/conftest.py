"""Runs and artifacts that the tests of deployment share."""

from dataclasses import replace
from pathlib import Path

import pytest

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.data.schema import Encoding
from recsys_compress.serve.export import export
from recsys_compress.train.events import RunResult
from recsys_compress.train.trainer import train
from tests.serve.clicks import prepared
from tests.train.jobs import make_job


def train_clicks(
    folder: Path, encoding: Encoding = "vocabulary", embedding: str = "full"
) -> RunResult:
    """A run of a second on the click log."""
    job = make_job(
        prepared(folder, encoding), folder / "runs", embedding, epochs=2, threads=1, batch_size=250
    )
    budget = 20_000 if encoding == "hash" else job.embedding.budget  # no share of 2**62 rows
    return train(replace(job, embedding=replace(job.embedding, min_rows=20, budget=budget)))


@pytest.fixture(scope="session")
def clicks_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train_clicks(tmp_path_factory.mktemp("clicks"))


@pytest.fixture(scope="session")
def artifact(clicks_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's model in fp32."""
    out = tmp_path_factory.mktemp("artifact") / "fp32"
    export(clicks_run.folder, out, StoragePlan(types="fp32"))
    return out
