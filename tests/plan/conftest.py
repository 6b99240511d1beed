from pathlib import Path

import pytest

from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import make_plan
from recsys_compress.train.trainer import train
from tests.plan.jobs import job_of, request_of


@pytest.fixture(scope="package")
def job(synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job_of(synthetic_dataset, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="package")
def reference(job: Job) -> Path:
    return train(job).folder


@pytest.fixture(scope="package")
def plan(job: Job, reference: Path) -> Plan:
    return make_plan(job, request_of(reference, budget="0.2x"))
