"""The report of a study."""

from pathlib import Path

from recsys_compress.compare.summary import Summary
from recsys_compress.files import write_text


def write_report(summary: Summary, folder: Path) -> None:
    """Writes the report."""
    for name in ("report.html", "report.md"):
        write_text(folder / name, summary.records.study.title)
