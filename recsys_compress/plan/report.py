"""A plan for people: tables for the terminal, and one HTML page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from recsys_compress.files import write_text
from recsys_compress.plan.plan import Plan, rows, summary
from recsys_compress.track.plots import COLOURS, log_bytes, panels
from recsys_compress.track.webpage import page, picture, table, terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    shown = picture(
        lambda narrow: _curve(plan, narrow=narrow),
        "curve",
        f"{_quality(plan)} of the best plans by bytes, with this plan",
        "The best plans at all sizes, as predicted.",
    )
    parts = [
        *(
            terms([(name, (fact,)) for name, fact in _facts(plan)]),
            "<h2>Quality against bytes</h2>",
            shown,
        ),
        *("<h2>Tables</h2>", table(_COLUMNS, _cells(plan), "Tables", sortable=True)),
    ]
    write_text(path, page("Budget plan", parts))


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
    if plan.asked != plan.budget:
        budget += f": processes cannot hold plans of the {plan.asked:,} asked for"
    saved = "nothing: processes cannot hold them"
    if plan.more is not None:
        saved = f"{plan.loss - plan.more[1]:.2g}, at {plan.more[0]:,} bytes"
    facts = [
        (
            "bytes",
            f"training {sizes.training:,} of {full.training:,} (tables {sizes.parameters:,}, "
            f"optimizer {sizes.optimizer:,}); serving {sizes.serving:,} of {full.serving:,}"
            f"{budget}",
        ),
        ("predicted logloss", _rise(plan.loss, plan.error)),
        ("a better choice could save", f"{plan.choice.gap:.2g} at most (the solver's gap)"),
        ("10 % more bytes would save", saved),
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
    if plan.trials:
        how = "as the reference is taken over" if plan.request.adopting else "trained"
        shown = ", ".join(f"{t.way.name} {t.valid['auc']:.4f}" for t in plan.trials)
        facts.insert(-3, (f"AUC on validation, {how}", f"{shown}; {plan.way.name} is planned"))
    if plan.request.max_auc_loss is not None and plan.lost_auc is not None:
        shown = f"{plan.lost_auc:.4f} measured, {plan.request.max_auc_loss:g} asked for"
        facts.insert(-3, ("AUC lost on validation", shown))
    if plan.warning is not None:
        facts.append(("note", f"this plan {plan.warning}"))
    return facts


def _rise(loss: float, error: float) -> str:
    return f"+{loss:.6f} ± {error:.6f}"


def _quality(plan: Plan) -> str:
    known = plan.quality is not None
    return "predicted AUC" if known else "predicted rise of the logloss, negative"


def _curve(plan: Plan, *, narrow: bool) -> "Figure":
    """Returns the curve of the best plans at all sizes, with this plan on it."""
    figure, (axes,) = panels(1, narrow=narrow, height=4)
    quality = plan.quality
    value = (lambda loss: -loss) if quality is None else quality.auc
    sizes = [size for size, _ in plan.curve]
    losses = [value(loss) for _, loss in plan.curve]
    axes.plot(sizes, losses, "-", c=COLOURS[0], label="best plans")
    chosen = plan.sizes.of(plan.request.purpose)
    axes.plot(chosen, value(plan.loss), "*", ms=13, c=COLOURS[1], label="this plan", zorder=3)
    if plan.more is not None:
        axes.plot(plan.more[0], value(plan.more[1]), "o", c=COLOURS[2], label="10 % more bytes")
    log_bytes(axes)
    axes.set(xlabel=f"bytes for {plan.request.purpose}", ylabel=_quality(plan))
    axes.legend(frameon=False)
    return figure
