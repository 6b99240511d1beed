"""The charts of a study's report: quality, training, memory, tables and calibration."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.compare.bars import Bar, Part, draw_bars, lines
from recsys_compress.compare.records import Record
from recsys_compress.compare.spec import Study
from recsys_compress.compare.summary import Row, Summary
from recsys_compress.compare.tables import Table, published
from recsys_compress.track.plots import (
    COLOURS,
    DASHES,
    FONT,
    GREY,
    MARKERS,
    Draw,
    log_bytes,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE = 0.02  # test AUC; what loses more has a panel of its own, so as not to flatten the others
MANY = (*COLOURS, "#000000", "#882255", "#999933", "#6A51A3", "#8C510A")  # one a method
PALE = ("#8FC1E3", "#F2B48A", "#8FD3B8", "#EBC3DA", "#F5D38A", "#BFE0F5", "#CFCFCF", "#CBA3BC")
MIDDLE_GREY, PALE_GREY = "#BBBBBB", "#DDDDDD"
CHOSEN = "Shown are the study's first row and its model's best within each budget"
Style = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the report.

    Attributes:
        name: of its files; unique in the report.
        title: heading.
        caption: how to read it.
        label: what is to be seen, for those who do not see it.
        draw: makes the figure.
        key: what the numbers in it stand for; None for no numbers.
    """

    name: str
    title: str
    caption: str
    label: str
    draw: Draw
    key: Table | None = None


def charts(summary: Summary) -> list[Chart]:
    """Returns the charts for which there are figures."""
    models = dict.fromkeys(row.cell.model for row in summary.rows)
    found = [_quality(summary, model) for model in models]
    rows = chosen(summary)
    found += filter(
        None,
        (
            *(_training(rows), _memory(rows), _serving(summary, rows)),
            *(_tables(rows), _calibration(rows)),
        ),
    )
    return found


def chosen(summary: Summary) -> list[Row]:
    """Returns the first row and its model's winners: few enough to tell apart in one chart."""
    models = {row.cell.model for row in summary.rows[:1]}
    won = [winner.row for winner in summary.winners if winner.row.cell.model in models]
    rows = [*summary.rows[:1], *won]
    return list({row.cell.name: row for row in rows}.values())


