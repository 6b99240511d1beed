"""What was measured beside the peers, and where it is kept."""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.case import Case, Figures, Shape
from benchmarks.peers.contestant import LABELS
from recsys_compress.files import write_text

FIGURES = "peers.json"
MB = 1e6
GROWING = {"rows": "rows of all tables", "features": "categorical features", "batch": "batch"}


@dataclass(kw_only=True)
class Record:
    """A case and its repeats.

    Attributes:
        part: of the page.
        case: what was measured; its data are not kept.
        runs: figures of each repeat.
        skipped: why there are none.
    """

    part: str
    case: Case
    runs: list[Figures] = field(default_factory=list)
    skipped: str = ""

    @property
    def label(self) -> str:
        """Its name in a table."""
        default = not self.case.name.startswith("fuxictr")  # others start in one way only
        return LABELS[self.case.name] + (" (tuned)" if self.case.tuned and not default else "")

    def __contains__(self, figure: str) -> bool:
        return bool(self.runs) and all(figure in run for run in self.runs)

    def median(self, figure: str) -> float:
        """Returns the median of a figure over the repeats."""
        return statistics.median(run[figure] for run in self.runs)

    def range(self, figure: str) -> tuple[float, float]:
        """Returns the least and the greatest of a figure over the repeats."""
        values = [run[figure] for run in self.runs]
        return min(values), max(values)

    def cell(self, figure: str, unit: float = 1.0, digits: int = 1) -> str:
        """Returns median, least and greatest as text; a dash where no run has it.

        A run that lacks what others have did not come to it, which is more than any figure.
        """
        values = sorted(run.get(figure, math.inf) / unit for run in self.runs)
        if not values or values[0] == math.inf:
            return "-"
        median, least, greatest = (
            f"{value:,.{digits}f}" if value < math.inf else "never"
            for value in (statistics.median(values), values[0], values[-1])
        )
        return median if len(values) == 1 else f"{median} ({least}-{greatest})"


@dataclass(kw_only=True)
class Records:
    """All records, and what they were made on."""

    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    all: list[Record] = field(default_factory=list)
    quality: dict[str, list[Figures]] = field(default_factory=dict)

    def of(self, part: str) -> list[Record]:
        """Returns the records of a part."""
        return [record for record in self.all if record.part == part]

    def find(self, part: str, name: str, *, tuned: bool) -> Record | None:
        """Returns the record of a contestant that has figures."""
        for record in self.of(part):
            if (record.case.name, record.case.tuned) == (name, tuned) and record.runs:
                return record
        return None

    def record(self, part: str, case: Case) -> Record:
        """Returns the record of a case, made anew where there is none."""
        plain = dataclasses.replace(case, data="", seed=0)
        for record in self.of(part):
            if record.case == plain:
                return record
        self.all.append(Record(part=part, case=plain))
        return self.all[-1]

    def without(self, parts: list[str]) -> "Records":
        """Returns the records of other parts."""
        kept = [record for record in self.all if record.part not in parts]
        return dataclasses.replace(self, all=kept)

    def write(self, folder: Path) -> None:
        """Writes them to a folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_text(folder / FIGURES, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Records":
        """Returns what `write` left in a folder, or nothing."""
        path = folder / FIGURES
        if not path.exists():
            return cls()
        raw = json.loads(path.read_text(encoding="utf-8"))
        records = []
        for record in raw.pop("all"):
            case = record.pop("case")
            case = Case(**{**case, "shape": Shape(**case["shape"])})
            records.append(Record(case=case, **record))
        return cls(all=records, **raw)
