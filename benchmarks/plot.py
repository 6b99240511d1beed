"""One picture of all groups."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Results, label
from benchmarks.step import STAGES
from recsys_compress.track.plots import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Results, path: Path) -> None:
    """Draws a panel for each group as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    _rates(panels[0][0], results, "embedding", "uniform/cpu")
    panels[0][0].set_title("embedding: thousand samples/s of CPU time, uniform ids")
    _stages(panels[0][1], results)
    _rates(panels[1][0], results, "reading", "cpu")
    panels[1][0].set_title("reading: thousand rows/s of CPU time")
    _memory(panels[1][1], results)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _rates(axes: "Axes", results: Results, group: str, figure: str) -> None:
    keys = results.keys(group)
    values = [results.median(key, figure) / 1e3 for key in keys]
    ranges = [results.range(key, figure) for key in keys]
    errors = [
        [value - low / 1e3 for value, (low, _) in zip(values, ranges, strict=True)],
        [high / 1e3 - value for value, (_, high) in zip(values, ranges, strict=True)],
    ]
    ours = [key.split("/")[1] not in ("stock", "torch", "train") for key in keys]
    colours = [COLOURS[0] if own else GREY for own in ours]
    bars = axes.barh([label(key) for key in keys], values, xerr=errors, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=6)
    axes.margins(x=0.12)
    axes.invert_yaxis()


def _stages(axes: "Axes", results: Results) -> None:
    keys = results.keys("step")
    left = [0.0] * len(keys)
    for stage, colour in zip(STAGES, (*COLOURS, GREY), strict=True):
        spent = [results.median(key, stage) for key in keys]
        axes.barh([label(key) for key in keys], spent, left=left, color=colour, label=stage)
        left = [before + own for before, own in zip(left, spent, strict=True)]
    axes.invert_yaxis()
    axes.set_title("DCN-V2 step: CPU milliseconds")
    if keys:
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.08))


def _memory(axes: "Axes", results: Results) -> None:
    keys = results.keys("memory")
    budgets = [key.split("/")[1] for key in keys]
    peaks = [results.median(key, "rss") / 1e6 for key in keys]
    tables = [
        (results.median(key, "tables") + results.median(key, "optimizer")) / 1e6 for key in keys
    ]
    bars = axes.barh(budgets, peaks, color=COLOURS[0], label="peak resident")
    axes.bar_label(bars, fmt="%.0f")
    axes.barh(budgets, tables, color=COLOURS[4], height=0.4, label="tables and optimizer state")
    axes.invert_yaxis()
    axes.set_title("memory of training, MB")
    if keys:
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.08))
