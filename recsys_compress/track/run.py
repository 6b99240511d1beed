"""Training recorded in MLflow: parameters, metrics, tags and artifacts of every run.

A tracking server that is away before the first step is the
user's to mend; one that goes away later costs a warning, never the training.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from recsys_compress.config import Job, dump_job
from recsys_compress.errors import UserError
from recsys_compress.files import to_json, write_text
from recsys_compress.track import plots
from recsys_compress.track.client import reach
from recsys_compress.track.heatmap import heat_map
from recsys_compress.track.uri import (
    alone,
    artifact_location,
    first_line,
    shown,
    tracking_uri,
)
from recsys_compress.train.events import Listener, Metrics, RunResult, RunStart
from recsys_compress.train.folder import RESULT
from recsys_compress.train.handover import Start

logger = logging.getLogger(__name__)

RUN_FILE = "mlflow.json"

_FLUSH_SECONDS = 10.0
# MLflow's limits for one call of log_batch, and for one parameter.
_MAX_PARAMS = 100
_MAX_METRICS = 1000
_MAX_CHARS = 6000


def tracked_train(
    job: Job,
    *,
    resume: Path | None = None,
    start: Start | None = None,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Trains a job and records it in MLflow.

    Args:
        job: the job; `job.tracking` says where it is recorded.
        resume: folder of an interrupted run; its MLflow run goes on.
        start: a trained model to begin with.
        listeners: others that hear of the run.

    Returns:
        The result, whose `run_id` is that of the MLflow run.

    Raises:
        UserError: the job is not valid, or MLflow cannot be reached.
    """
    from recsys_compress.train.shard import process_group
    from recsys_compress.train.trainer import train

    with process_group(job.train.device, job.sharding.timeout) as ranks:
        with ranks.together():
            trackers = [MLflowListener(job)] if ranks.first else []
        result = train(job, listeners=[*trackers, *listeners], resume=resume, start=start)
        # MLflow gives out its own ids; the run is to have one only.
        run_id = ranks.agree("".join(tracker.run_id for tracker in trackers))
        result = dataclasses.replace(result, run_id=run_id)
        if ranks.first:
            write_text(result.folder / RESULT, to_json(result.to_json(), indent=2))
        return result


