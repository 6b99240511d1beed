"""Runs a study: trials first, then trainings, then what compresses trained models."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

from recsys_compress.compare.cells import Cell, cells, first_cell, seeds_of, trials
from recsys_compress.compare.progress import StudyProgress
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.runner import Memory, Runner, StoppedError
from recsys_compress.compare.spec import AUC
from recsys_compress.errors import UserError
from recsys_compress.train.memory import memory_bytes

Task = tuple[Cell, int]  # a cell and a seed


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is run.

    Attributes:
        results: file of the figures.
        work: folder of prepared data, run folders and logs.
        data: folder of raw data, where the study prepares its own.
        only: patterns of the cells' names.
        processes: runs at a time.
        memory: bytes that they may take together; None for 80 % of the machine's.
        threads: of each training.
        redo: whether cells with figures are run again.
        parent: MLflow run in which the runs are nested.
    """

    results: Path
    work: Path
    data: Path | None = None
    only: Sequence[str] = ("*",)
    processes: int = 1
    memory: int | None = None
    threads: int = 1
    redo: bool = False
    parent: str | None = None


def missing(records: Records, only: Sequence[str] = ("*",), *, redo: bool = False) -> list[Task]:
    """Returns the cells without figures, and the trials that they hang on, in order.

    Args:
        records: the figures.
        only: patterns of the cells' names.
        redo: whether those with figures are among them.
    """
    study = records.study
    wanted = [c for c in cells(study) if any(fnmatch(c.name, pattern) for pattern in only)]
    entries = {(cell.entry.name, cell.model): cell.entry for cell in wanted}
    tried = [t for (_, model), entry in entries.items() for t in trials(study, entry, model)]
    tasks = [(cell, seed) for cell in [*tried, *wanted] for seed in seeds_of(study, cell)]
    left = [(cell, seed) for cell, seed in tasks if redo or _record(records, cell, seed) is None]
    return sorted(left, key=lambda task: _stage(task[0]))


def compare(records: Records, options: Options) -> dict[str, str]:
    """Runs the cells that have no figures yet; figures are written as they come.

    Args:
        records: the figures there are; new ones are added.
        options: how the study is run.

    Returns:
        Why runs failed, by cell and seed.

    Raises:
        UserError: data cannot be prepared, or the figures cannot be written.
        KeyboardInterrupt: the user stopped it; runs that had begun go on where they stopped when
            the study is run again.
    """
    comparison = _Comparison(records, options)
    with _terminated_as_interrupted():
        comparison.run(missing(records, options.only, redo=options.redo))
        comparison.measure_served()
    return comparison.failed


class _Comparison:
    """Runs tasks side by side and keeps their figures.

    Attributes:
        failed: see `compare`.
    """

    def __init__(self, records: Records, options: Options) -> None:
        self.failed: dict[str, str] = {}
        self._records = records
        self._options = options
        self._writing = threading.Lock()
        self._runner = Runner(
            study=records.study,
            work=options.work,
            data=options.data,
            memory=Memory(options.memory or int(0.8 * memory_bytes())),
            threads=options.threads,
            parent=options.parent,
        )

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs tasks in the order in which they hang on each other."""
        for seed in sorted({seed for _, seed in tasks}):
            self._runner.prepare(seed)
        with StudyProgress("runs", len(tasks), self._options.processes) as progress:
            for stage in range(4):
                own = [task for task in tasks if _stage(task[0]) == stage]
                if stage == 1:
                    own += self._models_gone(tasks, own)
                runs: dict[tuple[str, int], Task] = {}
                for cell, seed in own:
                    run = self._records.run(cell)
                    if run is None:
                        self.failed[_name(cell, seed)] = "none of its trials has figures"
                    else:  # cells with the same settings share one run
                        runs.setdefault((run.key, seed), (cell, seed))
                self._side_by_side(runs.values(), self._measure, progress)

    def measure_served(self) -> None:
        """Measures storage types and inference of the trained models that are still here."""
        tasks = [
            (cell, seed)
            for cell in cells(self._records.study)
            if any(fnmatch(cell.name, pattern) for pattern in self._options.only)
            for seed in seeds_of(self._records.study, cell)
            if self._unserved(cell, seed)
        ]
        with StudyProgress("measured as served", len(tasks), self._options.processes) as progress:
            self._side_by_side(tasks, self._serve, progress)

    def _side_by_side(
        self, tasks: Collection[Task], work: Callable[[Cell, int], str], progress: StudyProgress
    ) -> None:
        def one(cell: Cell, seed: int) -> None:
            name, started = _name(cell, seed), time.monotonic()
            with suppress(StoppedError):
                try:
                    said = work(cell, seed)
                except UserError as error:
                    self.failed[name] = said = str(error)
                progress.done(name, said, time.monotonic() - started)

        with ThreadPoolExecutor(self._options.processes) as executor:
            futures = [executor.submit(one, *task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self._runner.stop()
                raise

    def _measure(self, cell: Cell, seed: int) -> str:
        run = self._records.run(cell)
        assert run is not None  # noqa: S101  # its trials have figures
        record = self._runner.measure(run, seed)
        self._keep(record)
        return record.error or f"test AUC {record.figures[AUC]:.4f}"

    def _serve(self, cell: Cell, seed: int) -> str:
        record, folder, base = self._served(cell, seed)
        if record is None or folder is None:
            return "no model here"
        for kind in self._records.study.storage:
            if f"{kind}.auc" not in record.figures:
                record = record.with_figures(kind, self._runner.store(folder, kind))
        if base is not None and "inference.ratio" not in record.figures:
            record = record.with_figures("inference", self._runner.inference(folder, base))
        self._keep(record)
        return "stored and timed"

    def _unserved(self, cell: Cell, seed: int) -> bool:
        record, folder, base = self._served(cell, seed)
        wanted = [f"{kind}.auc" for kind in self._records.study.storage]
        wanted += ["inference.ratio"] if base is not None else []
        return bool(record and folder and not record.figures.keys() >= set(wanted))

    def _served(self, cell: Cell, seed: int) -> tuple[Record | None, Path | None, Path | None]:
        """Returns a cell's record, its run's folder and that of the first entry's run."""
        run, first = (
            self._records.run(cell),
            replace(cells(self._records.study)[0], model=cell.model),
        )
        base = self._records.run(first)
        if run is None or base is None:
            return None, None, None
        return (
            self._records.of(run, seed),
            self._runner.folder(run, seed),
            self._runner.folder(base, seed),
        )

    def _models_gone(self, tasks: Sequence[Task], own: Sequence[Task]) -> list[Task]:
        """Returns trainings that have figures, but whose models are to be compressed and gone."""
        found: list[Task] = []
        for cell, seed in tasks:
            if cell.entry.after is not None:
                model = first_cell(self._records.study, cell.entry.after, cell.model)
                run = self._records.run(model)
                gone = run is not None and self._runner.folder(run, seed) is None
                if gone and (model, seed) not in [*own, *found]:
                    found.append((model, seed))
        return found

    def _keep(self, record: Record) -> None:
        with self._writing:
            self._records.add(record)
            self._records.write(self._options.results)


def _stage(cell: Cell) -> int:
    """Returns when a cell's turn comes: trials before what they decide, compressions last."""
    return 2 * (cell.entry.after is not None) + (cell.tried is None)


def _record(records: Records, cell: Cell, seed: int) -> Record | None:
    run = records.run(cell)
    return None if run is None else records.of(run, seed)


def _name(cell: Cell, seed: int) -> str:
    return f"{cell.name}, seed {seed}"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
