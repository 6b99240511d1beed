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

from recsys_compress.compare.cells import (
    Cell,
    Run,
    all_trials,
    cells,
    first_cell,
    seeds_of,
)
from recsys_compress.compare.progress import StudyProgress
from recsys_compress.compare.records import Record, Records, words
from recsys_compress.compare.runner import Memory, Runner, StoppedError
from recsys_compress.compare.spec import AUC, Study
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import alone
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
        redo: whether the figures of those of them that have some are forgotten first.
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


def missing(records: Records, only: Sequence[str] = ("*",)) -> list[Task]:
    """Returns the cells without figures, and the trials that they hang on, in order.

    Args:
        records: the figures.
        only: patterns of the cells' names.

    Raises:
        UserError: a pattern fits no cell.
    """
    study = records.study
    wanted = _wanted(study, only)
    begun = [first_cell(study, c.entry.after, c.model) for c in wanted if c.entry.after]
    tasks = [
        (cell, seed)
        for cell in [*all_trials(study, [*begun, *wanted]), *wanted]
        for seed in seeds_of(study, cell)
    ]
    left = [task for task in tasks if _record(records, *task) is None]
    return sorted(left, key=lambda task: _stage(task[0]))


def forget(records: Records, only: Sequence[str]) -> set[tuple[str, int]]:
    """Removes the records of cells, so that they are missing; returns their keys and seeds."""
    study = records.study
    whole = cells(study)
    found = {
        (run.key, seed)
        for cell in [*all_trials(study, whole), *whole]
        if _named(cell, only) and (run := records.run(cell)) is not None
        for seed in seeds_of(study, cell)
    }
    records.forget(found)
    return found


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
    # Others would remove each other's runs and figures.
    with alone(options.work), alone(options.results.parent), _terminated_as_interrupted():
        if options.redo:
            comparison.forget()
        comparison.run(missing(records, options.only))
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

    def forget(self) -> None:
        """Removes the figures and models of the cells that are asked for."""
        for key, seed in forget(self._records, self._options.only):
            self._runner.remove(key, seed)
        self._records.write(self._options.results)

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs tasks in the order in which they hang on each other.

        Raises:
            UserError: the data cannot be prepared, or is not that of the figures there are.
        """
        for seed in sorted({seed for _, seed in tasks}):
            self._runner.prepare(seed)
            self._check_data(seed)
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
                        self.failed[name] = "not all of its trials have figures"
                    else:  # cells with the same settings share one run
                        jobs[run.key, seed] = name, partial(self._measure, run, seed)
                progress.expect(len(jobs) - len(own))
                self._side_by_side(jobs.values(), progress)

    def measure_served(self) -> None:
        """Measures storage types and inference of the trained models that are still here."""
        study = self._records.study
        jobs: dict[tuple[str, int], Job] = {}
        for cell in _wanted(study, self._options.only):
            if (run := self._records.run(cell)) is None:
                continue
            for seed in seeds_of(study, cell):
                if (job := self._served(cell, run, seed)) is not None:
                    jobs[run.key, seed] = job
        with StudyProgress("measured as served", len(jobs), self._options.processes) as progress:
            self._side_by_side(jobs.values(), progress)

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

    def _check_data(self, seed: int) -> None:
        """Raises UserError where a seed's figures are of other data than there is."""
        now = self._runner.checksum(seed)
        known = {r.dataset for r in self._records.of_seed(seed) if r.dataset}
        if known - {now}:
            raise UserError(
                f"{self._options.results}: figures of seed {seed} are of other data; move it away, "
                "or run them anew with --redo"
            )

    def _measure(self, run: Run, seed: int) -> str:
        before = None if run.after is None else self._records.of(run.after, seed)
        if before is not None and before.error:  # then there is nothing to begin with
            record = replace(before, key=run.key, run=words(run))
        else:
            record = self._runner.measure(run, seed)
        # A model that was gone has been measured as served before.
        record = record.with_others_of(self._records.of(run, seed))
        self._keep(record)
        return record.error or f"test AUC {record.figures[AUC]:.4f}"

    def _served(self, cell: Cell, run: Run, seed: int) -> Job | None:
        """Returns what measures a cell's model as it is served; None where there is nothing to."""
        study = self._records.study
        first = self._records.run(replace(cells(study)[0], model=cell.model))
        if first is None:
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
    """Returns the cells whose names match a pattern.

    Raises:
        UserError: a pattern fits none.
    """
    whole = cells(study)
    for pattern in only:
        if not any(_named(cell, [pattern]) for cell in whole):
            mend = nearest(pattern, [cell.name for cell in whole])
            raise UserError(f"--only {pattern!r}: fits no cell; {mend}")
    return [cell for cell in whole if _named(cell, only)]


def _named(cell: Cell, only: Sequence[str]) -> bool:
    """Whether a pattern fits a cell's name, with its model or without."""
    return any(fnmatch(name, pattern) for name in (cell.name, cell.label) for pattern in only)


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