class MLflowListener:
    """Records one run in MLflow.

    Attributes:
        run_id: the MLflow run; empty until the run starts.
    """

    def __init__(self, job: Job) -> None:
        """Checks that the place to record in can be reached; nothing is written yet.

        Raises:
            UserError: it cannot.
        """
        self.run_id = ""
        self._uri = tracking_uri(job)
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        reach(self._uri)

    def started(self, run: RunStart) -> None:
        """Makes the MLflow run, or takes up that of an interrupted run, and logs what is known.

        Raises:
            UserError: MLflow refuses.
        """
        try:
            with alone(self._uri):
                self._client = MlflowClient(tracking_uri=self._uri)
                self.run_id = self._resumed(run) or self._created(run)
            self._client.log_text(self.run_id, dump_job(_public(run.job)), "job.toml")
            self._client.log_dict(self.run_id, run.size, "size.json")
            if run.shards:
                self._client.log_dict(self.run_id, {"shards": run.shards}, "sharding.json")
        except (MlflowException, OSError) as error:
            raise UserError(f"tracking.uri = {shown(self._uri)!r}: {first_line(error)}") from error
        write_text(run.folder / RUN_FILE, json.dumps({"run_id": self.run_id}) + "\n")
        self.metrics(run.first_step, _size_metrics(run.bytes))

    def metrics(self, step: int, values: Metrics) -> None:
        """Keeps figures, and sends those kept so far every ten seconds."""
        now = int(time.time() * 1000)
        self._buffer += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def finished(self, result: RunResult) -> None:
        """Logs the final figures and plots and closes the MLflow run."""
        self.metrics(result.steps, _final_metrics(result))
        self._flush()
        history = to_json(result.history, indent=2)
        self._send(self._client.log_text, self.run_id, history, "history.json")
        for path in _draw(result):
            self._send(self._client.log_artifact, self.run_id, str(path))
        self._close("KILLED" if result.interrupted else "FINISHED")

    def failed(self, error: BaseException) -> None:
        """Closes the MLflow run, with the error as a tag."""
        if not self.run_id:
            return
        self._flush()
        text = f"{type(error).__name__}: {error}"
        self._send(self._client.set_tag, self.run_id, "error", text[:_MAX_CHARS])
        self._close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _resumed(self, run: RunStart) -> str:
        """Returns the MLflow run of the process that was interrupted, open again, or ""."""
        path = run.folder / RUN_FILE
        run_id = reopened(self._client, path)
        if run_id is None and path.exists():
            logger.warning(
                "MLflow at %s does not have the run of %s; starting another", shown(self._uri), path
            )
        return run_id or ""

    def _created(self, run: RunStart) -> str:
        experiment = experiment_id(self._client, run.job.tracking.experiment, self._uri)
        run_id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        flat = _flatten(dataclasses.asdict(_public(run.job)))
        params = [Param(key, str(value)[:_MAX_CHARS]) for key, value in flat.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
        tags = run.tags | {"run_folder": str(run.folder.absolute())}
        if run.job.tracking.parent is not None:
            tags[MLFLOW_PARENT_RUN_ID] = run.job.tracking.parent
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        return run_id

    def _flush(self) -> None:
        """Sends the kept figures; what MLflow does not take now is kept for the next time."""
        self._flushed = time.monotonic()
        while self._buffer:
            batch = self._buffer[:_MAX_METRICS]
            if not self._send(self._client.log_batch, self.run_id, batch):
                return
            del self._buffer[: len(batch)]

    def _close(self, status: str) -> None:
        self._send(self._client.set_terminated, self.run_id, status)

    def _send(self, call: Callable[..., Any], *arguments: Any) -> bool:
        """Calls MLflow; a failure is a warning, since the training matters more."""
        try:
            call(*arguments)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s: %s", shown(self._uri), first_line(error))
            return False
        return True


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the id of an experiment, which is made if need be.

    Raises:
        UserError: it is deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location(uri)))
        except MlflowException as error:
            # Another process made it in between.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment = {name!r}: is deleted in MLflow; restore it or name another"
        )
    return str(found.experiment_id)


def reopened(client: MlflowClient, path: Path) -> str | None:
    """Returns the run whose id a file keeps, open again; None where there is none."""
    if not path.exists():
        return None
    run_id = str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        # The second: the run was deleted by hand.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run_id


def _size_metrics(sizes: Metrics) -> Metrics:
    names = {"tables": "table_bytes", "full": "full_bytes", "ratio": "ratio"}
    return {f"size/{name}": float(sizes[key]) for key, name in names.items()}


def _final_metrics(result: RunResult) -> Metrics:
    """Returns the figures of the whole run; `best/` are those of the chosen checkpoint."""
    splits = {"best": result.valid, "test": result.test}
    figures = {
        f"{prefix}/{name}": value
        for prefix, values in splits.items()
        for name, value in values.items()
        if name != "rows"
    }
    return figures | {
        "best/step": result.best_step,
        "perf/samples_per_s": result.samples_per_s,
        "perf/peak_rss_bytes": result.peak_rss_bytes,
        "perf/seconds": result.seconds,
        "size/optimizer_bytes": result.bytes["optimizer"],
    }


def _draw(result: RunResult) -> Iterator[Path]:
    """Draws the run's plots into its folder, as far as there are figures, and yields them."""
    if result.history:
        path = result.folder / "learning_curve.png"
        yield plots.learning_curve(result.history, result.best_step, path)
    if result.calibration:
        yield plots.calibration(result.calibration, result.folder / "calibration.png")
    for number, part in enumerate(result.kept):
        name = f"kept_{number}.png" if number else "kept.png"
        kept, rest = part["rows"], {key: part[key] for key in ("most", "label", "columns")}
        yield heat_map(kept, result.folder / name, **rest)


def _public(job: Job) -> Job:
    """Returns the job without a password in its tracking URI."""
    if job.tracking.uri is None:
        return job
    tracking = dataclasses.replace(job.tracking, uri=shown(job.tracking.uri))
    return dataclasses.replace(job, tracking=tracking)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
