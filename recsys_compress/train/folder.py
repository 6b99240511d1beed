"""What lies in a run's folder."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from recsys_compress.compress.policy import Policy
from recsys_compress.compress.size import SizeReport
from recsys_compress.config import Job, dump_job, load_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.files import atomic_folder, write_text
from recsys_compress.train.state import Progress

JOB = "job.toml"
MODEL = "model.safetensors"  # weights that were best on validation
LOWERING = "lowering.json"  # the policy of the trained model, as `Policy.describe` has it
SIZE = "size.json"
RESULT = "result.json"
TABLES = "tables-{}.safetensors"  # the tables in another storage type
# Keys of the job.
KEPT = (
    *("model", "embedding", "data.streams", "train.batch_size", "train.seed", "train.optimizer"),
)


def write_folder(folder: Path, job: Job, size: SizeReport, policy: list[dict[str, Any]]) -> None:
    """Makes a run's folder.

    Raises:
        UserError: it exists or cannot be written.
    """
    with atomic_folder(folder) as temporary:
        (temporary / JOB).write_text(dump_job(job), encoding="utf-8")
        write_size(temporary, size, policy)


def go_on(
    folder: Path, job: Job, progress: Progress, dataset: PreparedDataset, *, first: bool
) -> None:
    """Writes the job by which a run goes on.

    Args:
        folder: of the run.
        job: may differ from the one that it began by, but for what a run keeps to its end.
        progress: how far it is.
        dataset: of the job.
        first: whether this process writes; all check.

    Raises:
        UserError: the data, or what a run keeps, is another.
    """
    began = run_job(folder)
    for key in KEPT:
        was, now = (attrgetter(key)(one) for one in (began, job))
        if is_dataclass(was):
            differing = (
                f.name for f in fields(was) if getattr(was, f.name) != getattr(now, f.name)
            )
            if (name := next(differing, None)) is None:
                continue
            key, was, now = f"{key}.{name}", getattr(was, name), getattr(now, name)
        if was != now:
            raise UserError(
                f"{key} = {now!r}: the run {folder} has {was!r}, and keeps it to its end; leave "
                "it, or start a new run"
            )
    if progress.dataset and progress.dataset != dataset.checksum:
        raise UserError(
            f"data.path = {job.data.path!r}: is other data than the run {folder} began with; name "
            "that, or start a new run"
        )
    if first:
        write_text(folder / JOB, dump_job(job))


def write_size(folder: Path, size: SizeReport, policy: list[dict[str, Any]]) -> None:
    """Writes how tables are stored and what they take."""
    write_text(folder / SIZE, json.dumps(size.to_json(), indent=2))
    write_text(folder / LOWERING, json.dumps(policy, indent=2))


def read_policy(folder: Path) -> Policy:
    """Returns the policy of a run's tables.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / LOWERING
    try:
        assignments = json.loads(path.read_text(encoding="utf-8"))
        return Policy.described(assignments, where=str(path))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train the model anew") from error


def run_file(folder: Path) -> Path:
    """Returns the file of a run's job.

    Raises:
        UserError: the folder is no run's.
    """
    if not (folder / JOB).is_file():
        raise UserError(
            f"{folder}: is no run's folder (it has no {JOB}); name one that recsys-compress train "
            "has made"
        )
    return folder / JOB


def run_job(folder: Path, overrides: Sequence[str] = ()) -> Job:
    """Returns the job of a run.

    Args:
        folder: the run's own folder.
        overrides: `key=value` changes.

    Raises:
        UserError: the folder is no run's, or an override is not valid.
    """
    return load_job(run_file(folder), overrides)


def read_result(folder: Path) -> dict[str, Any]:
    """Returns what a run wrote at its end; nothing where it has not ended.

    Raises:
        UserError: the folder is no run's, or the file is damaged.
    """
    run_file(folder)
    path = folder / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train the model anew") from error
    return found
