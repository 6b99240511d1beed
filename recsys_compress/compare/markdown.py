"""A study's report as Markdown, with its charts as pictures beside it."""

from collections.abc import Sequence

from recsys_compress.compare import tables
from recsys_compress.compare.charts import Chart
from recsys_compress.compare.summary import Summary


def render(summary: Summary, charts: Sequence[Chart]) -> str:
    """Returns the report.

    Args:
        summary: what the study has found.
        charts: of it; their pictures are PNG files of their names.
    """
    study = summary.records.study
    parts = [f"# {_plain(study.title)}", _plain(study.about), tables.missing(summary)]
    if summary.advice:
        parts += ["## What to take", _plain(tables.basis(summary))]
        for title, said in summary.advice:
            listed = "\n".join(f"- {_plain(sentence)}" for sentence in said)
            parts += [f"**{_plain(title)}**", listed]
    parts += _section("Best by budget", tables.winners(summary))
    for chart in charts:
        parts += [f"## {_plain(chart.title)}", f"![{_plain(chart.label)}]({chart.name}.png)"]
        parts += [_plain(chart.caption)]
    parts += _section("Claims", tables.claims(summary))
    parts += _section("All rows", tables.rows(summary), tables.HOW_TO_READ)
    parts += _section("Out of reach", tables.beyond(summary))
    parts += _section("Tried on validation", tables.trials(summary))
    found = tables.versions(summary)
    parts += ["## Versions", *(f"- {_plain(one)}" for one in found)] if found else []
    return "\n\n".join(part for part in parts if part) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown; rows may be short of cells at their end."""
    lines = [titles, ["---"] * len(titles)]
    lines += [[_plain(cell) for cell in row] + [""] * (len(titles) - len(row)) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _section(title: str, found: tables.Table, introduction: str = "") -> list[str]:
    """Returns a heading and a table; nothing where it has no rows."""
    return [f"## {title}", introduction, table(found.titles, found.rows)] if found.rows else []


def _plain(text: str) -> str:
    """Returns plain text as Markdown: nothing in it is a tag or the end of a cell."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
