"""Figures beside the peers to a plot."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.records import GROWING, MB, Record, Records
from recsys_compress.track.plots import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(records: Records, path: Path) -> None:
    """Draws speed, memory and growth as a PNG file."""
    from matplotlib.figure import Figure

    grown = {part: [r for r in records.of(part) if r.runs] for part in GROWING}
    lines = 2 if any(grown.values()) else 1
    figure = Figure(figsize=(20, 4.2 * lines), dpi=100, layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False)
    _bars(panels[0][0], records.of("training"), "cpu", 1e3)
    panels[0][0].set_title("training: thousand samples/CPU s", loc="left")
    _bars(panels[0][1], records.of("training"), "rss", MB)
    panels[0][1].set_title("training: peak memory, MB", loc="left")
    _bars(panels[0][2], records.of("inference"), "cpu", 1e3)
    panels[0][2].set_title("inference: thousand samples/CPU s", loc="left")
    for panel, (part, text) in zip(panels[1:].flat, GROWING.items(), strict=False):
        found = grown[part]
        for name, colour in zip(dict.fromkeys(r.label for r in found), COLOURS, strict=False):
            own = [record for record in found if record.label == name]
            x = [getattr(record.case.shape, part) for record in own]
            y = [record.median("cpu") / 1e3 for record in own]
            panel.plot(x, y, marker="o", color=colour, label=name)
            least, greatest = zip(*(record.range("cpu") for record in own), strict=True)
            panel.vlines(x, [v / 1e3 for v in least], [v / 1e3 for v in greatest], color=colour)
        if found:
            panel.set(xscale="log", yscale="log", xlabel=text, ylabel="thousand samples/CPU s")
        panel.set_visible(bool(found))
        panel.set_title(f"training by {text}", loc="left")
    if lines > 1:
        shown = panels[1][0].get_legend_handles_labels()
        figure.legend(*shown, ncols=4, loc="outside lower center", frameon=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _bars(axes: "Axes", records: list[Record], figure: str, unit: float) -> None:
    found = [record for record in records if figure in record]
    ours = [record.label.startswith("ours") for record in found]
    bars = axes.barh(
        [record.label for record in found],
        [record.median(figure) / unit for record in found],
        color=[COLOURS[0] if own else GREY for own in ours],
    )
    axes.bar_label(bars, fmt="{:,.3g}" if figure == "cpu" else "{:,.0f}", padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
