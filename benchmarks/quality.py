"""Quality at a byte budget on real data: `make quality DATA=path`.

Trains the committed jobs on several seeds, each run in a process of its own. The figures of every
run are kept in `docs/benchmarks/quality.json`, from which the page beside it is written, and are
not run again, so the study can be stopped and gone on with.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from benchmarks.study import page
from benchmarks.study.cells import CELLS, TRIALS, Cell
from benchmarks.study.records import Records
from benchmarks.study.runs import ROOT, Runs

FIGURES = "quality.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cells that have no figures yet and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=["*"], help="names, like 'frappe-hash-*'")
    parser.add_argument("--storage", nargs="*", choices=page.STORAGE, default=list(page.STORAGE))
    parser.add_argument("--redo", action="store_true", help="run the cells anew")
    parser.add_argument("--list", action="store_true", help="list the cells without figures")
    parser.add_argument("--render", action="store_true", help="write the page alone")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    records = Records.load(options.out / FIGURES)
    todo = _runs(options.cells, options.seeds)
    if options.list:
        for cell, seed in todo:
            if records.get(cell, seed) is None:
                print(f"{cell.name} seed {seed}")
        return
    if not options.render:
        _measure(todo, records, options)
    page.write(records, options.out / "quality.md")
    print(f"written: {options.out / 'quality.md'}")


def _runs(patterns: Sequence[str], seeds: Sequence[int]) -> list[tuple[Cell, int]]:
    """Returns the runs of the cells that match; of those tried on validation, the first seed's."""
    wanted = [cell for cell in (*CELLS, *TRIALS) if any(fnmatch(cell.name, p) for p in patterns)]
    return [(cell, seed) for cell in wanted for seed in (seeds[:1] if cell in TRIALS else seeds)]


def _measure(
    todo: Sequence[tuple[Cell, int]], records: Records, options: argparse.Namespace
) -> None:
    """Runs what has no figures yet, and writes these after each run."""
    runs = Runs(data=options.data, work=options.work)
    writing = Lock()

    def run(cell: Cell, seed: int) -> None:
        record = records.get(cell, seed)
        if record is None or options.redo:
            record = runs.measure(cell, seed, again=options.redo)
        storage = () if cell in TRIALS or record.error else options.storage
        record = runs.store(cell, record, storage)
        with writing:
            if record != records.get(cell, seed):
                records.add(record)
                records.write(options.out / FIGURES)
        auc = record.figures.get("test.auc")
        shown = record.error if auc is None else f"test AUC {auc:.4f}"
        print(f"{cell.name} seed {seed}: {shown}", file=sys.stderr, flush=True)

    for name, seed in sorted({(cell.data, seed) for cell, seed in todo}):
        runs.prepare(name, seed)
    # Cells that compress another's model come after all trainings, theirs among them.
    for later in (False, True):
        with ThreadPoolExecutor(options.processes) as executor:
            stage = [(cell, seed) for cell, seed in todo if (cell.of is not None) == later]
            list(executor.map(lambda pair: run(*pair), stage))


if __name__ == "__main__":
    main()
