"""From the kept figures to the page and its plots."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.cells import CELLS, TRIALS, Cell, by_name
from benchmarks.study.claims import AUC, Verdict, storage_costs, verdicts
from benchmarks.study.records import Records, mean_and_spread
from recsys_compress.files import write_text

TITLES = {"movielens_1m": "MovieLens-1M", "frappe": "Frappe"}
STORAGE = ("int8", "int4")
MARKS = {True: "holds", False: "DOES NOT HOLD", None: "not known"}
INTRODUCTION = """# Quality at a byte budget

Written by `make quality` from the figures in [quality.json](quality.json). Mean ± standard
deviation over the seeds; a run's checkpoint is the best on validation, and test is read once, after
that choice. MovieLens-1M is split anew by each seed; Frappe comes with its split. On MovieLens-1M
all methods are trained alike; on Frappe each is given the better of the same two settings, chosen
on validation at seed 0, as is the operation of the methods that have one.

Claims compare the same seeds and stand as they were made, whatever came of them. "floor" is the
test AUC that the project promises; "paper" is the figure that the Unified Embedding paper prints
for the same table size (with another model size and training; its hash baseline is its own). Times
are of one thread, on a machine that may have had other work."""


def write(records: Records, page: Path) -> str:
    """Writes the page and, beside it, a plot of each data set; returns the page."""
    from benchmarks.study.plot import draw

    for data in TITLES:
        draw(records, data, page.with_name(_picture(data)))
    text = render(records)
    write_text(page, text)
    return text


def render(records: Records) -> str:
    """Returns the page."""
    parts = [INTRODUCTION, _made_with(records)]
    for data, title in TITLES.items():
        parts += [
            f"## {title}",
            f"![{title}: test AUC by bytes]({_picture(data)})",
            "### What it must show",
            claims_table(verdicts(records, data)),
            "### All rows",
            rows_table(records, [cell for cell in CELLS if cell.data == data]),
            trials_table(records, [cell for cell in TRIALS if cell.data == data]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rows_table(records: Records, cells: Sequence[Cell]) -> str:
    """Returns a table of cells; those that have not been run are left out."""
    titles = ["method", "table bytes", "model bytes", "seeds", "test AUC", "floor", "paper"]
    titles += ["valid AUC", "logloss", "NE", *(f"lost in {kind}" for kind in STORAGE)]
    rows = []
    for cell in cells:
        found = records.all(cell)
        errors = [record.error for record in found if record.error]
        if errors:
            short = f"{cell.budget}: {errors[0].partition(';')[0]}"
            rows.append([cell.label, short, *[""] * (len(titles) - 2)])
        elif found:
            rows.append([cell.label, *_figures(records, cell)])
    return _markdown(titles, rows)


def claims_table(found: Sequence[Verdict]) -> str:
    """Returns a table of claims."""
    titles = ["claim", "left", "right", "table bytes", "asked", "found", "seeds", ""]
    rows = []
    for verdict in found:
        sizes = " : ".join(f"{size:,.0f}" for size in verdict.sizes) if verdict.sizes else ""
        cells = [verdict.text, _short(verdict.left), _short(verdict.right), sizes, verdict.asked]
        seeds = str(verdict.seeds) if verdict.seeds else ""
        rows.append([*cells, verdict.found or "not run", seeds, MARKS[verdict.holds]])
    return _markdown(titles, rows)


def trials_table(records: Records, cells: Sequence[Cell]) -> str:
    """Returns a table of what was tried on validation."""
    rows = []
    for cell in cells:
        found = records.all(cell)
        if found:
            value = records.figures(cell, "valid.auc").get(found[0].seed)
            figure = found[0].error if value is None else f"{value:.4f}"
            rows.append([cell.label, cell.budget or "", _settings(cell), figure or ""])
    table = _markdown(["method", "budget", "settings", "valid AUC"], rows)
    return f"### Tried on validation, seed 0\n\n{table}" if rows else ""


def _figures(records: Records, cell: Cell) -> list[str]:
    def spread(name: str) -> str:
        values = records.figures(cell, name).values()
        return mean_and_spread(values) if values else ""

    def largest(name: str) -> str:
        values = records.figures(cell, name).values()
        return f"{max(values):,.0f}" if values else ""

    floor = _floor(cell, records)
    reached = records.figures(cell, AUC).values()
    missed = floor is not None and bool(reached) and statistics.mean(reached) < floor
    costs = [storage_costs(cell.name, kind, records) for kind in STORAGE]
    return [
        largest("bytes.tables"),
        largest("bytes.model"),
        str(len(reached)),
        spread(AUC),
        ("" if floor is None else f"{floor:.4f}") + (", MISSED" if missed else ""),
        "" if cell.paper is None else f"{cell.paper:.4f}",
        spread("valid.auc"),
        spread("test.logloss"),
        spread("test.ne"),
        *(f"{statistics.mean(cost):+z.4f}" if cost else "" for cost in costs),
    ]


def _floor(cell: Cell, records: Records) -> float | None:
    if cell.most_lost is None:
        return cell.floor
    full = records.figures(by_name(f"{cell.data}-full"), AUC).values()
    return statistics.mean(full) - cell.most_lost if full else None


def _made_with(records: Records) -> str:
    found = {record.versions for cell in CELLS for record in records.all(cell)}
    return "Versions: " + "; ".join(sorted(found)) + "." if found else ""


def _settings(cell: Cell) -> str:
    return ", ".join(f"{key.removeprefix('embedding.')} = {value}" for key, value in cell.settings)


def _short(name: str) -> str:
    """Returns a cell's name without the data set's, under whose title it stands."""
    for data in TITLES:
        name = name.removeprefix(f"{data}-")
    return name


def _picture(data: str) -> str:
    return f"quality-{data}.png"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
