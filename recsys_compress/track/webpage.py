"""Pages that need nothing else: style, script and pictures stand in the one HTML file."""

import html
import re
from collections.abc import Sequence

from recsys_compress.track.plots import Draw, as_svg

# Text is 16 pixels, and 14 in tables. What is too wide for a phone scrolls within its own box.
_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 74rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.2; margin: 2.2rem 0 .6rem }
h1 { font-size: 1.8rem; margin-top: 1rem }
h2 { font-size: 1.35rem; border-bottom: 1px solid #ccc; padding-bottom: .3rem }
h3 { font-size: 1.1rem }
p, dd, figcaption { max-width: 48rem }
dt { font-weight: 600; margin-top: .6rem }
dd { margin-left: 0 }
dd + dd { margin-top: .2rem }
figure { margin: 1rem 0 }
figcaption { color: #444 }
svg { display: block; width: 100%; height: auto; max-width: 62rem }
.narrow { display: none }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left;
  vertical-align: top; white-space: nowrap }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
th, th:first-child { background: #f4f4f4 }
.number { text-align: right; font-variant-numeric: tabular-nums }
.long { white-space: normal; min-width: 10rem; max-width: 26rem }
th button { all: unset; cursor: pointer }
th button:focus-visible { outline: 2px solid #0072b2 }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
summary { cursor: pointer; padding: .2rem 0 }
pre { background: #f4f4f4; padding: .6rem; font-size: .875rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
@media (max-width: 56rem) {
  .wide { display: none }
  .narrow { display: block }
  .narrow svg { max-width: 34rem }
}
"""
# The column whose heading is pressed decides the order: of numbers, else of words; blanks last.
_SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const column = head.cellIndex, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const shown = row => row.cells[column].textContent;
    const compared = (a, b) => {
      const [x, y] = [a, b].map(text => parseFloat(text.replaceAll(",", "")));
      return head.className === "number" && x !== y ? x - y : a.localeCompare(b);
    };
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [shown(a), shown(b)];
      if (!x || !y) return !x - !y;
      return (down ? -1 : 1) * compared(x, y);
    }));
  };
}
"""
# Nothing is fetched, whatever a title or a name may have in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LONG = 20  # characters
_NUMBER = re.compile(r"[-+±≥≤<>:/%x.,e\d\s]*")


def page(title: str, body: Sequence[str]) -> str:
    """Returns a page.

    Args:
        title: as plain text; the heading too.
        body: HTML parts below the heading.
    """
    parts = "\n".join(part for part in body if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{plain(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{plain(title)}</h1>
{parts}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def plain(text: str) -> str:
    """Returns plain text as HTML."""
    return html.escape(text)


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], label: str, *, sortable: bool = False
) -> str:
    """Returns a table in a box in which it scrolls; columns of numbers are set to the right.

    Args:
        titles: of the columns, as plain text.
        rows: cells, as plain text.
        label: what the table is, for those who do not see it.
        sortable: whether a press on a heading sorts by its column.
    """
    kinds = [_kind([row[i] for row in rows], first=i == 0) for i in range(len(titles))]
    head = "".join(
        f'<th scope="col"{kind}>{plain(title)}</th>'
        for title, kind in zip(titles, kinds, strict=True)
    )
    lines = [
        "".join(f"<td{kind}>{plain(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{plain(label)}">'
        f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def terms(pairs: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns a list of terms, each with the sentences about it, as plain text."""
    told = (
        f"<dt>{plain(term)}</dt>" + "".join(f"<dd>{plain(sentence)}</dd>" for sentence in said)
        for term, said in pairs
    )
    return "\n".join(["<dl>", *told, "</dl>"])


def picture(draw: Draw, name: str, label: str, caption: str) -> str:
    """Returns a figure as SVG, drawn for wide and for narrow screens, with its caption.

    Args:
        draw: makes the figure.
        name: unique on the page.
        label: what is to be seen, for those who do not see it.
        caption: as plain text.
    """
    drawn = []
    for width in ("wide", "narrow"):
        svg = as_svg(draw, name, narrow=width == "narrow")
        labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{plain(label)}" ', 1)
        drawn.append(f'<div class="{width}">{labelled}</div>\n')
    below = f"<figcaption>{plain(caption)}</figcaption>"
    return f'<figure id="{plain(name)}">\n{"".join(drawn)}{below}\n</figure>'


def _kind(cells: Sequence[str], *, first: bool) -> str:
    """Returns the class of a column's cells: numbers to the right, long texts in several lines."""
    if not first and all(_NUMBER.fullmatch(cell) for cell in cells):
        return ' class="number"'
    return ' class="long"' if max(map(len, cells), default=0) > _LONG else ""
