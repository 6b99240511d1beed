"""Training a plan from a finished run's vectors instead of from scratch."""

from pathlib import Path

from recsys_compress.compress.policy import resolve
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.build import logical_tables
from recsys_compress.train.handover import Start, check_ids, check_tables, hand_over
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group


def start_from(job: Job, folder: Path) -> Start:
    """Returns what a job begins with where its tables take those of a finished run over.

    Args:
        job: the job; its plan says how tables are stored.
        folder: of the run, of the same data and model.

    Raises:
        UserError: the run cannot be read, or does not suit the job.
    """
    dataset = PreparedDataset.open(job.data.path)
    tables = logical_tables(dataset.schema, job.embedding.dim)
    # What a plan has for training from scratch, like dims kept evenly, is not what suits the run.
    policy = resolve(job.embedding, tables).in_one_stage(adopting=True)
    with process_group():
        built, own = load_run(folder)
        check_tables(tables, logical_tables(own.schema, built.job.embedding.dim), folder)
        check_ids(dataset, own, folder)
        return hand_over(built, dataset, tables, policy)
