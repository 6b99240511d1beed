"""Test AUC against bytes, one line a method."""

import statistics
from pathlib import Path

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import AUC
from benchmarks.study.records import Records
from recsys_compress.files import atomic_file
from recsys_compress.track.plots import COLOURS, GREY, MARKERS, format_bytes

Point = tuple[float, float, float]  # bytes, mean AUC, its standard deviation


def draw(records: Records, data: str, path: Path) -> None:
    """Draws the cells of a data set as a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines = points(records, data)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        turn, colour = divmod(i, len(COLOURS))
        sizes, aucs, spreads = zip(*sorted(line), strict=True)
        axes.errorbar(
            sizes,
            aucs,
            yerr=spreads,
            label=name,
            c=COLOURS[colour],
            marker=MARKERS[(colour + turn) % len(MARKERS)],
            ls=("-", "--", ":")[turn % 3],
            ms=5,
            capsize=2,
        )
    if "full" in lines:
        _, auc, _ = max(lines["full"])
        axes.axhline(auc, ls="--", c=GREY, lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set(xlabel="bytes of embedding parameters", ylabel="test AUC")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        # Beside the axes: inside there is no corner that is sure to be free.
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def points(records: Records, data: str) -> dict[str, list[Point]]:
    """Returns the points of each line, in the order of the cells."""
    lines: dict[str, list[Point]] = {}
    for cell in CELLS:
        aucs = records.figures(cell, AUC).values()
        if cell.data == data and aucs:
            size = max(records.figures(cell, "bytes.tables").values())
            spread = statistics.stdev(aucs) if len(aucs) > 1 else 0.0
            point = (size, statistics.mean(aucs), spread)
            lines.setdefault(cell.line or cell.method, []).append(point)
    return lines
