"""What commands share: the option for JSON, and how they print."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys_compress.errors import UserError
from recsys_compress.files import to_json

if TYPE_CHECKING:
    from recsys_compress.compress.storage import StoragePlan

INTERRUPTED = 130  # status of what the user has interrupted
# Keys of a job that a plan takes the place of.
OF_PLANS = tuple(f"embedding.{name}" for name in ("method", "budget", "rules", "min_rows"))

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on one line.")]


def print_json(value: Any) -> None:
    """Prints plain data on one line of standard output."""
    typer.echo(to_json(value))


def key_of(override: str) -> str:
    """Returns the key of a `key=value`."""
    return override.partition("=")[0].strip()


def hint(command: str) -> None:
    """Names the next command, on standard error."""
    typer.echo(f"next: {command}", err=True)


def speaks() -> bool:
    """Whether this process prints results: of several that a launcher started, the first."""
    return os.environ.get("RANK", "0") == "0"


def launch_again(
    processes: int, command: str, given: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """Runs a command in several processes, and ends with their status.

    Args:
        processes: how many.
        command: its name.
        given: its arguments.
        options: by name, what was given: a value, a list of values, or whether a flag is set.
    """
    from recsys_compress.train.launch import launch

    arguments = [command, *(str(value) for value in given)]
    for name, value in options.items():
        if value is True:
            arguments.append(name)
        for one in value if isinstance(value, list) else [value]:
            if one not in (None, True, False):
                arguments += [name, str(one)]
    raise typer.Exit(launch(processes, arguments))


def storage_plan(storage: Sequence[str]) -> "StoragePlan | None":
    """Returns the plan of `--storage` options: one TYPE, or a TABLE=TYPE for each table.

    None stands for "planned", the types that the run's job or plan names.

    Raises:
        UserError: they are mixed, or a type is unknown.
    """
    from recsys_compress.compress.storage import StoragePlan

    if list(storage) == ["planned"]:
        return None
    named = dict(text.rpartition("=")[::2] for text in storage)
    if len(named) < len(storage) or ("" in named and len(named) > 1):
        raise UserError("--storage: give one type for all tables, or one TABLE=TYPE for each")
    return StoragePlan(types=named.get("", named))  # type: ignore[arg-type]
