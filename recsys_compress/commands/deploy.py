"""Commands from a finished run to scores: export, register, promote, rollback, score, serve."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from recsys_compress.commands.common import AsJson, hint, print_json, storage_plan

if TYPE_CHECKING:
    from recsys_compress.track.promotion import Decision

REFUSED = 3

app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Name = Annotated[str, typer.Argument(help="The registered model.")]
Storage = Annotated[
    list[str] | None,
    typer.Option(metavar="TYPE|TABLE=TYPE", help="fp32, fp16, bf16, int8, int4 or int2."),
]
Layers = Annotated[
    Literal["fp32", "int8"],
    typer.Option(help="Type of linear layers: int8 is smaller, and faster on CPU."),
]
Data = Annotated[
    Path | None, typer.Option(help="The prepared dataset, if it is no longer where the job says.")
]
Uri = Annotated[
    str | None, typer.Option(help="MLflow; by default MLFLOW_TRACKING_URI or sqlite:///mlflow.db.")
]
Model = Annotated[
    str, typer.Option(help="Folder of an artifact, models:/NAME@ALIAS or models:/NAME/VERSION.")
]


@app.command()
def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Option(help="New folder for the artifact.")],
    storage: Storage = None,
    layers: Layers = "fp32",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model as the one folder that scores raw rows.

    Example: recsys-compress export runs/dcnv2-full-1x-s0-1a2b3c4d --out model --storage int8
    """
    from recsys_compress.serve.export import export as export_run

    found = export_run(run_folder, out, storage_plan(storage or ["planned"]), data, layers)
    sizes = {**found.bytes, "artifact": found.total_bytes}
    if as_json:
        print_json({"path": str(out), "bytes": sizes, "trained": found.trained, "test": found.test})
    else:
        shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        typer.echo(f"{out}: bytes of {shown}; test AUC {found.test['auc']:.6f}")
    hint(f"recsys-compress score --model {out} --input rows.parquet --output scores.parquet")


@app.command()
def register(
    run_folder: RunFolder,
    storage: Storage = None,
    layers: Layers = "fp32",
    name: Annotated[
        str | None, typer.Option(help="Registered model; by default the run's experiment.")
    ] = None,
    data: Data = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow; by default where the run was recorded.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run's model a version of a registered model, alias challenger.

    Example: recsys-compress register runs/dcnv2-full-1x-s0-1a2b3c4d --storage int8
    """
    from recsys_compress.track.registry import register as register_run

    plan = storage_plan(storage or ["planned"])
    found = register_run(run_folder, plan, name=name, uri=uri, data=data, layers=layers)
    if as_json:
        print_json(found.to_json())
    else:
        known = "" if found.created else " (registered before)"
        typer.echo(f"{found.name}: version {found.version} is the challenger{known}")
        for key, value in sorted(found.tags.items()):
            typer.echo(f"    {key} = {value}")
    hint(f"recsys-compress promote {found.name}")


@app.command()
def promote(
    name: Name,
    policy: Annotated[Path | None, typer.Option(help="TOML file with the gate's limits.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Held-out rows: prepared dataset (its test split), or raw Parquet with the label. "
            "By default the challenger's dataset."
        ),
    ] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Make the challenger the champion, if it keeps all limits; else status 3.

    Example: recsys-compress promote movielens-1m --policy gate.toml
    """
    from recsys_compress.serve.gate import load_policy
    from recsys_compress.track.promotion import promote as decide
    from recsys_compress.track.uri import tracking_uri

    _show(decide(name, uri or tracking_uri(), load_policy(policy), data), as_json)


@app.command()
def rollback(name: Name, uri: Uri = None, as_json: AsJson = False) -> None:
    """Make the previous champion the champion again.

    Example: recsys-compress rollback movielens-1m
    """
    from recsys_compress.track.promotion import rollback as go_back
    from recsys_compress.track.uri import tracking_uri

    _show(go_back(name, uri or tracking_uri()), as_json)


@app.command()
def score(
    model: Model,
    rows: Annotated[str, typer.Option("--input", help="Parquet file, folder or glob of raw rows.")],
    output: Annotated[Path, typer.Option(help="Parquet file for the scores.")],
    keep: Annotated[
        list[str] | None, typer.Option(help="Column to keep beside the scores; may be repeated.")
    ] = None,
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Score raw rows, in constant memory; what was interrupted goes on.

    Example: recsys-compress score --model models:/movielens-1m@champion --input rows.parquet
    --output scores.parquet
    """
    from recsys_compress.serve.score import score as score_rows

    with _located(model, uri) as folder:
        found = score_rows(folder, rows, output, keep=keep or (), progress=True)
    if as_json:
        print_json(found.to_json())
    else:
        before = f", {found.resumed_rows:,} of them before" if found.resumed_rows else ""
        typer.echo(f"{found.output}: {found.rows:,} rows scored{before}")


@app.command()
def vectors(
    model: Model,
    field: Annotated[str, typer.Option(help="Field whose ids' vectors are written.")],
    output: Annotated[Path, typer.Option(help="Parquet file for the vectors.")],
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Write the vector of each known value of a field, for retrieval.

    Example: recsys-compress vectors --model models:/movielens-1m@champion --field movie_id
    --output movies.parquet
    """
    from recsys_compress.serve.predictor import Predictor
    from recsys_compress.serve.vectors import write_vectors

    with _located(model, uri) as folder:
        rows = write_vectors(Predictor.load(folder), field, output)
    if as_json:
        print_json({"output": str(output), "rows": rows})
    else:
        typer.echo(f"{output}: vectors of {rows:,} values of {field}")


@app.command()
def serve(
    name: Name,
    alias: Annotated[str, typer.Option(help="Which version.")] = "champion",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 5000,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    uri: Uri = None,
) -> None:
    """Serve a registered model over HTTP with MLflow's scoring server.

    Example: recsys-compress serve movielens-1m --port 5001
    """
    from recsys_compress.track.serving import serve as serve_model
    from recsys_compress.track.uri import tracking_uri

    model = f"models:/{name}@{alias}"
    raise typer.Exit(serve_model(model, uri or tracking_uri(), host, port, workers))


@contextlib.contextmanager
def _located(model: str, uri: str | None) -> Iterator[Path]:
    """Yields the folder of a model; MLflow, seconds to import, only where it is asked."""
    if not model.startswith("models:/"):
        yield Path(model)
        return
    from recsys_compress.track.registry import located
    from recsys_compress.track.uri import tracking_uri

    with located(model, uri or tracking_uri()) as folder:
        yield folder


def _show(decision: "Decision", as_json: bool) -> None:
    """Prints a decision; a refusal ends with a status of its own."""
    if as_json:
        print_json(decision.to_json())
    else:
        if decision.report is not None:
            for figure, value in decision.report.figures.items():
                typer.echo(f"    {figure} = {value:.6g}")
        typer.echo(f"{decision.name}: {decision.reason}")
    if not decision.passed:
        typer.echo(f"refused: {decision.reason}", err=True)
        raise typer.Exit(REFUSED)
