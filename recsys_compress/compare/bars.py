"""Horizontal stacked bars of bytes, their names above them: there they fit any width."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recsys_compress.byte_sizes import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST = 0.04  # share of the axis from which on a part has room for its text


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a bar.

    Attributes:
        size: in bytes.
        colour: of it.
        text: written into it where there is room.
    """

    size: float
    colour: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar.

    Attributes:
        heading: written above it; "" for none.
        label: written before it; "" for none.
        parts: of it; none where nothing was measured.
    """

    parts: tuple[Part, ...]
    heading: str = ""
    label: str = ""

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[float | None, str]], *, heading: str = "", label: str = ""
    ) -> "Bar":
        """Returns the bar of sizes and colours; without parts where one was not measured."""
        parts = [Part(size=size, colour=colour) for size, colour in sizes if size is not None]
        whole = tuple(parts) if len(parts) == len(sizes) else ()
        return cls(parts=whole, heading=heading, label=label)

    @property
    def size(self) -> float:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def total(self) -> str:
        """The same in words."""
        return format_bytes(self.size) if self.parts else "not measured"


def lines(bars: Sequence[Bar]) -> int:
    """Returns how many lines bars and headings take."""
    return len(bars) + sum(bool(bar.heading) for bar in bars)


def draw_bars(axes: "Axes", bars: Sequence[Bar], title: str, *, shares: bool = False) -> None:
    """Draws bars from the top down.

    Args:
        axes: what is drawn on.
        bars: the bars.
        title: of the horizontal axis.
        shares: whether each bar is as long as the others, and parts are shares of it.
    """
    from matplotlib.ticker import MaxNLocator

    longest = 1.0 if shares else max(bar.size for bar in bars) or 1.0
    line, places = 0.0, []
    for bar in bars:
        if bar.heading:
            axes.text(0, line + 0.12, bar.heading, va="center")
            line += 1
        places.append(line)
        end = 0.0
        for part in bar.parts:
            width = part.size / bar.size if shares else part.size
            axes.barh(line, width, left=end, height=0.72, color=part.colour, ec="white", lw=0.8)
            if width >= _LEAST * longest:
                middle = end + width / 2
                axes.text(middle, line, part.text, ha="center", va="center_baseline")
            end += width
        if not shares:
            axes.text(end, line, f" {bar.total}", va="center_baseline")
        line += 1
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=title, ylim=(line - 0.4, -0.6), xlim=(0, longest * (1 if shares else 1.3)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value:.0%}" if shares else format_bytes(value)
    )
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
