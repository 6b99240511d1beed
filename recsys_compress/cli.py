"""The command line: results on standard output, all else on standard error.

Modules that take seconds to import (torch, MLflow, Arrow) are imported by the commands that need
them, so that help is instant.
"""

import dataclasses
import logging
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recsys_compress.errors import UserError
from recsys_compress.files import to_json

if TYPE_CHECKING:
    from recsys_compress.config import Job

INTERRUPTED = 130

app = typer.Typer(
    help="Train CTR models with compressed embedding tables.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on one line.")]


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0; 2 for a user's error, which one line on standard error explains; 130
        where the user interrupted.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status = app(list(arguments) or ["--help"], "recsys-compress", standalone_mode=False)
    except UserError as error:
        message = str(error)
    except typer.TyperException as error:
        message = f"{error.format_message().rstrip('.')}; see recsys-compress --help"
    else:
        return status or 0
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="movielens-1m, frappe, criteo, parquet or synthetic.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the prepared dataset.")],
    path: Annotated[str | None, typer.Option("--from", help="Raw data: file or folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random split.")] = 0,
    encoding: Annotated[
        Literal["vocabulary", "hash"], typer.Option(help="How raw values become ids.")
    ] = "vocabulary",
    min_count: Annotated[
        int, typer.Option(help="Values rarer in the training split become unknown.")
    ] = 1,
    schema: Annotated[
        str | None, typer.Option(help="TOML file that says what the columns are (parquet).")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the source.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn raw data into a prepared dataset.

    Example: recsys-compress prepare movielens-1m --from ml-1m --out data/movielens_1m
    """
    from recsys_compress.data.prepare import prepare as prepare_source
    from recsys_compress.data.sources import SOURCES, make_source

    given = {"path": ("--from", path), "schema_file": ("--schema", schema)}
    options = _options(option or ()) | {key: value for key, (_, value) in given.items() if value}
    fields = dataclasses.fields(SOURCES[source]) if source in SOURCES else ()
    for field in fields:
        if field.name in given.keys() - options.keys() and field.default is dataclasses.MISSING:
            raise UserError(f"prepare {source}: needs {given[field.name][0]} PATH; add it")
    dataset = prepare_source(
        make_source(source, options),
        out,
        encoding=encoding,
        min_count=min_count,
        seed=seed,
        progress=True,
    )
    rows = {split: info.rows for split, info in dataset.manifest.splits.items()}
    categorical = {f.name: f.num_embeddings for f in dataset.schema.categorical}
    dense = list(dataset.schema.dense)
    if as_json:
        found = {"path": str(out), "checksum": dataset.checksum, "rows": rows}
        _print_json({**found, "dense": dense, "categorical": categorical})
    else:
        counts = ", ".join(f"{split} {number:,}" for split, number in rows.items())
        typer.echo(f"{out}: {counts} rows; {len(categorical)} categorical, {len(dense)} dense")
    _hint(f"recsys-compress profile {out}")


@app.command()
def profile(
    dataset: Annotated[Path, typer.Argument(help="Folder of a prepared dataset.")],
    dim: Annotated[int, typer.Option(help="Embedding dim for which bytes are counted.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show cardinality, skew, cold ids and bytes of each field.

    Example: recsys-compress profile data/movielens_1m --dim 32
    """
    from recsys_compress.data.dataset import PreparedDataset
    from recsys_compress.data.profile import profile as profile_dataset
    from recsys_compress.data.profile import render
    from recsys_compress.track.tables import print_table

    found = profile_dataset(PreparedDataset.open(dataset), dim)
    if as_json:
        _print_json(found.to_json())
    else:
        print_table(render(found))


@app.command()
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

    if job is None:
        if resume is None:
            raise UserError("train: no job; name a job file, or a run with --resume RUN_FOLDER")
        job = resume / "job.toml"
    if not dry_run and (world_size or hbm):
        raise UserError("train: --world-size and --hbm are of a dry run; add --dry-run")
    cluster = [f"sharding.device_memory={hbm}", "train.device=cuda"] if hbm else []
    settings = load_job(job, [*(overrides or ()), *cluster])
    if dry_run:
        _dry_run(settings, world_size or nproc, as_json)
        return
    if nproc > 1:
        _launch(nproc, "train", [job], {"--set": overrides, "--resume": resume, "--json": as_json})

    from recsys_compress.track.progress import ProgressListener
    from recsys_compress.track.run import tracked_train
    from recsys_compress.track.tables import print_result

    result = tracked_train(settings, resume=resume, listeners=[ProgressListener()])
    if not _speaks():
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)
    if as_json:
        _print_json(result.to_json())
    else:
        print_result(result)
    if result.interrupted:
        _hint(f"recsys-compress train --resume {result.folder}")
        raise typer.Exit(INTERRUPTED)


