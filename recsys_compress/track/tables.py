"""Results as short tables on standard output."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.train.events import Metrics, RunResult

if TYPE_CHECKING:
    from recsys_compress.train.post import Stored


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table, its first column to the left, all others to the right."""
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table) -> None:
    """Prints a table; where there is no terminal there is no width to fit into."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def print_result(result: RunResult, before: Mapping[str, Any] | None = None) -> None:
    """Prints the figures of one run.

    Args:
        result: its result.
        before: that of the run it began with, as plain data.
    """
    splits = {"valid": result.valid, "test": result.test}
    if before:
        splits["test before"] = before.get("test", {})
    _print_figures(splits)
    sizes = result.bytes
    lines = [
        f"embeddings  {format_bytes(sizes['tables'])}, full tables {format_bytes(sizes['full'])}: "
        f"{sizes['ratio']:.1f}x",
        f"training    {result.samples_per_s:,.0f} samples/s, {result.seconds:.0f} s, "
        f"peak memory {format_bytes(result.peak_rss_bytes)}",
        f"run         {result.run_id} in {result.folder}",
    ]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if before:
        sizes = before["bytes"]
        lines += [
            f"before      embeddings {format_bytes(sizes['tables'])}, "
            f"whole model {format_bytes(sizes['model'])}",
            f"now         embeddings {format_bytes(result.bytes['tables'])}, "
            f"whole model {format_bytes(result.bytes['model'])}",
        ]
    for line in lines:
        console.print(line)


def print_stored(stored: "Stored") -> None:
    """Prints the figures of a run's model in another storage type."""
    _print_figures({"as trained": stored.before, "as stored": stored.test})
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for table, data_type in stored.types.items():
        console.print(f"{data_type:5} {table}")
    console.print(f"embeddings  {format_bytes(stored.bytes['tables'])}")


def _print_figures(splits: Mapping[str, Metrics]) -> None:
    """Prints a row of figures for each split that has been read."""
    names = ("auc", "logloss", "ne", "calibration", "ece")
    rows = [
        # One that is not defined is null in a result.
        [split, *(f"{_number(figures.get(name)):.4f}" for name in names)]
        for split, figures in splits.items()
        if figures  # an interrupted run has not read the test split
    ]
    print_table(make_table(["", *names], rows))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
