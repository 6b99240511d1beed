"""The tables of a study's report as text, for the page and for Markdown."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from recsys_compress.compare.cells import Cell, overrides, settings_tried
from recsys_compress.compare.spec import AUC
from recsys_compress.compare.summary import Row, Summary
from recsys_compress.compare.verdicts import mean_and_spread

MARKS = {True: "holds", False: "DOES NOT HOLD", None: "not known"}
HOW_TO_READ = (
    "Mean ± standard deviation over the seeds; 95 % is half the width of the interval of the mean "
    "(Student). A run's checkpoint is the best on validation; test is read once, after that "
    "choice. Bytes are of the embedding tables while they train, without optimizer state. On the "
    "front: all seeds have been run, and no other such row has at most its bytes and a higher AUC. "
    "Lost: test AUC that a storage type costs. Inference speed: against the first row. Times may "
    "be of a machine that had other work."
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        titles: of the columns.
        rows: a cell for each of them.
    """

    titles: tuple[str, ...]
    rows: list[list[str]]


def missing(summary: Summary) -> str:
    """Returns what is said of runs without figures, or of some; nothing where all have all."""
    said = []
    if summary.missing:
        said = [
            f"{_runs(summary.missing)} no figures yet: rows without any are left out, others are "
            "of fewer seeds."
        ]
    if summary.unserved:
        said += [f"{_runs(summary.unserved)} not all figures of storage types and inference yet."]
    return " ".join(said)


def basis(summary: Summary) -> str:
    """Returns a sentence about what advice is of; nothing where there is one model."""
    models = summary.records.study.models
    return f"By the rows of {models[0]}." if len(models) > 1 else ""


def winners(summary: Summary) -> Table:
    """Returns the best within each budget, and what is as good; by model where there are more."""
    several = len(summary.records.study.models) > 1
    return Table(
        titles=(
            *(("model",) if several else ()),
            *("budget", "bytes", "best", "its bytes", "test AUC", "95 %", "against the first"),
            "no worse, as far as the seeds can tell",
        ),
        rows=[
            [
                *([str(winner.row.cell.model)] if several else []),
                winner.budget,
                f"{winner.bytes:,}",
                winner.row.cell.label,
                f"{winner.row.bytes:,.0f}",
                f"{winner.row.auc:.4f}",
                interval(winner.row),
                f"{-winner.lost:+z.4f}",
                "; ".join(row.cell.label for row in winner.ties)
                if len(summary.records.study.seeds) > 1
                else "one seed cannot tell",
            ]
            for winner in summary.winners
        ],
    )


def claims(summary: Summary) -> Table:
    """Returns the claims with what became of them."""
    return Table(
        titles=("claim", "", "left", "right", "table bytes", "asked", "found", "seeds"),
        rows=[
            [
                verdict.text,
                MARKS[verdict.holds],
                verdict.left,
                verdict.right,
                " : ".join(f"{size:,.0f}" for size in verdict.sizes),
                verdict.asked,
                verdict.found or "not run",
                str(verdict.seeds or ""),
            ]
            for verdict in summary.verdicts
        ],
    )


def rows(summary: Summary) -> Table:
    """Returns all rows with their figures; where there is none the cell is empty."""
    storage = summary.records.study.storage
    columns: dict[str, Callable[[Row], str]] = {
        "row": lambda row: row.cell.name,
        "table bytes": lambda row: f"{row.bytes:,.0f}",
        "test AUC": lambda row: _spread(row, AUC),
        "95 %": interval,
        "published": lambda row: _shown(published(row), ".4f"),
        "on the front": lambda row: "yes" if row.on_front else "",
        "seeds": lambda row: str(len(row.aucs)),
        "valid AUC": lambda row: _spread(row, "valid.auc"),
        "logloss": lambda row: _spread(row, "test.logloss"),
        "NE": lambda row: _spread(row, "test.ne"),
        "calibration": lambda row: _mean(row, "test.calibration", ".3f"),
        "ECE": lambda row: _mean(row, "test.ece", ".4f"),
        **{f"lost in {kind}": _cost(kind) for kind in storage},
        "model bytes": lambda row: _mean(row, "bytes.model", ",.0f"),
        "CPU seconds": lambda row: _mean(row, "cpu_seconds", ",.0f"),
        "inference speed": lambda row: _mean(row, "inference.ratio", ".2f"),
    }
    found = [[shown(row) for shown in columns.values()] for row in summary.rows]
    return Table(titles=tuple(columns), rows=found)


def beyond(summary: Summary) -> Table:
    """Returns the rows that cannot be had, with the reason."""
    found = [[cell.name, reason] for cell, reason in summary.beyond]
    return Table(titles=("row", "why"), rows=found)


def trials(summary: Summary) -> Table:
    """Returns what was tried on validation."""
    return Table(
        titles=("row", "settings", "valid AUC", "picked"),
        rows=[
            [
                replace(cell, tried=None).name,
                _settings(summary, cell),
                "none" if auc is None else f"{auc:.4f}",
                "yes" if picked else "",
            ]
            for cell, auc, picked in summary.tried
        ],
    )


def versions(summary: Summary) -> list[str]:
    """Returns the versions that the figures were made with."""
    found = {record.versions for row in summary.rows for record in row.records}
    return sorted(found - {""})


def interval(row: Row) -> str:
    """Returns the half width of a row's 95 % interval; nothing for one seed."""
    return f"± {row.margin:.4f}" if len(row.aucs) > 1 else ""


def published(row: Row) -> float | None:
    """Returns the test AUC that a paper prints for a row's method and budget."""
    return row.cell.entry.published.get(row.cell.budget or "")


def _runs(count: int) -> str:
    return "1 run has" if count == 1 else f"{count} runs have"


def _spread(row: Row, figure: str) -> str:
    values = [record.figures[figure] for record in row.records if figure in record.figures]
    return mean_and_spread(values) if values else ""


def _mean(row: Row, figure: str, form: str) -> str:
    return _shown(row.mean(figure), form)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _cost(kind: str) -> Callable[[Row], str]:
    return lambda row: f"{row.costs[kind]:+z.4f}" if kind in row.costs else ""


def _settings(summary: Summary, cell: Cell) -> str:
    tried = settings_tried(summary.records.study, cell.entry)[cell.tried or 0]
    return ", ".join(
        setting.removeprefix("embedding.").replace("=", " = ", 1) for setting in overrides(tried)
    )
