"""Draws quality against bytes for each method: `python -m benchmarks.method_curves`.

From the figures of the studies it makes a picture for each page in `docs/methods`: the method's own
rows in colour, all others in grey.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.case import ROOT
from recsys_compress.compare.records import Records
from recsys_compress.compare.study import load_study
from recsys_compress.compare.summary import Row, Summary, summarize
from recsys_compress.compress.method import method_classes
from recsys_compress.track.plots import (
    COLOURS,
    DASHES,
    FONT,
    GREY,
    MARKERS,
    log_bytes,
    panels,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDIES = ("movielens_1m", "frappe")
MODEL = "dcnv2"
PAGES = ROOT / "docs" / "methods"
_PALE = "#CCCCCC"
_MOST_LOST = 0.06  # test AUC; rows that lose more are below the picture


def main(out: Path = PAGES) -> None:
    """Writes the pictures to a folder."""
    found = []
    for name in STUDIES:
        study = load_study(ROOT / "studies" / f"{name}.toml")
        found.append(summarize(Records.load(study, ROOT / "studies" / name / "results.json")))
    for method in method_classes():
        shown = [summary for summary in found if _own(summary, method)]
        if shown:
            write_png(partial(_draw, shown, method), out / f"{method}.png")
            print(f"{method}.png", file=sys.stderr)


def _rows(summary: Summary) -> list[Row]:
    return [row for row in summary.rows if row.cell.model == MODEL]


def _own(summary: Summary, method: str) -> list[Row]:
    """Returns the rows of a method."""
    return [row for row in _rows(summary) if row.cell.entry.stored_by == method]


def _draw(found: Sequence[Summary], method: str, narrow: bool) -> "Figure":
    names = {row.cell.entry.drawn_as: None for summary in found for row in _own(summary, method)}
    looks = {
        name: {
            "c": COLOURS[turn % len(COLOURS)],
            "marker": MARKERS[turn % len(MARKERS)],
            "ls": DASHES[turn // len(COLOURS) % len(DASHES)],
        }
        for turn, name in enumerate(names)
    }
    figure, axes = panels(len(found), narrow=narrow, height=3.9 + 0.12 * len(names))
    legend: dict[str, Artist] = {}
    for one, summary in zip(axes, found, strict=True):
        one.set_title(summary.records.study.title, fontsize=FONT)
        legend |= _panel(one, summary, method, looks)
    figure.legend(
        list(legend.values()), list(legend), ncols=3, loc="outside lower left", frameon=False
    )
    return figure


def _panel(
    axes: "Axes", summary: Summary, method: str, looks: Mapping[str, Mapping[str, str]]
) -> "dict[str, Artist]":
    """Draws a data set's rows, and returns what the legend shows."""
    full, own = _rows(summary)[0], _own(summary, method)
    legend: dict[str, Artist] = {}
    legend["full tables"] = axes.axhline(full.auc, ls="--", c=GREY, lw=1, zorder=2)
    for rows in _lines(_rows(summary)).values():
        pale = {"c": _PALE, "lw": 1, "marker": ".", "ms": 4, "zorder": 1}
        (legend["other methods"],) = axes.plot(*_points(rows), **pale)
    for name, rows in _lines(own).items():
        spreads = [_spread(row) for row in rows]
        size = {"lw": 1.4, "ms": 5.5, "capsize": 2, "zorder": 3}
        drawn = axes.errorbar(*_points(rows), yerr=spreads, **looks[name], **size)
        legend[name] = drawn.lines[0]
    values = [full.auc, *(row.auc for row in own)]
    least = max(min(values), full.auc - _MOST_LOST)
    room = 0.15 * max(max(values) - least, 0.002)
    axes.set_ylim(least - room, max(values) + room)
    log_bytes(axes)
    axes.set(xlabel="bytes of embedding tables", ylabel="test AUC")
    return legend


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns rows by the line that they are of, by rising bytes."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.bytes):
        lines.setdefault(row.cell.entry.drawn_as, []).append(row)
    return lines


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.bytes for row in rows], [row.auc for row in rows]


def _spread(row: Row) -> float:
    """Returns the standard deviation over the seeds; 0 for one."""
    values = list(row.aucs.values())
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
