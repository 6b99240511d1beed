"""The commands that train a model, or make a trained one smaller."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys_compress.commands.common import (
    INTERRUPTED,
    OF_PLANS,
    AsJson,
    hint,
    key_of,
    launch_again,
    print_json,
    speaks,
    storage_plan,
)
from recsys_compress.errors import UserError

if TYPE_CHECKING:
    from recsys_compress.config import Job


def train(
    job: Annotated[
        Path | None, typer.Argument(help="Job file; not needed with --resume.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted run to go on with.")
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that train together.")
    ] = 1,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan file that says how tables are stored.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Finished run whose vectors the plan's tables begin with."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: show plan, memory and traffic.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Processes of the dry run; they need not be here.")
    ] = None,
    hbm: Annotated[
        str | None, typer.Option(help="Memory of each GPU in the dry run, which is then of GPUs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model and record it in MLflow.

    Several processes, also of several machines, are started by --nproc or by torchrun:
    torchrun --nproc-per-node 2 -m recsys_compress train JOB.
    Ctrl-C ends the run after the current step with a checkpoint and status 130.
    What a job takes on a cluster that is not here: --dry-run --world-size 256 --hbm 80GiB.

    Example: recsys-compress train pipelines/frappe.toml --set embedding.budget=0.1x
    """
    from recsys_compress.config import load_job
    from recsys_compress.train.folder import run_file

    if job is None:
        if resume is None:
            raise UserError("train: no job; name a job file, or a run with --resume RUN_FOLDER")
        job = run_file(resume)
    if not dry_run and (world_size or hbm):
        raise UserError("train: --world-size and --hbm are of a dry run; add --dry-run")
    cluster = [f"sharding.device_memory={hbm}", "train.device=cuda"] if hbm else []
    settings = load_job(job, [*(overrides or ()), *cluster])
    if plan_file is not None:
        settings = _planned(settings, plan_file, overrides or ())
    if dry_run:
        _dry_run(settings, world_size or nproc, as_json)
        return
    if start is not None and (resume is not None or settings.embedding.plan is None):
        raise UserError("train: --start goes with --plan, and not with --resume")
    if settings.embedding.plan is not None and resume is None and start is None:
        from recsys_compress.compress.planned import PlanFile

        PlanFile.read(Path(settings.embedding.plan)).check_from_scratch(settings.embedding.plan)
    if nproc > 1:
        launch_again(
            nproc,
            "train",
            [job],
            {
                "--set": overrides,
                "--resume": resume,
                "--plan": plan_file,
                "--start": start,
                "--json": as_json,
            },
        )

    from recsys_compress.track.progress import ProgressListener
    from recsys_compress.track.run import tracked_train
    from recsys_compress.track.tables import print_result
    from recsys_compress.train.shard import process_group

    with process_group(settings.train.device, settings.sharding.timeout):
        begin = None
        if start is not None:
            from recsys_compress.plan.start import start_from

            begin = start_from(settings, start)
        result = tracked_train(settings, resume=resume, start=begin, listeners=[ProgressListener()])
    if not speaks():
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)
    if as_json:
        print_json(result.to_json())
    else:
        print_result(result)
    if result.interrupted:
        hint(f"recsys-compress train --resume {result.folder}")
        raise typer.Exit(INTERRUPTED)


def _planned(settings: "Job", plan: Path, overrides: Sequence[str]) -> "Job":
    """Returns a job with its tables as a plan says, whatever budget and rules its file has."""
    for given in overrides:
        if key_of(given) in OF_PLANS:
            raise UserError(f"train: --plan says what --set {key_of(given)} would; drop one")
    embedding = dataclasses.replace(settings.embedding, plan=str(plan), budget=None, rules=())
    return dataclasses.replace(settings, embedding=embedding)


def _dry_run(job: "Job", world_size: int, as_json: bool) -> None:
    """Shows what a job would take."""
    from recsys_compress.track.cluster import print_dry_run
    from recsys_compress.train.dryrun import dry_run

    found = dry_run(job, world_size)
    if as_json:
        print_json(found.to_json())
    else:
        print_dry_run(found)


def compress(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    method: Annotated[str | None, typer.Option(help="Method that takes the tables over.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes, like 400kB or 0.25x; of the whole model if layers shrink too."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job (fine-tuning)."),
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE|TABLE=TYPE",
            help="Store tables as fp16, bf16, int8, int4 or int2, or as 'planned'.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a trained model smaller: another method, then a fine-tuning; or another storage type.

    Example: recsys-compress compress runs/dcnv2-full-1x-s0-1a2b3c4d --method low_rank --budget
    0.25x --set train.epochs=1
    """
    if (method is None) == (not storage):
        raise UserError("compress: give either --method or --storage")
    if method is None:
        if budget is not None or overrides:
            raise UserError(
                "compress: --budget and --set go with --method; --storage trains nothing"
            )
        _store(run_folder, storage or [], as_json)
        return

    from recsys_compress.track.progress import ProgressListener
    from recsys_compress.track.run import tracked_train
    from recsys_compress.track.tables import print_result
    from recsys_compress.train.folder import read_result, run_job
    from recsys_compress.train.post import compress as compress_run
    from recsys_compress.train.shard import process_group

    config = run_job(run_folder, overrides or ())
    with process_group(config.train.device, config.sharding.timeout):
        job, start = compress_run(run_folder, method, budget, overrides or ())
        result = tracked_train(job, start=start, listeners=[ProgressListener()])
    if not speaks():
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)
    before = read_result(run_folder)
    if as_json:
        figures = {key: before.get(key, {}) for key in ("valid", "test", "bytes")}
        print_json({**result.to_json(), "before": figures})
    else:
        print_result(result, before)
    if result.interrupted:
        hint(f"recsys-compress train --resume {result.folder}")
        raise typer.Exit(INTERRUPTED)


def _store(run_folder: Path, storage: Sequence[str], as_json: bool) -> None:
    """Stores a run's tables in other types."""
    from recsys_compress.track.tables import print_stored
    from recsys_compress.train.post import store

    found = store(run_folder, storage_plan(storage))
    if as_json:
        print_json(found.to_json())
    else:
        print_stored(found)