def styles(study: Study) -> dict[str, Style]:
    """Returns the look of each line: a colour for a method, a mark for each line of it."""
    lines: dict[str, list[str]] = {}
    for entry in study.methods:
        own = lines.setdefault(entry.stored_by, [])
        own += [] if (name := entry.drawn_as) in own else [name]
    return {
        name: _style(colour, turn + colour // len(MANY))
        for colour, own in enumerate(lines.values())
        for turn, name in enumerate(own)
    }


def _style(colour: int, turn: int = 0) -> Style:
    return {
        "c": MANY[colour % len(MANY)],
        "marker": MARKERS[(colour + turn) % len(MARKERS)],
        "ls": DASHES[turn % len(DASHES)],
        "ms": 5.5,
        "lw": 1.4,
    }


def _quality(summary: Summary, model: str | None) -> Chart:
    """Returns test AUC against bytes, with the Pareto front and what papers print."""
    rows = [row for row in summary.rows if row.cell.model == model]
    look = styles(summary.records.study)
    top, least = rows[0].auc, min(row.auc for row in rows)
    printed = any(published(row) is not None for row in rows)
    both = least < top - CLOSE < max(row.auc for row in rows)

    def draw(narrow: bool) -> "Figure":
        figure, axes = panels(1 + both, narrow=narrow, height=4.2)
        drawn = [_draw_quality(one, rows, look) for one in axes]
        if both:
            axes[0].set_title("all rows", fontsize=FONT)
            axes[1].set_title(f"within {CLOSE:g} of {rows[0].cell.label}", fontsize=FONT)
            greatest = max(row.auc + row.margin for row in rows if row.auc > top - CLOSE)
            axes[1].set_ylim(top - CLOSE, greatest + 0.05 * (greatest - top + CLOSE))
        _below(figure, drawn[0], narrow=narrow)
        return figure

    return Chart(
        name=f"quality-{model}" if model else "quality",
        title="Quality against bytes" + (f": {model}" if model else ""),
        caption="Mean test AUC over the seeds; bands and bars are 95 % intervals. The Pareto front "
        "is what no other row beats in both bytes and AUC, of those all of whose seeds have been "
        "run. Lines of one colour are of one method."
        + (" Hollow marks are what papers print for the same budget." if printed else ""),
        label=f"Test AUC against bytes of the embedding tables, {len(rows)} rows; on the Pareto "
        f"front: {', '.join(row.cell.label for row in rows if row.on_front)}",
        draw=draw,
    )


def _draw_quality(
    axes: "Axes", rows: Sequence[Row], look: Mapping[str, Style]
) -> dict[str, "Artist"]:
    """Draws the lines of a model's rows, and returns what the legend shows."""
    front = sorted((row.bytes, row.auc) for row in rows if row.on_front)
    look_of_front: Style = {"drawstyle": "steps-post", "lw": 6, "ms": 14, "mec": "none"}
    legend: dict[str, Artist] = {}
    if front:  # there is none while no row has been run with all its seeds
        sizes, aucs = zip(*front, strict=True)
        drawn = axes.plot(sizes, aucs, "-o", c=PALE_GREY, zorder=1, **look_of_front)
        legend["Pareto front"] = drawn[0]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.cell.entry.drawn_as, []).append(row)
    for name, points in lines.items():
        points.sort(key=lambda row: row.bytes)
        sizes, aucs = zip(*((row.bytes, row.auc) for row in points), strict=True)
        margins, style = [row.margin for row in points], look[name]
        (legend[name],) = axes.plot(sizes, aucs, **style)
        if len(points) > 1:
            low, high = ([a + s * m for a, m in zip(aucs, margins, strict=True)] for s in (-1, 1))
            axes.fill_between(sizes, low, high, color=style["c"], alpha=0.12, lw=0)
        else:
            axes.errorbar(sizes, aucs, yerr=margins, c=style["c"], capsize=3, lw=1)
    hollow: Style = {"ls": "none", "mfc": "white", "ms": 7}
    for row in rows:
        if (value := published(row)) is not None:
            style = {**look[row.cell.entry.drawn_as], **hollow}
            axes.plot(row.bytes, value, **style)
            (legend["published (hollow)"],) = axes.plot([], [], marker="o", c=GREY, **hollow)
    axes.axhline(rows[0].auc, ls="--", c=GREY, lw=1)
    log_bytes(axes)
    axes.set(xlabel="bytes of embedding tables", ylabel="test AUC")
    return legend


def _training(rows: Sequence[Row]) -> Chart | None:
    """Returns validation logloss against training time."""
    timed = [(row, record) for row in rows if (record := _first(row, "history", "cpu_seconds"))]
    if not timed:
        return None

    def draw(narrow: bool) -> "Figure":
        figure, (axes,) = panels(1, narrow=narrow, height=4.0)
        longest = max(record.figures["cpu_seconds"] for _, record in timed)
        unit, seconds = ("minutes", 60) if longest < 7200 else ("hours", 3600)
        legend: dict[str, Artist] = {}
        for index, (row, record) in enumerate(timed):
            times = [
                share * record.figures["cpu_seconds"] / seconds for share, *_ in record.history
            ]
            losses = [loss for _, loss, *_ in record.history]
            (legend[row.cell.label],) = axes.plot(times, losses, **_style(index))
        axes.set(xlabel=f"{unit} of CPU time", ylabel="validation logloss")
        _below(figure, legend, narrow=narrow)
        return figure

    return Chart(
        name="training",
        title="Training",
        caption=f"{CHOSEN}, the first seed whose CPU time was measured. Time is in proportion to "
        "the steps; what compresses a trained model is shown without the training of that one.",
        label="Validation logloss against CPU time of "
        + ", ".join(
            f"{row.cell.label} (from {record.history[0][1]:.3f} to {record.history[-1][1]:.3f})"
            for row, record in timed
        ),
        draw=draw,
    )


