"""A run's progress on standard error: a bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.track.tables import make_table
from recsys_compress.train.events import Metrics, RunResult, RunStart
from recsys_compress.train.memory import peak_rss_bytes

_LINE_SECONDS = 10.0


class ProgressListener:
    """Shows step, loss, validation AUC, samples per second, peak memory and time left."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to `console`, standard error by default."""
        self._console = console or Console(stderr=True, markup=False)
        self._bar: Progress | None = None
        self._values: Metrics = {}
        self._total = 0
        self._printed = -math.inf

    def started(self, run: RunStart) -> None:
        """Shows the run's name and size, and the bar."""
        self._total = run.total_steps
        self._print(
            f"{run.name}: embeddings {format_bytes(run.bytes['tables'])}, full tables "
            f"{format_bytes(run.bytes['full'])}; in {run.folder}"
        )
        if run.shards:
            self._console.print(_shards(run.shards))
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total, completed=run.first_step)
            self._bar.start()

    def metrics(self, step: int, values: Metrics) -> None:
        """Moves the bar; elsewhere prints a line for each evaluation and every ten seconds."""
        self._values |= values
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._summary())
        elif "eval/auc" in values or time.monotonic() - self._printed > _LINE_SECONDS:
            self._printed = time.monotonic()
            self._print(f"step {step}/{self._total}  {self._summary()}")

    def finished(self, result: RunResult) -> None:
        """Takes the bar away."""
        self._stop()
        end = "interrupted" if result.interrupted else "finished"
        self._print(f"{end} after {result.steps} steps, {result.seconds:.0f} s")

    def failed(self, error: BaseException) -> None:  # noqa: ARG002
        """Takes the bar away."""
        self._stop()

    def _summary(self) -> str:
        shown = {
            "train/loss": ("loss", "{:.4f}"),
            "eval/auc": ("valid AUC", "{:.4f}"),
            "perf/samples_per_s": ("samples/s", "{:,.0f}"),
        }
        parts = [
            f"{label} {form.format(self._values[key])}"
            for key, (label, form) in shown.items()
            if key in self._values
        ]
        return "  ".join([*parts, f"peak memory {format_bytes(peak_rss_bytes())}"])

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _shards(shards: Sequence[Mapping[str, Any]]) -> Table:
    """Returns who holds which part of which table."""
    rows = [
        [
            shard["table"],
            shard["kind"],
            "all" if shard["rank"] < 0 else str(shard["rank"]),
            f"{shard['rows']:,}",
            str(shard["columns"]),
            format_bytes(shard["parameter_bytes"]),
            format_bytes(shard["optimizer_bytes"]),
        ]
        for shard in shards
    ]
    return make_table(["table", "kind", "rank", "rows", "columns", "weights", "state"], rows)
