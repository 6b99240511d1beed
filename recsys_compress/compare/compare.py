"""Runs a study: trials first, then trainings, then what compresses trained models."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import FrameType

from recsys_compress.compare.cells import Cell, Run, cells, first_cell, seeds_of, trials
from recsys_compress.compare.progress import StudyProgress
from recsys_compress.compare.records import Record, Records, words
from recsys_compress.compare.runner import Memory, Runner, StoppedError
from recsys_compress.compare.spec import AUC, Study
from recsys_compress.errors import UserError
from recsys_compress.train.memory import memory_bytes

Task = tuple[Cell, int]  # a cell and a seed
Job = tuple[str, Callable[[], str]]  # a name, and what is done and says what came of it


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
        redo: whether those of them that have figures are run again.
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
        redo: whether those with figures, and a name that matches, are among them.
    """
    study = records.study
    wanted = _wanted(study, only)
    begun = [first_cell(study, c.entry.after, c.model) for c in wanted if c.entry.after]
    entries = {(cell.entry.name, cell.model): cell.entry for cell in [*begun, *wanted]}
    tried = [t for (_, model), entry in entries.items() for t in trials(study, entry, model)]
    tasks = [(cell, seed) for cell in [*tried, *wanted] for seed in seeds_of(study, cell)]
    left = [
        (cell, seed)
        for cell, seed in tasks
        if (redo and _named(cell, only)) or _record(records, cell, seed) is None
    ]
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
        self._anew: set[tuple[str, int]] = set()  # keys and seeds: cells may share a run
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
                    gone = self._models_gone(tasks, own)
                    progress.expect(len(gone))
                    own += gone
                jobs: dict[tuple[str, int], Job] = {}
                for cell, seed in own:
                    run, name = self._records.run(cell), _name(cell, seed)
                    if run is None:
                        self.failed[name] = "none of its trials has figures"
                    elif (run.key, seed) not in jobs:  # cells with the same settings share one run
                        anew = self._is_redone(cell, run, seed)
                        jobs[run.key, seed] = name, partial(self._measure, run, seed, anew=anew)
                self._side_by_side(jobs.values(), progress)

    def measure_served(self) -> None:
        """Measures storage types and inference of the trained models that are still here."""
        study = self._records.study
        tasks = [
            (c, seed) for c in _wanted(study, self._options.only) for seed in seeds_of(study, c)
        ]
        jobs = [job for cell, seed in tasks if (job := self._served(cell, seed)) is not None]
        with StudyProgress("measured as served", len(jobs), self._options.processes) as progress:
            self._side_by_side(jobs, progress)

    def _side_by_side(self, jobs: Collection[Job], progress: StudyProgress) -> None:
        def one(name: str, work: Callable[[], str]) -> None:
            started = time.monotonic()
            with suppress(StoppedError):
                try:
                    said = work()
                except UserError as error:
                    self.failed[name] = said = str(error)
                progress.done(name, said, time.monotonic() - started)

        with ThreadPoolExecutor(self._options.processes) as executor:
            futures = [executor.submit(one, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self._runner.stop()
                raise

    def _measure(self, run: Run, seed: int, *, anew: bool) -> str:
        before = None if run.after is None else self._records.of(run.after, seed)
        if before is not None and before.error:  # then there is nothing to begin with
            record = replace(before, key=run.key, run=words(run))
        else:
            record = self._runner.measure(run, seed, anew=anew)
        if not anew:  # a model that was gone has been measured as served before
            record = record.with_others_of(self._records.of(run, seed))
        self._keep(record)
        return record.error or f"test AUC {record.figures[AUC]:.4f}"

    def _is_redone(self, cell: Cell, run: Run, seed: int) -> bool:
        """Returns whether a run is to be made anew, which is so once."""
        if not (self._options.redo and _named(cell, self._options.only)):
            return False
        known = (run.key, seed) in self._anew
        self._anew.add((run.key, seed))
        return not known

    def _served(self, cell: Cell, seed: int) -> Job | None:
        """Returns what measures a cell's model as it is served; None where there is nothing to."""
        study = self._records.study
        run = self._records.run(cell)
        first = self._records.run(replace(cells(study)[0], model=cell.model))
        if run is None or first is None:
            return None
        record = self._records.of(run, seed)
        if record is None or self._runner.folder(run, seed) is None:
            return None
        kinds = [kind for kind in study.storage if f"{kind}.auc" not in record.figures]
        timed = "inference.ratio" in record.figures
        base = None if timed or self._runner.folder(first, seed) is None else first
        if not kinds and base is None:
            return None
        return _name(cell, seed), partial(self._serve, record, run, kinds, base)

    def _serve(self, record: Record, run: Run, kinds: Sequence[str], base: Run | None) -> str:
        """Measures a model in storage types, and its inference against another's."""
        for name, figures in self._runner.served(run, record.seed, kinds, base).items():
            record = record.with_figures(name, figures)
        self._keep(record)
        return "stored and timed"

    def _models_gone(self, tasks: Sequence[Task], own: Sequence[Task]) -> list[Task]:
        """Returns trainings that have figures, but whose models are to be compressed and gone."""
        found: list[Task] = []
        for cell, seed in tasks:
            if cell.entry.after is not None:
                model = first_cell(self._records.study, cell.entry.after, cell.model)
                run = self._records.run(model)
                record = _record(self._records, model, seed)
                beyond = record is not None and record.error is not None
                gone = run is not None and self._runner.folder(run, seed) is None
                if gone and not beyond and (model, seed) not in [*own, *found]:
                    found.append((model, seed))
        return found

    def _keep(self, record: Record) -> None:
        with self._writing:
            self._records.add(record)
            self._records.write(self._options.results)


def _wanted(study: Study, only: Sequence[str]) -> list[Cell]:
    """Returns the cells whose names match a pattern."""
    return [cell for cell in cells(study) if _named(cell, only)]


def _named(cell: Cell, only: Sequence[str]) -> bool:
    return any(fnmatch(cell.name, pattern) for pattern in only)


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
