"""Plots of a run and of a comparison, and what all plots share: colours, axes, files."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.files import atomic_file
from recsys_compress.train.events import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
GREY = "#666666"

# Inches: pages show a figure at about its own size, on a phone the narrow one.
WIDE, NARROW = 8.8, 3.7
FONT = 10.5  # points, which are 14 pixels
_LABEL = 0.62  # inches that a size takes below an axis, with room around it
Draw = Callable[[bool], "Figure"]  # whether it is for a narrow screen


@dataclass(frozen=True, kw_only=True)
class QualityPoint:
    """One trained model in a comparison.

    Attributes:
        method: the method's label.
        bytes: bytes of all embedding parameters.
        auc: test AUC.
    """

    method: str
    bytes: float
    auc: float


def learning_curve(history: Sequence[Metrics], best_step: int, path: Path) -> Path:
    """Draws loss and AUC over the steps of one run, with the chosen checkpoint.

    Args:
        history: `RunResult.history`.
        best_step: `RunResult.best_step`.
        path: the PNG file.
    """
    steps = [entry["step"] for entry in history]
    with _figure(path, columns=2) as (loss, auc):
        loss.plot(steps, [e["train_loss"] for e in history], "-o", ms=3, label="train", c=GREY)
        logloss = [entry["logloss"] for entry in history]
        loss.plot(steps, logloss, "-s", ms=3, label="valid", c=COLOURS[0])
        loss.set(xlabel="step", ylabel="logloss")
        loss.legend(frameon=False)
        values = [entry["auc"] for entry in history]
        auc.plot(steps, values, "-s", ms=3, c=COLOURS[0])
        if best_step in steps:
            best = values[steps.index(best_step)]
            auc.plot(best_step, best, "*", ms=14, c=COLOURS[1], zorder=3)
            _label(auc, f"{best:.4f}", best_step, best, COLOURS[1])
        auc.set(xlabel="step", ylabel="valid AUC")
        auc.margins(x=0.08, y=0.15)
    return path


def calibration(bins: Sequence[Metrics], path: Path) -> Path:
    """Draws observed against predicted click-through rate, with 95 % binomial intervals.

    Args:
        bins: `RunResult.calibration`.
        path: the PNG file.
    """
    predicted = [b["predicted"] for b in bins]
    observed = [b["observed"] for b in bins]
    margin = [
        1.96 * math.sqrt(max(b["observed"] * (1 - b["observed"]), 0.0) / max(b["rows"], 1))
        for b in bins
    ]
    top = 1.05 * max([*predicted, *observed, 1e-6])
    with _figure(path, columns=1) as (axes,):
        axes.plot([0, top], [0, top], "--", c=GREY, lw=1, label="perfect")
        axes.errorbar(
            predicted, observed, yerr=margin, fmt="o", ms=4, capsize=2, c=COLOURS[0], label="test"
        )
        axes.set(
            xlabel="predicted rate", ylabel="observed rate", xlim=(0, top), ylim=(0, top), aspect=1
        )
        axes.legend(frameon=False)
    return path


def quality_vs_bytes(
    points: Sequence[QualityPoint],
    path: Path,
    *,
    full: QualityPoint | None = None,
    best_auc: float | None = None,
) -> Path:
    """Draws test AUC against embedding bytes, one line a method.

    Args:
        points: the compressed models.
        path: the PNG file.
        full: the uncompressed model, drawn as a point and a dashed line.
        best_auc: the best AUC possible on the data, where it is known.
    """
    methods = sorted({point.method for point in points})
    with _figure(path, columns=1) as (axes,):
        if best_auc is not None:
            _level(axes, best_auc, ":", f"best possible {best_auc:.4f}")
        if full is not None:
            _level(axes, full.auc, "--", f"full tables {full.auc:.4f}")
            axes.plot(full.bytes, full.auc, "*", ms=13, c="black", zorder=3)
        for i, method in enumerate(methods):
            line = sorted((p.bytes, p.auc) for p in points if p.method == method)
            axes.plot(
                *zip(*line, strict=True),
                c=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=method,
            )
            for size, auc in line:
                _label(axes, format_bytes(size), size, auc, GREY)
        log_bytes(axes)
        axes.set(xlabel="bytes of embedding parameters", ylabel="test AUC")
        axes.margins(x=0.1, y=0.15)
        # Above the axes: inside there is no corner that is sure to be free.
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return path


def panels(number: int, *, narrow: bool, height: float) -> tuple["Figure", list["Axes"]]:
    """Returns a new figure of panels side by side; on a narrow screen, below each other.

    Args:
        number: of panels.
        narrow: whether it is for a narrow screen.
        height: of a panel in inches.
    """
    # The figure class alone: no window system, nothing global, and half the import time.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = (NARROW, number * height) if narrow else (WIDE, height)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    shape = (number, 1) if narrow else (1, number)
    axes = list(figure.subplots(*shape, squeeze=False).flat)
    _tidy(axes)
    return figure, axes


def log_bytes(axes: "Axes") -> None:
    """Makes the horizontal axis of what is drawn one of bytes, logarithmic.

    As many sizes are written below it as there is room for.
    """
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    least, most = axes.get_xlim()
    room = axes.get_window_extent().width / axes.figure.dpi / _LABEL
    steps = ((1, 2, 5), (1, 3), (1,))
    fitting = (step for step in steps if len(step) * math.log10(most / least) <= room)
    axes.xaxis.set_major_locator(LogLocator(subs=next(fitting, (1,))))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.xaxis.set_minor_formatter(lambda *_: "")


def as_svg(draw: Draw, name: str, *, narrow: bool) -> str:
    """Returns a figure as an SVG element, the same for the same figure.

    Args:
        draw: makes the figure.
        name: makes the ids in it other than those of other figures on the page.
        narrow: whether it is for a narrow screen.
    """
    text = io.StringIO()
    salt = f"{name}, narrow" if narrow else name
    with _look(salt):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw(narrow).savefig(text, format="svg", metadata=nothing)
    drawn = text.getvalue()
    # Parts are numbered from 1 in each figure, and nothing refers to these ids.
    return re.sub(r' id="[\w.]+_\d{1,4}"', "", drawn[drawn.index("<svg") :]).strip()


def write_png(draw: Draw, path: Path) -> None:
    """Writes a figure for wide screens as a PNG file, whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_file(path) as temporary, _look():
        draw(False).savefig(temporary, format="png", dpi=130)


@contextmanager
def _figure(path: Path, *, columns: int) -> Iterator[list["Axes"]]:
    """Yields the axes of a new figure and writes it to `path`, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 1.2, 4.2), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    _tidy(axes)
    yield axes
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


@contextmanager
def _look(salt: str = "") -> Iterator[None]:
    from matplotlib import rc_context

    # A name may have dollars in it, and is no formula.
    with rc_context(
        {
            "font.size": FONT,
            "text.parse_math": False,
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
        }
    ):
        yield


def _tidy(axes: Sequence["Axes"]) -> None:
    for each in axes:
        each.grid(alpha=0.25, lw=0.6)
        each.spines[["top", "right"]].set_visible(False)


def _level(axes: "Axes", auc: float, style: str, label: str) -> None:
    axes.axhline(auc, ls=style, c=GREY, lw=1, label=label)


def _label(axes: "Axes", text: str, x: float, y: float, colour: str) -> None:
    """Writes `text` just below a point."""
    axes.annotate(
        text, (x, y), xytext=(0, -15), textcoords="offset points", ha="center", fontsize=8, c=colour
    )
