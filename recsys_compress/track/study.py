"""A study in MLflow: one run in which the runs of its cells are nested, with the report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import RunTag

from recsys_compress.config import Job
from recsys_compress.files import write_text
from recsys_compress.track.client import connected
from recsys_compress.track.run import experiment_id, reopened
from recsys_compress.track.uri import tracking_uri


@contextmanager
def study_run(job: Job, title: str, kept: Path, report: Path) -> Iterator[str]:
    """Yields the id of a study's MLflow run, and logs the report at the end.

    Args:
        job: the study's job, which says where it is recorded.
        title: of the study; the run's name.
        kept: file that keeps the run's id, so that a study that is gone on with stays one run.
        report: folder whose files are logged as artifacts.

    Raises:
        UserError: MLflow cannot be reached or refuses.
    """
    uri = tracking_uri(job)
    with connected(uri) as client:
        run_id = reopened(client, kept)
        if run_id is None:
            experiment = experiment_id(client, job.tracking.experiment, uri)
            run_id = str(client.create_run(experiment, run_name=title).info.run_id)
            client.log_batch(run_id, tags=[RunTag("kind", "study")])
            write_text(kept, json.dumps({"run_id": run_id}) + "\n")
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with connected(uri) as client:
            if status == "FINISHED":
                client.log_artifacts(run_id, str(report))
            client.set_terminated(run_id, status)
