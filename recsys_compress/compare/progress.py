"""How far a study is: a live bar on a terminal, and a line for each run that has ended."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class StudyProgress:
    """Shows the progress of runs side by side, on standard error.

    Args:
        title: what is done.
        total: number of runs.
        processes: that run at a time.
    """

    def __init__(self, title: str, total: int, processes: int) -> None:
        self._total = total
        self._processes = processes
        self._done = 0
        self._seconds = 0.0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._bar = Progress(
            TextColumn(title),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not (total and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "StudyProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def expect(self, more: int) -> None:
        """Adds runs to those that are to come."""
        self._total += more
        self._bar.update(self._task, total=self._total)

    def done(self, name: str, said: str, seconds: float) -> None:
        """Counts a run and says what came of it.

        Args:
            name: of the run.
            said: what came of it.
            seconds: that it took.
        """
        self._done += 1
        self._seconds += seconds
        each = self._seconds / self._done / self._processes
        left = f"about {_time(each * max(self._total - self._done, 0))} left"
        line = f"[{self._done}/{self._total}] {name}: {said} ({_time(seconds)}; {left})"
        self._console.print(line)
        self._bar.update(self._task, completed=self._done, description=left)
        sys.stderr.flush()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
