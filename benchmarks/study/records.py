"""The kept figures: one line of JSON for each run, so that the page can be made without running."""

import json
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.study.cells import Cell
from recsys_compress.files import to_json, write_text

# Parts of a command's result that are kept; more digits than these are noise.
KEPT = (
    *(f"{split}.{name}" for split in ("valid", "test") for name in ("auc", "logloss", "ne")),
    "bytes.tables",
    "bytes.full",
    "bytes.model",
    "before.test.auc",
    "inference.rows_per_s",
    "inference.before",
    "seconds",
    "cpu_seconds",
    "samples_per_s",
)
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of one run.

    Attributes:
        run: `Cell.run`: cells that name the same run share its figures.
        seed: of the split, where the data has none of its own, and of the training.
        figures: by dotted names like "test.auc"; in another storage type, "int8.auc".
        versions: of libraries and of this package, as text.
        error: why there are no figures, like a budget that is out of the method's reach.
    """

    run: str
    seed: int
    figures: Mapping[str, float] = field(default_factory=dict)
    versions: str = ""
    error: str | None = None

    @classmethod
    def of(cls, cell: Cell, seed: int, result: Mapping[str, Any], versions: str) -> "Record":
        """Returns the record of a result that `recsys-compress train --json` printed."""
        figures = {name: _find(result, name.split(".")) for name in KEPT}
        return cls(
            run=cell.run,
            seed=seed,
            figures={name: _rounded(value) for name, value in figures.items() if value is not None},
            versions=versions,
        )

    def stored(self, storage: str, result: Mapping[str, Any]) -> "Record":
        """Returns the record with the figures of the same model in another storage type."""
        auc, size = float(result["test"]["auc"]), float(result["bytes"]["tables"])
        more = {f"{storage}.auc": _rounded(auc), f"{storage}.bytes": _rounded(size)}
        return replace(self, figures={**self.figures, **more})


class Records:
    """All records, by run and seed; a new one takes the place of the old."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[tuple[str, int], Record] = {}
        for record in records:
            self.add(record)

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Returns what `write` left, or none."""
        if not path.exists():
            return cls()
        return cls(Record(**raw) for raw in json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Writes a JSON list with a line for each record, in an order that does not change."""
        listed = [asdict(self._records[key]) for key in sorted(self._records)]
        lines = [
            to_json({name: value for name, value in record.items() if value not in ({}, "", None)})
            for record in listed
        ]
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")

    def add(self, record: Record) -> None:
        """Adds or replaces a record."""
        self._records[record.run, record.seed] = record

    def get(self, cell: Cell, seed: int) -> Record | None:
        """Returns the record of a cell's run, if there is one."""
        return self._records.get((cell.run, seed))

    def all(self, cell: Cell) -> list[Record]:
        """Returns the records of a cell by seed."""
        seeds = sorted(seed for run, seed in self._records if run == cell.run)
        return [self._records[cell.run, seed] for seed in seeds]

    def figures(self, cell: Cell, name: str) -> dict[int, float]:
        """Returns one figure of a cell by seed, of the seeds that have it."""
        found = ((record.seed, record.figures.get(name)) for record in self.all(cell))
        return {seed: value for seed, value in found if value is not None}


def mean_and_spread(values: Collection[float], form: str = ".4f") -> str:
    """Returns the mean and, of several values, the standard deviation, as text."""
    shown = f"{statistics.mean(values):{form}}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def _find(result: Mapping[str, Any], path: list[str]) -> float | None:
    value: Any = result
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _rounded(value: float) -> float:
    return int(value) if value == int(value) else round(value, DIGITS)
