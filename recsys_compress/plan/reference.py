"""A finished run as evidence for plans."""

import dataclasses
import functools
from pathlib import Path

import torch

from recsys_compress.compress.method import Trained
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.plan.curves import ReferenceEvidence
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.track.progress import ProgressListener
from recsys_compress.train.build import Built, logical_tables
from recsys_compress.train.curvature import measure
from recsys_compress.train.handover import check_ids, check_tables, table_moments
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A finished run as evidence.

    Attributes:
        evidence: what its tables cost where they change.
        quality: what a rise of the logloss does to its AUC.
        built: its model.
        dataset: what it was trained on.
    """

    evidence: ReferenceEvidence
    quality: AucByLoss
    built: Built
    dataset: PreparedDataset


def read_reference(job: Job, dataset: PreparedDataset, folder: Path) -> Reference:
    """Returns what a run's tables cost where they change, and what that does to its AUC.

    It takes less than one epoch: a pass over (part of) the training split and one over validation.

    Args:
        job: that is planned.
        dataset: its data.
        folder: of the run.

    Raises:
        UserError: the run cannot be read, or is of other tables.
    """
    tables = logical_tables(dataset.schema, job.embedding.dim)
    with process_group():
        built, own = load_run(folder)
        check_tables(tables, logical_tables(own.schema, built.job.embedding.dim), folder)
        check_ids(dataset, own, folder)
        vectors = {table.name: built.embeddings.vectors(table.name) for table in tables}
        moments = {table.name: table_moments(built, dataset, table.name) for table in tables}
        curvatures = measure(built, dataset)
        trained = Trained(
            vectors=vectors.__getitem__,
            moments=moments.__getitem__,
            weights=functools.cache(lambda name: torch.tensor(dataset.frequencies(name))),
            curvature=curvatures.__getitem__,
        )
        return Reference(
            evidence=ReferenceEvidence(trained, curvatures),
            quality=AucByLoss.of(built, own),
            built=built,
            dataset=own,
        )


def short_run(job: Job, epochs: int) -> Path:
    """Trains full tables for a few epochs, and returns the run's folder, to be named next time.

    It is not tracked.

    Raises:
        UserError: the job does not suit the data.
    """
    full = dataclasses.replace(job.embedding, method="full", budget=None, rules=(), plan=None)
    settings = dataclasses.replace(job.train, epochs=epochs)
    short = dataclasses.replace(job, embedding=full, train=settings)
    result = train(short, listeners=[ProgressListener()])
    if result.interrupted:
        raise KeyboardInterrupt  # its folder has a checkpoint, and no model yet
    return result.folder
