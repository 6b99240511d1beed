"""A picture of how much each part of each table keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from recsys_compress.files import atomic_file

_GREY = "#dddddd"


def heat_map(
    kept: Mapping[str, Sequence[float]], path: Path, *, most: float, label: str, columns: str
) -> Path:
    """Draws one row for each table and one cell for each of its parts.

    Args:
        kept: by table, a figure for each of its parts, the first at the left; tables may have
            different numbers of parts.
        path: the PNG file.
        most: the greatest figure there can be, like D.
        label: what the figures are, like "dims kept".
        columns: what the parts are, like "block, the most frequent ids first".
    """
    # The figure class alone: no window system, nothing global, and half the import time.
    from matplotlib.figure import Figure

    width = max(len(row) for row in kept.values())
    cells = [[*row, *[float("nan")] * (width - len(row))] for row in kept.values()]
    figure = Figure(figsize=(0.9 * width + 3.2, 0.3 * len(cells) + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_GREY)  # a part that a table does not have
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(width), [str(number) for number in range(width)])
    axes.set_yticks(range(len(cells)), list(kept))
    axes.set(xlabel=columns)
    axes.spines[:].set_visible(False)
    for row, figures in enumerate(kept.values()):
        for column, value in enumerate(figures):
            colour = "white" if value < 0.6 * most else "black"
            axes.text(column, row, f"{value:.3g}", c=colour, ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label=label)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path
