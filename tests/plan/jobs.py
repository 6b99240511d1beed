"""Small jobs, and plans asked of them."""

import dataclasses
from pathlib import Path

from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.request import Request
from tests.train.jobs import EMBEDDINGS, make_job

ADAM = dataclasses.replace(EMBEDDINGS["adagrad"], dim=8, optimizer="adam", learning_rate=0.01)
FEW = ("full", "low_rank", "hash")  # methods, which is quick


def job_of(dataset: PreparedDataset, folder: Path, **embedding: object) -> Job:
    job = make_job(dataset, folder, "full", epochs=1, threads=1)
    return dataclasses.replace(job, embedding=dataclasses.replace(ADAM, **embedding))


def request_of(reference: Path, **settings: object) -> Request:
    given = {"grade": "reference", "methods": FEW, **settings}
    return Request(reference=reference, **given)


def planned(job: Job, plan: Plan, path: Path) -> Job:
    plan.file.write(path)
    return dataclasses.replace(job, embedding=dataclasses.replace(job.embedding, plan=str(path)))