def _dry_run(job: "Job", world_size: int, as_json: bool) -> None:
    """Shows what a job would take."""
    from recsys_compress.track.cluster import print_dry_run
    from recsys_compress.train.dryrun import dry_run

    found = dry_run(job, world_size)
    if as_json:
        _print_json(found.to_json())
    else:
        print_dry_run(found)


@app.command()
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
            metavar="TYPE|TABLE=TYPE", help="Store tables as fp16, bf16, int8, int4 or int2."
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
        _store(run_folder, storage or [], as_json)
        return

    from recsys_compress.config import load_job
    from recsys_compress.track.progress import ProgressListener
    from recsys_compress.track.run import tracked_train
    from recsys_compress.track.tables import print_result
    from recsys_compress.train.folder import read_result
    from recsys_compress.train.post import compress as compress_run
    from recsys_compress.train.shard import process_group

    config = load_job(run_folder / "job.toml", overrides or ())
    with process_group(config.train.device, config.sharding.timeout):
        job, start = compress_run(run_folder, method, budget, overrides or ())
        result = tracked_train(job, start=start, listeners=[ProgressListener()])
    if not _speaks():
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)
    before = read_result(run_folder)
    if as_json:
        figures = {key: before.get(key, {}) for key in ("valid", "test", "bytes")}
        _print_json({**result.to_json(), "before": figures})
    else:
        print_result(result, before)
    if result.interrupted:
        _hint(f"recsys-compress train --resume {result.folder}")
        raise typer.Exit(INTERRUPTED)


def _store(run_folder: Path, storage: Sequence[str], as_json: bool) -> None:
    """Stores a run's tables in other types."""
    from recsys_compress.compress.storage import StoragePlan
    from recsys_compress.track.tables import print_stored
    from recsys_compress.train.post import store

    named = dict(text.rpartition("=")[::2] for text in storage)
    if len(named) < len(storage) or ("" in named and len(named) > 1):
        raise UserError("--storage: give one type for all tables, or one TABLE=TYPE for each")
    found = store(run_folder, StoragePlan(types=named.get("", named)))  # type: ignore[arg-type]
    if as_json:
        _print_json(found.to_json())
    else:
        print_stored(found)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the compression methods and their options.

    Example: recsys-compress methods --json
    """
    from recsys_compress.compress.method import method_classes

    found: dict[str, dict[str, Any]] = {
        name: {
            "description": (method.__doc__ or "").partition("\n")[0],
            "options": {
                field.name: {"default": _default(field), "help": field.metadata.get("help", "")}
                for field in dataclasses.fields(method)
            },
        }
        for name, method in method_classes().items()
    }
    if as_json:
        _print_json(found)
        return
    for name, shown in found.items():
        typer.echo(f"{name}: {shown['description']}")
        for key, option in shown["options"].items():
            typer.echo(f"    {key} = {option['default']!r}: {option['help']}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for its data, runs and plot.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Compare full and compressed tables on generated data.

    Example: recsys-compress demo --out /tmp/demo
    """
    from recsys_compress.demo import demo as compare
    from recsys_compress.demo import print_demo

    found = compare(out)
    if as_json:
        _print_json(found.to_json())
    else:
        print_demo(found)
    last = found.runs[-1].folder / "job.toml"
    _hint(f"recsys-compress train {last} --set embedding.budget=0.05x")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Returns `key=value` options; a value is TOML, or else a plain string."""
    options: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"--option {text!r}: write it as key=value, like rows=1000")
        try:
            options[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = value
    return options


def _launch(nproc: int, command: str, given: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Runs a command in several processes, and ends with their status."""
    from recsys_compress.train.launch import launch

    arguments = [command, *(str(value) for value in given)]
    for name, value in options.items():
        if value is True:
            arguments.append(name)
        for one in value if isinstance(value, list) else [value]:
            if one not in (None, True, False):
                arguments += [name, str(one)]
    raise typer.Exit(launch(nproc, arguments))


def _speaks() -> bool:
    """Whether this process prints results: of several that a launcher started, the first."""
    return os.environ.get("RANK", "0") == "0"


def _print_json(value: Any) -> None:
    typer.echo(to_json(value))


def _hint(command: str) -> None:
    typer.echo(f"next: {command}", err=True)
