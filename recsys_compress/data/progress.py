"""Rows so far and rows per second, on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10.0


class RowProgress:
    """Shows the progress of a pass: a live bar on a terminal, a line now and then elsewhere.

    Args:
        title: what is done.
        shown: whether anything is shown.
        total: number of rows, where it is known.
    """

    def __init__(self, title: str, *, shown: bool, total: int | None = None) -> None:
        self._title = title
        self._shown = shown
        self._rows = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True, markup=False)
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} rows, {task.fields[rate]:,.0f} rows/s"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, rate=0.0)

    def __enter__(self) -> "RowProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def advance(self, rows: int) -> None:
        """Adds rows that are done."""
        self._rows += rows
        if self._bar is not None:
            self._bar.update(self._task, completed=self._rows, rate=self._rate())
        elif self._shown and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line()

    def _rate(self) -> float:
        return self._rows / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> None:
        text = f"{self._title}: {self._rows:,} rows, {self._rate():,.0f} rows/s"
        sys.stderr.write(text + "\n")
