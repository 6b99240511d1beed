"""The kept figures: one line of JSON for each run, so that reports can be made without running."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recsys_compress.compare.cells import Cell, Picks, Run, cells, run_of, seeds_of, trials
from recsys_compress.compare.spec import Study
from recsys_compress.errors import UserError
from recsys_compress.files import to_json, write_text

# Parts of a command's result that are kept; more digits than these are noise.
KEPT = (
    *(
        f"{split}.{name}"
        for split in ("valid", "test")
        for name in ("auc", "logloss", "ne", "calibration", "ece")
    ),
    "bytes.tables",
    "bytes.full",
    "bytes.optimizer",
    "bytes.model",
    "peak_rss_bytes",
    "seconds",
    "cpu_seconds",
    "samples_per_s",
)
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of one run.

    Attributes:
        key: `Run.key`: cells with the same key share its figures.
        seed: of the training, and of the split where the data has none.
        run: the same as the key, in words.
        figures: by dotted names like "test.auc"; in another storage type, "int8.auc" and
            "int8.bytes"; of inference, "inference.rows_per_s" and "inference.ratio" (to the
            study's first entry).
        history: of each evaluation, share of the training done, validation logloss and AUC.
        calibration: of bins of equal mass on test, mean prediction, observed rate and rows.
        tables: of each group of physical tables, their logical ones and bytes.
        versions: of libraries and of this package, as text.
        dataset: checksum of its data; "" where it is not known.
        error: why there are no figures, like a budget that is out of the method's reach.
    """

    key: str
    seed: int
    run: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    history: list[list[float]] = field(default_factory=list)
    calibration: list[list[float]] = field(default_factory=list)
    tables: list[tuple[str, int]] = field(default_factory=list)
    versions: str = ""
    dataset: str = ""
    error: str | None = None

    @classmethod
    def of(
        cls,
        run: Run,
        seed: int,
        result: Mapping[str, Any],
        tables: list[tuple[str, int]],
        versions: str,
    ) -> "Record":
        """Returns the record of a result that `recsys-compress train --json` printed.

        Args:
            run: what was run.
            seed: of it.
            result: its result.
            tables: see the attribute.
            versions: see the attribute.
        """
        figures = {name: _find(result, name.split(".")) for name in KEPT}
        steps = max(float(result["steps"]), 1.0)
        return cls(
            key=run.key,
            seed=seed,
            run=words(run),
            figures={name: _rounded(value) for name, value in figures.items() if value is not None},
            history=[
                [_rounded(v) for v in (entry["step"] / steps, entry["logloss"], entry["auc"])]
                for entry in result["history"]
            ],
            calibration=[
                [_rounded(part[name]) for name in ("predicted", "observed", "rows")]
                for part in result["calibration"]
            ],
            tables=tables,
            versions=versions,
            dataset=str(result.get("dataset", "")),
        )

    def with_figures(self, prefix: str, figures: Mapping[str, float]) -> "Record":
        """Returns the record with more figures, whose names begin with a prefix."""
        more = {f"{prefix}.{name}": _rounded(value) for name, value in figures.items()}
        return replace(self, figures={**self.figures, **more})

    def with_others_of(self, before: "Record | None") -> "Record":
        """Returns the record with those figures of an older one that it has none of."""
        if before is None or self.error:
            return self
        return replace(self, figures={**before.figures, **self.figures})


class Records:
    """All records of a study, by run and seed; a new one takes the place of the old.

    Args:
        study: what they are of.
        records: those that there are.
    """

    def __init__(self, study: Study, records: Iterable[Record] = ()) -> None:
        self.study = study
        self._records = {(record.key, record.seed): record for record in records}
        self._picks: Picks | None = None
        self._runs: dict[str, Run] = {}  # by the cell's name: to know one takes reading the job

    @classmethod
    def load(cls, study: Study, path: Path) -> "Records":
        """Returns what `write` left, or none.

        Raises:
            UserError: the file is damaged.
        """
        if not path.exists():
            return cls(study)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(study, (Record(**record) for record in raw))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); move it away") from error

    def write(self, path: Path) -> None:
        """Writes a JSON list with a line for each record, in an order that does not change."""
        listed = [asdict(record) for record in self._records.values()]
        listed.sort(key=lambda record: (record["run"], record["key"], record["seed"]))
        lines = [
            to_json(
                {name: value for name, value in record.items() if value not in ({}, [], "", None)}
            )
            for record in listed
        ]
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")

    def add(self, record: Record) -> None:
        """Adds or replaces a record."""
        self._records[record.key, record.seed] = record
        before, self._picks = self._picks, None
        if self.picks() != before:
            self._runs.clear()
            self._picks = None  # of runs that have become others

    def run(self, cell: Cell) -> Run | None:
        """Returns what a cell stands for; None where that hangs on trials without figures."""
        run = self._runs.get(cell.name) or run_of(self.study, cell, self.picks())
        if run is not None:
            self._runs[cell.name] = run
        return run

    def forget(self, runs: Iterable[tuple[str, int]]) -> None:
        """Removes records by key and seed."""
        for run in runs:
            self._records.pop(run, None)
        self._picks = None
        self._runs.clear()

    def of(self, run: Run, seed: int) -> Record | None:
        """Returns the record of a run, if there is one."""
        return self._records.get((run.key, seed))

    def of_seed(self, seed: int) -> list[Record]:
        """Returns the records of a seed, of whatever runs."""
        return [record for record in self._records.values() if record.seed == seed]

    def all(self, cell: Cell) -> list[Record]:
        """Returns the records of a cell by seed, of those that the study has."""
        run = self.run(cell)
        if run is None:
            return []
        seeds = sorted(seeds_of(self.study, cell))
        return [record for seed in seeds if (record := self.of(run, seed)) is not None]

    def figures(self, cell: Cell, name: str) -> dict[int, float]:
        """Returns one figure of a cell by seed, of the seeds that have it."""
        found = ((record.seed, record.figures.get(name)) for record in self.all(cell))
        return {seed: value for seed, value in found if value is not None}

    def trial(self, cell: Cell) -> Record | None:
        """Returns the record of a trial, if it has been run: that of the seed trials are run at."""
        run = self.run(cell)
        return None if run is None else self.of(run, seeds_of(self.study, cell)[0])

    def picks(self) -> Picks:
        """Returns what validation picked, of the entries all of whose trials have ended."""
        if self._picks is None:
            self._picks = {}
            # What begins with a trained model comes last: its trials hang on that model's pick.
            for cell in cells(self.study):
                place = cell.entry.name, cell.model
                if place not in self._picks and (number := self._pick(*place)) is not None:
                    self._picks[place] = number
        return self._picks

    def _pick(self, name: str, model: str | None) -> int | None:
        tried = trials(self.study, self.study.entry(name), model)
        found = [record for cell in tried if (record := self.trial(cell)) is not None]
        if not found or len(found) < len(tried):
            return None
        aucs = [record.figures.get("valid.auc", 0.0) for record in found]
        return max(range(len(aucs)), key=lambda number: aucs[number]) if any(aucs) else None


def words(run: Run) -> str:
    """Returns a run in words."""
    own = " ".join(sorted(run.settings))
    if run.after is None:
        return own
    budget = f" budget={run.budget}" if run.budget else ""
    return f"{words(run.after)} | compress method={run.method}{budget} {own}".rstrip()


def _find(result: Mapping[str, Any], path: list[str]) -> float | None:
    value: Any = result
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _rounded(value: float) -> float:
    whole = math.isfinite(value) and value == int(value)
    return int(value) if whole else round(value, DIGITS)
