"""The command line: results on standard output, all else on standard error.

Modules that take seconds to import (torch, MLflow, Arrow) are imported by the commands that need
them, so that help is instant.
"""

import dataclasses
import logging
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys_compress.commands import compare as compare_command
from recsys_compress.commands import deploy
from recsys_compress.commands import plan as plan_command
from recsys_compress.commands import train as train_commands
from recsys_compress.commands.common import AsJson, hint, print_json
from recsys_compress.errors import UserError

app = typer.Typer(
    help="Train CTR models with compressed embedding tables.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
        print_json({**found, "dense": dense, "categorical": categorical})
    else:
        counts = ", ".join(f"{split} {number:,}" for split, number in rows.items())
        typer.echo(f"{out}: {counts} rows; {len(categorical)} categorical, {len(dense)} dense")
    hint(f"recsys-compress profile {out}")


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
        print_json(found.to_json())
    else:
        print_table(render(found))


# In the order in which help shows them.
app.command()(plan_command.plan)
app.command()(train_commands.train)
app.command()(train_commands.compress)
app.command()(compare_command.compare)
app.add_typer(deploy.app)


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
        print_json(found)
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
        print_json(found.to_json())
    else:
        print_demo(found)
    last = found.runs[-1].folder / "job.toml"
    hint(f"recsys-compress train {last} --set embedding.budget=0.05x")


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
