"""Quality at a byte budget on real data: `make quality DATA=path`.

Trains the committed jobs on several seeds, each run in a process of its own, and sets the mean test
AUC beside the floor that it must reach. The checkpoint of a run is chosen on validation. Finished
runs are kept and not run again, so the study can be stopped and gone on with.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_compress.files import write_text

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the study.

    Attributes:
        data: "movielens_1m" or "frappe": the job in `pipelines` and the dataset.
        method: the embedding method.
        budget: bytes of all tables; None for the job's own.
        paper: test AUC that the Unified Embedding paper prints for this row.
        floor: mean test AUC to reach.
        most_lost: mean test AUC that may be lost against full tables.
        settings: keys of the job set otherwise, with their values.
        note: what is special about it.
    """

    data: str
    method: str
    budget: str | None = None
    paper: float | None = None
    floor: float | None = None
    most_lost: float | None = None
    settings: tuple[tuple[str, str], ...] = ()
    note: str | None = None

    @property
    def name(self) -> str:
        """A name for files and lines of output."""
        note = f"-{self.note.replace(' ', '-')}" if self.note else ""
        return f"{self.data}-{self.method}{note}-{self.budget or 'job'}"


# Unified Embedding as in the paper: no id has rows of its own, and vectors are as wide as did best.
PLAIN = (
    ("embedding.min_rows", "20"),
    ("embedding.methods.unified.head_share", "0.0"),
    ("embedding.methods.unified.num_probes", "{user=8, item=8, city=2, country=2}"),
)
# What the hashing trick, tuned, comes down to at a tenth of the bytes: full tables of width 8.
NARROW = (
    ("embedding.dim", "8"),
    ("embedding.learning_rate", "1e-2"),
    ("embedding.weight_decay", "1e-3"),
)
CELLS = (
    Cell(data="movielens_1m", method="full", paper=0.8872, floor=0.895),
    Cell(data="movielens_1m", method="unified", budget="1.6MB", paper=0.8774, floor=0.894),
    Cell(data="movielens_1m", method="unified", budget="791kB", paper=0.8693, floor=0.893),
    Cell(data="movielens_1m", method="unified", budget="158kB", paper=0.8200, floor=0.886),
    Cell(data="movielens_1m", method="hash", budget="1.6MB", paper=0.8537),
    Cell(data="movielens_1m", method="hash", budget="791kB", paper=0.8300),
    Cell(data="movielens_1m", method="hash", budget="158kB", paper=0.7707),
    Cell(data="frappe", method="full", floor=0.983),
    Cell(data="frappe", method="unified", budget="0.1x", most_lost=0.002),
    Cell(data="frappe", method="unified", budget="0.1x", settings=PLAIN, note="as in the paper"),
    Cell(data="frappe", method="full", settings=NARROW, note="width 8"),
)
SOURCES = {"movielens_1m": ("movielens-1m", "movielens-1m"), "frappe": ("frappe", "frappe")}


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "quality.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=sorted(SOURCES))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    cells = [cell for cell in CELLS if arguments.only in (None, cell.data)]
    for name in {cell.data for cell in cells}:
        for seed in arguments.seeds:
            _prepare(name, seed, arguments.data, arguments.work)
    runs = [(cell, seed) for cell in cells for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.processes) as executor:
        results = list(executor.map(lambda run: _train(*run, arguments.work), runs))
    by_cell: dict[Cell, list[dict[str, Any]]] = {}
    for (cell, _), result in zip(runs, results, strict=True):
        by_cell.setdefault(cell, []).append(result)
    table = _table(by_cell)
    print(table)
    if arguments.only is None:
        write_text(arguments.out, _page(table, arguments.seeds))
        print(f"written: {arguments.out}")


def _dataset(name: str, seed: int, work: Path) -> Path:
    # Frappe comes with its splits; MovieLens is split at random by the seed.
    return work / f"{name}-s{seed if name == 'movielens_1m' else 0}"


def _prepare(name: str, seed: int, data: Path, work: Path) -> None:
    out = _dataset(name, seed, work)
    if not out.exists():
        source, folder = SOURCES[name]
        arguments = [source, "--from", str(data / folder), "--out", str(out), "--seed", str(seed)]
        _run("prepare", *arguments)


def _train(cell: Cell, seed: int, work: Path) -> dict[str, Any]:
    path = work / f"{cell.name}-s{seed}.json"
    if not path.exists():
        settings = {
            "data.path": _dataset(cell.data, seed, work),
            "embedding.method": cell.method,
            "train.seed": seed,
            "train.threads": 1,
            "train.output": work / "runs",
            "tracking.uri": f"sqlite:///{work / 'mlflow.db'}",
        } | dict(cell.settings)
        if cell.budget:
            settings["embedding.budget"] = cell.budget
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        output = _run("train", str(ROOT / "pipelines" / f"{cell.data}.toml"), *sets)
        write_text(path, output.splitlines()[-1])
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    print(f"{path.stem}: test AUC {result['test']['auc']:.4f}", file=sys.stderr, flush=True)
    return result


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "recsys_compress", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _table(by_cell: dict[Cell, list[dict[str, Any]]]) -> str:
    lines = [
        "| data | method | table bytes | test AUC | floor | paper | valid AUC | logloss | NE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, results in by_cell.items():
        row = [
            cell.data,
            f"{cell.method}, {cell.note}" if cell.note else cell.method,
            f"{max(r['bytes']['tables'] for r in results):,}",
            _mean([r["test"]["auc"] for r in results]),
            _figure(_floor(cell, by_cell)),
            _figure(cell.paper),
            _mean([r["valid"]["auc"] for r in results]),
            _mean([r["test"]["logloss"] for r in results]),
            _mean([r["test"]["ne"] for r in results]),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _floor(cell: Cell, by_cell: dict[Cell, list[dict[str, Any]]]) -> float | None:
    if cell.most_lost is None:
        return cell.floor
    full = next(r for c, r in by_cell.items() if (c.data, c.method) == (cell.data, "full"))
    return statistics.mean(r["test"]["auc"] for r in full) - cell.most_lost


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _page(table: str, seeds: list[int]) -> str:
    return f"""# Quality at a byte budget

Written by `make quality`. Mean ± standard deviation over the seeds {seeds}; a run's checkpoint is
the best on validation, and test is read once, after that choice. "floor" is what the project
promises; "paper" is the figure that the Unified Embedding paper prints for the same table size
(with another model size and training; its hash baseline is its own).

{table}
"""


if __name__ == "__main__":
    main()
