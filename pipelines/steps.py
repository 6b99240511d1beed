"""The steps of the recipes. Each is left out where its result is there already."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from recsys_compress.commands.common import INTERRUPTED
from recsys_compress.config import Job, dump_job, load_job
from recsys_compress.data.dataset import MANIFEST, PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources import make_source
from recsys_compress.errors import UserError
from recsys_compress.plan.planner import make_plan
from recsys_compress.plan.report import write_page
from recsys_compress.plan.request import Request
from recsys_compress.plan.start import start_from
from recsys_compress.track.run import tracked_train
from recsys_compress.train.events import RunResult
from recsys_compress.train.folder import JOB, read_result


def parser(description: str) -> argparse.ArgumentParser:
    """Returns the options that all recipes have."""
    found = argparse.ArgumentParser(description=description.partition("\n")[0])
    found.add_argument(
        "--source", required=True, help="movielens-1m, frappe, criteo, parquet, synthetic"
    )
    found.add_argument("--from", dest="path", help="raw data")
    found.add_argument("--schema", dest="schema_file", help="what the columns are (parquet)")
    found.add_argument("--data", required=True, type=Path, help="folder of the prepared dataset")
    found.add_argument("--job", required=True, type=Path, help="job file")
    found.add_argument("--set", action="append", default=[], help="change a key of the job")
    return found


def prepared(options: argparse.Namespace) -> PreparedDataset:
    """Returns the prepared dataset in `options.data`, made if it is not there."""
    if (options.data / MANIFEST).is_file():
        return PreparedDataset.open(options.data)
    given = {"path": options.path, "schema_file": options.schema_file}
    source = make_source(options.source, {k: v for k, v in given.items() if v is not None})
    return prepare(source, options.data)


def load(options: argparse.Namespace, *settings: str) -> Job:
    """Returns the job on the prepared dataset, with runs in a folder of their own for each data."""
    job = load_job(
        options.job, [f"data.path={json.dumps(str(options.data))}", *options.set, *settings]
    )
    checksum = PreparedDataset.open(options.data).checksum
    own = str(Path(job.train.output) / f"data-{checksum[:12]}")
    return dataclasses.replace(job, train=dataclasses.replace(job.train, output=own))


def trained(job: Job, reference: Path | None = None) -> Path:
    """Returns the folder of the finished run of a job: an old one, one gone on with, or a new one.

    Args:
        job: made by `load`.
        reference: a finished run whose vectors the job's tables begin with.
    """
    for folder in sorted(Path(job.train.output).glob("*/")):
        if (folder / JOB).is_file() and (folder / JOB).read_text() == dump_job(job):
            if read_result(folder).get("test"):
                return folder
            if any((folder / "checkpoints").glob("step-*")):
                return _finished(tracked_train(job, resume=folder))
    start = None if reference is None else start_from(job, reference)
    return _finished(tracked_train(job, start=start))


def planned(options: argparse.Namespace, budget: str) -> tuple[Path, Path]:
    """Returns the plan of the best tables within a budget of bytes at serving, and its reference.

    The reference is the job's run with full tables, which is trained if it is not there.
    """
    full = without_budget(load(options, "embedding.method=full"))
    reference = trained(full)
    path = reference.parent / f"plan-{reference.name}-{budget}.toml"
    if not path.exists():
        plan = make_plan(
            full, Request(purpose="serving", budget=budget, grade="reference", reference=reference)
        )
        write_page(plan, path.with_suffix(".html"))
        plan.file.write(path)
    return path, reference


def without_budget(job: Job) -> Job:
    """Returns a job whose tables take what they take."""
    return dataclasses.replace(job, embedding=dataclasses.replace(job.embedding, budget=None))


def run(main: Callable[[], int]) -> None:
    """Runs a recipe and exits: with 2 and one line where the user has something to mend.

    Where the user has interrupted it, what is done is kept for the same command, and it is 130.
    """
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _finished(result: RunResult) -> Path:
    """Returns the folder of a run.

    Raises:
        KeyboardInterrupt: it was interrupted, so that the steps behind it do not go on with it.
    """
    if result.interrupted:
        raise KeyboardInterrupt
    return result.folder
