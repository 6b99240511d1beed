"""A plan for people: tables for the terminal, and one HTML page that needs nothing else."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from recsys_compress.files import write_text
from recsys_compress.plan.planner import Plan, rows, summary

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left }
svg { max-width: 100%; height: auto }
"""
_COLUMNS = (
    "table",
    "method",
    "storage",
    "rows",
    "dim",
    "training bytes",
    "serving bytes",
    "logloss rise",
    "why",
)


def plain(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain data."""
    return {
        **summary(plan),
        "tables": rows(plan),
        "curve": [{"bytes": size, "loss_rise": loss} for size, loss in plan.curve],
    }


def render(plan: Plan) -> list[Table]:
    """Returns what the terminal shows: the tables, and the plan as a whole."""
    shown = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(_COLUMNS):
        shown.add_column(name, justify="left" if index in (0, len(_COLUMNS) - 1) else "right")
    for cells in _cells(plan):
        shown.add_row(*cells)
    whole = Table(box=None, show_header=False)
    for key, value in _facts(plan):
        whole.add_row(key, value)
    return [shown, whole]


def write_page(plan: Plan, path: Path) -> None:
    """Writes the page.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = [f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in _facts(plan)]
    head = "".join(f"<th>{_text(name)}</th>" for name in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>" for cells in _cells(plan)
    )
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Budget plan</title>"
        f"<style>{_STYLE}</style></head><body><h1>Budget plan</h1>"
        f"<table>{''.join(facts)}</table><h2>Quality against bytes</h2>{_plot(plan)}"
        f"<h2>Tables</h2><table><tr>{head}</tr>{body}</table></body></html>"
    )
    write_text(path, page)


def _cells(plan: Plan) -> list[list[str]]:
    return [
        [
            ", ".join(row["tables"]),
            row["method"],
            row["storage"],
            f"{row['rows']:,}",
            str(row["dim"]),
            f"{row['training']:,}",
            f"{row['serving']:,}",
            _rise(row["loss_rise"], row["loss_rise_error"]),
            row["reason"],
        ]
        for row in rows(plan)
    ]


def _facts(plan: Plan) -> Sequence[tuple[str, str]]:
    """Returns the plan as a whole, in words."""
    sizes, full, quality = plan.sizes, plan.full, plan.quality
    budget = "" if plan.budget is None else f", budget {plan.budget:,} for {plan.request.purpose}"
    saved = plan.loss - plan.more[1]
    facts = [
        (
            "bytes",
            f"training {sizes.training:,} of {full.training:,} (tables {sizes.parameters:,}, "
            f"optimizer {sizes.optimizer:,}); serving {sizes.serving:,} of {full.serving:,}"
            f"{budget}",
        ),
        ("predicted logloss", _rise(plan.loss, plan.error)),
        ("a better choice could save", f"{plan.choice.gap:.2g} at most (the solver's gap)"),
        ("10 % more bytes would save", f"{saved:.2g}, at {plan.more[0]:,} bytes"),
        ("evidence", f"grade {plan.request.grade}"),
    ]
    if plan.fullest is not None:
        own = plan.fullest
        facts.insert(
            1,
            (
                f"fullest of {own.world_size} processes",
                f"training {own.training:,} of {own.memory:,} (tables {own.parameters:,}, "
                f"optimizer {own.optimizer:,})",
            ),
        )
    if quality is not None:
        before, after = quality.auc(0.0), quality.auc(plan.loss)
        shown = f"{after:.4f}, the reference has {before:.4f} on validation"
        facts.insert(-3, ("predicted AUC", shown))
    return facts


def _rise(loss: float, error: float) -> str:
    return f"+{loss:.6f} ± {error:.6f}"


def _text(value: str) -> str:
    return html.escape(value)


def _plot(plan: Plan) -> str:
    """Returns the curve of the best plans at all sizes as SVG, with this plan on it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    quality = plan.quality
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    value = (lambda loss: -loss) if quality is None else quality.auc
    sizes = [size for size, _ in plan.curve]
    axes.plot(sizes, [value(loss) for _, loss in plan.curve], "-", c="#0072B2", label="best plans")
    chosen = plan.sizes.of(plan.request.purpose)
    axes.plot(chosen, value(plan.loss), "*", ms=13, c="#D55E00", label="this plan", zorder=3)
    axes.plot(plan.more[0], value(plan.more[1]), "o", c="#009E73", label="10 % more bytes")
    axes.set_xscale("log")
    label = "predicted AUC" if quality is not None else "predicted rise of the logloss, negative"
    axes.set(xlabel=f"bytes for {plan.request.purpose}", ylabel=label)
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False)
    text = io.StringIO()
    # No date and no random ids: the same plan gives the same page.
    with rc_context({"svg.hashsalt": "plan"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