def _memory(rows: Sequence[Row]) -> Chart | None:
    """Returns memory in training: of the process, and of tables and optimizer state."""
    peaks = [
        Bar.of([(row.mean("peak_rss_bytes"), MIDDLE_GREY)], heading=row.cell.label) for row in rows
    ]
    states = [
        Bar.of(
            [(row.mean("bytes.tables"), COLOURS[0]), (row.mean("bytes.optimizer"), COLOURS[4])],
            heading=row.cell.label,
        )
        for row in rows
    ]
    if not any(bar.parts for bar in (*peaks, *states)):
        return None

    def draw(narrow: bool) -> "Figure":
        figure, axes = panels(2, narrow=narrow, height=0.9 + 0.24 * lines(peaks))
        draw_bars(axes[0], peaks, "peak resident memory of the process")
        draw_bars(axes[1], states, "tables and optimizer state")
        colours = {"tables": COLOURS[0], "optimizer state": COLOURS[4]}
        _patches(figure, colours, narrow=narrow)
        return figure

    return Chart(
        name="memory",
        title="Memory in training",
        caption=f"{CHOSEN}; means over the seeds. The process holds libraries, data and "
        "activations besides. Tables and optimizer state are those at the end of the training.",
        label=f"Peak memory: {_said(peaks)}. Tables and optimizer state: {_said(states)}",
        draw=draw,
    )


def _serving(summary: Summary, rows: Sequence[Row]) -> Chart | None:
    """Returns the bytes of the models as they are served, in each storage type."""
    bars = []
    for row in rows:
        model, tables = row.mean("bytes.model"), row.mean("bytes.tables")
        layers = None if model is None or tables is None else model - tables
        kinds = {"fp32": tables} | {
            kind: row.mean(f"{kind}.bytes") for kind in summary.records.study.storage
        }
        heading = row.cell.label
        for kind, size in kinds.items():
            sizes = [(size, COLOURS[0]), (layers, MIDDLE_GREY)]
            bars.append(Bar.of(sizes, heading=heading, label=kind))
            heading = ""
    if not any(bar.parts for bar in bars):
        return None

    def draw(narrow: bool) -> "Figure":
        figure, (axes,) = panels(1, narrow=narrow, height=0.9 + 0.24 * lines(bars))
        draw_bars(axes, bars, "bytes of the model")
        colours = {"embedding tables": COLOURS[0], "layers, in fp32": MIDDLE_GREY}
        _patches(figure, colours, narrow=narrow)
        return figure

    return Chart(
        name="serving",
        title="Bytes at serving",
        caption=f"{CHOSEN}; means over the seeds. A storage type is of the tables; layers stay in "
        "fp32. What it costs in AUC is among all rows below.",
        label="Bytes of the model by storage type: "
        + ", ".join(f"{bar.heading} {bar.label} {bar.total}".strip() for bar in bars),
        draw=draw,
    )


def _tables(rows: Sequence[Row]) -> Chart | None:
    """Returns what share of the bytes each group of tables takes."""
    known = [(row, record) for row in rows if (record := _first(row, "tables"))]
    bars, key = [], []
    for row, record in known:
        groups = sorted(record.tables, key=lambda group: -group[1])
        total = sum(size for _, size in groups)
        parts = tuple(
            Part(size=size, colour=PALE[i % len(PALE)], text=str(i + 1))
            for i, (_, size) in enumerate(groups)
        )
        bars.append(Bar(parts=parts, heading=f"{row.cell.label}: {format_bytes(total)}"))
        key += [
            [row.cell.label, str(i + 1), name, f"{size:,}", f"{size / total:.1%}"]
            for i, (name, size) in enumerate(groups)
        ]
    if not bars:
        return None

    def draw(narrow: bool) -> "Figure":
        figure, (axes,) = panels(1, narrow=narrow, height=0.7 + 0.26 * lines(bars))
        draw_bars(axes, bars, "share of the row's table bytes", shares=True)
        return figure

    return Chart(
        name="tables",
        title="Where the bytes go",
        caption=f"{CHOSEN}, at the first seed. A part is a group of tables that are stored alike, "
        "largest first; the numbers are those of the table below.",
        label="Shares of the bytes by group of tables; the figures are in the table below",
        draw=draw,
        key=Table(titles=("row", "part", "tables: rows x width", "bytes", "share"), rows=key),
    )


