"""The report of a study: one page that needs nothing else, and the same as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from recsys_compress.compare import markdown, tables
from recsys_compress.compare.charts import Chart, charts
from recsys_compress.compare.summary import Summary
from recsys_compress.files import write_text
from recsys_compress.track.plots import write_png
from recsys_compress.track.webpage import page, picture, plain, table, terms

COMMANDS = (
    "Each of these runs the first seed of one row without the study, its data and the model that "
    "it begins with first. RUN is the folder that the training before it has written."
)


def write_report(summary: Summary, folder: Path) -> None:
    """Writes `report.html`, which needs nothing else, `report.md` and the charts as PNG files.

    Args:
        summary: what the study has found.
        folder: of the report.

    Raises:
        UserError: the folder cannot be written.
    """
    found = charts(summary)
    for chart in found:
        write_png(chart.draw, folder / f"{chart.name}.png")
    write_text(folder / "report.md", markdown.render(summary, found))
    write_text(folder / "report.html", render(summary, found))


def render(summary: Summary, found: Sequence[Chart]) -> str:
    """Returns the page.

    Args:
        summary: what the study has found.
        found: its charts.
    """
    study = summary.records.study
    parts = [
        _paragraph(study.about),
        _paragraph(tables.missing(summary)),
        _advice(summary),
        _section("Best by budget", tables.winners(summary)),
        *(_chart(chart) for chart in found),
        _section("Claims", tables.claims(summary)),
        _section("All rows", tables.rows(summary), tables.HOW_TO_READ, sortable=True),
        _commands(summary),
        _section("Out of reach", tables.beyond(summary)),
        _section("Tried on validation", tables.trials(summary)),
        _versions(summary),
    ]
    return page(study.title, parts)


def _section(
    title: str, shown: tables.Table, introduction: str = "", *, sortable: bool = False
) -> str:
    """Returns a heading and a table; nothing where it has no rows."""
    if not shown.rows:
        return ""
    body = table(shown.titles, shown.rows, title, sortable=sortable)
    return f"<h2>{plain(title)}</h2>\n{_paragraph(introduction)}\n{body}"


def _chart(chart: Chart) -> str:
    drawn = picture(chart.draw, chart.name, chart.label, chart.caption)
    key = ""
    if chart.key is not None:
        listed = table(chart.key.titles, chart.key.rows, chart.title)
        key = f"<details><summary>The numbers</summary>{listed}</details>"
    return f"<h2>{plain(chart.title)}</h2>\n{drawn}\n{key}"


def _advice(summary: Summary) -> str:
    if not summary.advice:
        return ""
    basis = _paragraph(tables.basis(summary))
    return f"<h2>What to take</h2>\n{basis}\n{terms(summary.advice)}"


def _commands(summary: Summary) -> str:
    each = []
    for row in summary.rows:
        lines = plain("\n".join(row.commands))
        shown = f"<summary>{plain(row.cell.name)}</summary><pre><code>{lines}</code></pre>"
        each.append(f"<details>{shown}</details>")
    return "\n".join(["<h2>Commands</h2>", _paragraph(COMMANDS), *each]) if each else ""


def _versions(summary: Summary) -> str:
    found = "\n".join(f"<li>{plain(one)}</li>" for one in tables.versions(summary))
    return f"<h2>Versions</h2>\n<ul>\n{found}\n</ul>" if found else ""


def _paragraph(text: str) -> str:
    return f"<p>{plain(text.strip())}</p>" if text.strip() else ""
