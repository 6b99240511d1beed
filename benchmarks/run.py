"""Measures speed and memory: `python -m benchmarks.run [--quick] [--only GROUP] [--repeats N]`.

Every case runs in a process of its own, cases in turn (A B C A B C ...), so that a neighbour's load
falls on all of them. Figures go to the terminal, to a Markdown page and to a plot.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.case import ROOT, Case, Figures, Shape, run
from benchmarks.report import Results
from recsys_compress import runtime

QUICK = Shape(
    features=4, rows=40_000, dim=8, batch=256, dense=2, warmup=1, steps=2, examples=10_000
)
# Processes per case. Where the system puts a process's tables makes look-ups up to twice as fast;
# peaks of memory rise where other work on the machine makes batches wait.
REPEATS = {"embedding": 7, "step": 3, "reading": 3, "ranks": 3, "memory": 3}
METHODS = (
    "hash",
    "double_hash",
    "quotient_remainder",
    "unified",
    "mixed_dim",
    "low_rank",
    "group_reduce",
    "dynamic_sparse",
    "dnis",
    "dnis search",
)
BUDGETS = (
    "unified 0.5x",
    "unified 0.1x",
    "unified 0.01x",
    "hash 0.1x",
    "double_hash 0.1x",
    "quotient_remainder 0.1x",
    "dynamic_sparse 0.1x",
    "group_reduce 0.1x",
    "dnis 0.1x",
    "dnis 0.1x with search",
    "mixed_dim",
    "low_rank",
)


def cases(group: str, shape: Shape, data: str) -> list[Case]:
    """Returns a group's cases, each (name, whether tuned) once."""
    wanted = {
        "embedding": [
            ("stock", False),
            ("stock", True),
            ("torch", False),
            ("torch", True),
            ("full", False),
            ("full", True),
            *((name, True) for name in METHODS),
        ],
        "step": [("stock", False), ("stock", True), ("full", True), ("unified", True)],
        "reading": [("reader", True), ("train", True)],
        "ranks": [
            (f"{n} x {rows}", True) for rows in (shape.rows // 10, shape.rows) for n in (1, 2)
        ],
        "memory": [("full", True), *((name, True) for name in BUDGETS)],
    }
    return [
        Case(group=group, name=name, tuned=tuned, shape=shape, data=data)
        for name, tuned in wanted[group]
    ]


def prepared(group: str, shape: Shape, folder: Path) -> str:
    """Returns the folder of the dataset that the group reads, made here; "" where it reads none."""
    if group not in ("reading", "memory", "ranks"):
        return ""
    from benchmarks import data  # it imports much that the other groups do without

    make = data.many_ids if group == "memory" else data.click_log
    return str(make(shape, folder / group))


def measure(groups: list[str], shape: Shape, repeats: int | None) -> Iterator[tuple[Case, Figures]]:
    """Yields figures as they come, by default as many of each case as its group takes."""
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            data = prepared(group, shape, Path(folder))
            rounds = repeats or REPEATS[group]
            for _, case in itertools.product(range(rounds), cases(group, shape, data)):
                yield case, run(case)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--only", choices=report.GROUPS, help="one group instead of all")
    parser.add_argument("--repeats", type=int, help="processes per case")
    parser.add_argument("--quick", action="store_true", help="tiny tables, to try it out")
    parser.add_argument("--out", type=Path, help="folder of the page and the plot")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("build/benchmarks" if options.quick else "docs/benchmarks")
    groups = [options.only] if options.only else list(report.GROUPS)
    shape = QUICK if options.quick else Shape()
    runtime.configure()
    results = Results.load(out, shape).without(groups)
    for case, figures in measure(groups, shape, options.repeats):
        results.add(case, figures)
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
        print(f"{case.group}/{case.name}{'' if case.tuned else ' (as is)'}  {shown}", flush=True)
    page = report.write(results, out)
    print(page)
    print(f"written to {out}")
    failed = [claim for claim in report.claims(results) if not claim.holds]
    return 1 if failed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