def _calibration(rows: Sequence[Row]) -> Chart | None:
    """Returns observed against predicted rate, and how far they are apart."""
    known = [(row, record) for row in rows if (record := _first(row, "calibration"))]
    if not known:
        return None
    names = [f"{row.cell.label} ({_quality_of(row)})" for row, _ in known]
    rates = [rate for _, record in known for part in record.calibration for rate in part[:2]]
    top = 1.05 * max(*rates, 1e-6)

    def draw(narrow: bool) -> "Figure":
        figure, axes = panels(2, narrow=narrow, height=3.8)
        legend: dict[str, Artist] = {}
        axes[0].plot([0, top], [0, top], "--", c=GREY, lw=1)
        axes[1].axhline(0, ls="--", c=GREY, lw=1)
        for i, (name, (_, record)) in enumerate(zip(names, known, strict=True)):
            predicted, observed, _ = zip(*record.calibration, strict=True)
            (legend[name],) = axes[0].plot(predicted, observed, **_style(i))
            gaps = [o - p for o, p in zip(observed, predicted, strict=True)]
            axes[1].plot(predicted, gaps, **_style(i))
        axes[0].set(xlabel="predicted rate", ylabel="observed rate", xlim=(0, top), ylim=(0, top))
        axes[1].set(xlabel="predicted rate", ylabel="observed - predicted", xlim=(0, top))
        _below(figure, legend, narrow=narrow)
        return figure

    return Chart(
        name="calibration",
        title="Calibration",
        caption=f"{CHOSEN}, at the first seed, on test, in bins of equal numbers of rows; dashed "
        "is perfect. In brackets the calibration ratio (mean prediction by observed rate) and the "
        "expected calibration error, means over the seeds.",
        label="Observed against predicted rate: " + ", ".join(names),
        draw=draw,
    )


def _first(row: Row, part: str, figure: str | None = None) -> Record | None:
    """Returns the record of the first seed that has a part, and a figure."""
    return next(
        (r for r in row.records if getattr(r, part) and (figure is None or figure in r.figures)),
        None,
    )


def _quality_of(row: Row) -> str:
    ratio, error = row.mean("test.calibration"), row.mean("test.ece")
    found = [None if ratio is None else f"ratio {ratio:.3f}"]
    found += [None if error is None else f"ECE {error:.4f}"]
    return ", ".join(one for one in found if one) or "not measured"


def _said(bars: Sequence[Bar]) -> str:
    return ", ".join(f"{bar.heading} {bar.total}" for bar in bars)


def _patches(figure: "Figure", colours: Mapping[str, str], *, narrow: bool) -> None:
    from matplotlib.patches import Patch

    patches = {label: Patch(color=colour) for label, colour in colours.items()}
    _below(figure, patches, narrow=narrow)


def _below(figure: "Figure", legend: Mapping[str, "Artist"], *, narrow: bool) -> None:
    """Sets the legend below the axes, and makes room for it: within none is sure to be free."""
    labels = [textwrap.fill(label, 38 if narrow else 55) for label in legend]
    widest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.085 * widest)))
    rows = math.ceil(len(labels) / columns) + sum("\n" in label for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.19 * rows)
    look: Style = {"loc": "outside lower left", "frameon": False, "labelspacing": 0.3}
    figure.legend(list(legend.values()), labels, ncols=columns, **look)
