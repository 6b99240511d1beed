"""From the kept figures of budget plans to their page and plot."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import ROOT
from recsys_compress.compare.markdown import table
from recsys_compress.compare.records import Records
from recsys_compress.compare.study import load_study
from recsys_compress.compare.summary import Row, summarize
from recsys_compress.compare.verdicts import mean_and_spread
from recsys_compress.files import atomic_file, write_text
from recsys_compress.track.plots import COLOURS, GREY, MARKERS

INTRODUCTION = """# Budget plans

Written by `python -m benchmarks.plan` from the figures in [plan.json](plan.json). For each seed one
model of full tables is trained as in the [study](../../studies/movielens_1m/report.md). But for the
last part, everything here is that model with its tables changed, and nothing is trained again. So
plans and uniform policies, which store all tables in one way by one knob, start from the same and
can be compared at any number of bytes."""
SETS = {
    "movielens_1m": "MovieLens-1M",
    "frappe": """Frappe

Official splits; seeds are those of the training. `unified` has vectors of width 80 here, since
narrower ones cannot take the model over; the uniform policies are as on MovieLens-1M.""",
    "synthetic": """Generated data

That of `recsys-compress demo`, whose model it is; each seed is another world.
""",
}
SHORT = """By how much the plan's test AUC is above that of the best uniform policy at the same
budget, mean over seeds. All plans are of the grade "reference", which tries the likeliest uniform
policies out on validation and may plan one of them. Uniform policies are tried in
sizes that fall by 7 %, so one may take some 7 % less than the budget, which is part of the
difference where the loss is large. Empty cells are not measured yet."""
BY_BLOCK = """`group_reduce` among the uniform policies is as published, with one factor between
ranks and frequencies. By default its ranks are chosen block by block from the same evidence as
plans, so that it is a plan of one method. By how much plans of all methods are above that:"""
LEAST_GAIN, TIE = 0.001, 0.0001  # test AUC
# Finds the best of the policies that a plan is compared with; None where there is none.
Best = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any] | None]
POINTS = """## Predicted against measured

On MovieLens-1M, one table at a time is stored in another way, and the validation logloss of the
model measured. The prediction is that of the grade "reference". Rises below 1e-6 are mostly chance,
and none or less is drawn at the edge."""
PLANS = """Test AUC, mean ± standard deviation over seeds ({seeds}). The best uniform policy is
that of the highest validation AUC among all methods{types} at the same
budget, for each seed anew."""
BLIND = """Plans for training of the grade "data", made without the trained model; its tables are
then taken over by them as above, for comparison."""
SCRATCH = """Plans of the grade "probes", trained from scratch, and beside them what the
[study](../../studies/movielens_1m/report.md) found of methods that take all tables alike and train
from scratch: of those within the plan's budget, optimizer state included, the one of the highest
mean validation AUC. Narrower full tables are among them."""
_LEAST = 1e-7  # of the plot's axes
# By which a study's row may be larger: seeds split the data anew, and have a few ids more or less.
_ROOM = 1.02


def write(records: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Writes the page and the plot beside it."""
    picture = page.with_name("plan.png")
    points = [row for record in records if record["what"] == "points" for row in record["rows"]]
    parts = [INTRODUCTION, "## In short", SHORT, cells(records, best_uniform)]
    parts += [BY_BLOCK, cells(records, best_by_block)]
    if points:
        draw(points, picture)
        shown = f"![predicted against measured rise of the logloss]({picture.name})"
        parts += [POINTS, correlations(points), shown]
    for data, title in SETS.items():
        parts += _set(title, [record for record in records if record["data"] == data])
    write_text(page, "\n\n".join(parts) + "\n")


def _set(title: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the parts of the page about one data set."""
    name = title.partition("\n")[0]
    parts = [f"## {title.strip()}"]
    for purpose, types in (("training", ""), ("serving", " and fp32, int8 and int4")):
        own = _of(records, purpose)
        if own:
            parts += [
                f"### {name}: plans for {purpose}",
                PLANS.format(types=types, seeds=", ".join(str(r["seed"]) for r in own)),
                comparison(own),
                f"What was chosen at seed {own[0]['seed']}:",
                choices(own[0]),
            ]
    blind = _of(records, "data")
    if blind:
        parts += [f"### {name}: plans from the data alone", BLIND, without_reference(blind)]
    runs = _of(records, "probes")
    if runs:
        parts += [f"### {name}: trained from scratch", SCRATCH, from_scratch(runs, study_rows())]
    return parts if len(parts) > 1 else []


def _of(records: Sequence[Mapping[str, Any]], what: str) -> list[Mapping[str, Any]]:
    """Returns the records of a part whose budgets are all measured."""
    own = [record for record in records if record["what"] == what]
    most = max((len(record["rows"]) for record in own), default=0)
    whole = [record for record in own if len(record["rows"]) == most]
    return whole if what in ("training", "serving") else own


def cells(records: Sequence[Mapping[str, Any]], best: Best) -> str:
    """Returns by how much plans are better than the best of other policies.

    Args:
        records: of plans; what is not measured leaves an empty cell.
        best: finds it among the rows of a budget.
    """
    measured = [row["budget"] for r in records for row in r["rows"] if "rows" in row]
    budgets = sorted(set(measured), key=Fraction, reverse=True)
    rows = []
    for data, title in SETS.items():
        for purpose in ("training", "serving"):
            own = _of([record for record in records if record["data"] == data], purpose)
            gains = {name: statistics.mean(found) for name, found in _gains(own, best).items()}
            if gains:
                shown = [f"{gains[name]:+.5f}" if name in gains else "" for name in budgets]
                good = sum(gain > -TIE for gain in gains.values())
                better = sum(gain >= LEAST_GAIN for gain in gains.values())
                of = f"of {len(gains)}"
                name = title.partition("\n")[0]
                rows.append(
                    [name, purpose, str(len(own)), *shown, f"{good} {of}", f"{better} {of}"]
                )
    names = ["data", "for", "seeds", *budgets, f"not worse by {TIE}"]
    return table([*names, f"better by {LEAST_GAIN} or more"], rows)


def _gains(records: Sequence[Mapping[str, Any]], best: Best) -> dict[str, list[float]]:
    """Returns by budget how much better plans are than the best of others, by seed."""
    gains: dict[str, list[float]] = {}
    for row in [row for record in records for row in record["rows"]]:
        other = best(row.get("rows", ()))
        if other is not None:
            gain = row["rows"][0]["test.auc"] - other["test.auc"]
            gains.setdefault(row["budget"], []).append(gain)
    return gains


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Returns the rank correlation; ties share their mean rank."""
    ranks = []
    for values in (left, right):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(points: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of correlations by method and in all."""
    methods = sorted({point["method"] for point in points})
    groups = {name: [p for p in points if p["method"] == name] for name in methods}
    groups |= {"all": list(points)}
    groups |= {"all, measured above 1e-5": [p for p in points if p["measured"] > 1e-5]}
    rows = []
    for name, own in groups.items():
        predicted = [point["predicted"] for point in own]
        measured = [point["measured"] for point in own]
        ratios = [m / p for p, m in zip(predicted, measured, strict=True)]
        rank = f"{spearman(predicted, measured):.3f}" if len(own) > 2 else ""
        rows.append([name, str(len(own)), rank, f"{statistics.median(ratios):.2f}"])
    return table(["method", "points", "Spearman", "median of measured / predicted"], rows)


def comparison(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns plans against the best uniform policies, by budget."""
    rows = []
    for number, first in enumerate(records[0]["rows"]):
        own = [record["rows"][number] for record in records]
        found = [row for row in own if best_uniform(row.get("rows", ())) is not None]
        if not found:
            rows.append([first["budget"], "", "", "out of reach"])
            continue
        plans = [row["rows"][0] for row in found]
        best = [other for row in found if (other := best_uniform(row["rows"])) is not None]
        aucs = [plan["test.auc"] for plan in plans]
        others = [other["test.auc"] for other in best]
        lost = [row["full"]["test.auc"] - auc for row, auc in zip(found, aucs, strict=True)]
        better = [mine - its for mine, its in zip(aucs, others, strict=True)]
        rows.append(
            [
                first["budget"],
                f"{max(row['budget_bytes'] for row in found):,}",
                mean_and_spread([plan["predicted_auc"] for plan in plans]),
                mean_and_spread([plan["valid.auc"] for plan in plans]),
                mean_and_spread(aucs),
                mean_and_spread(lost, "+.4f"),
                mean_and_spread(others),
                ", ".join(sorted({other["policy"] for other in best})),
                mean_and_spread(better, "+.4f"),
            ]
        )
    names = ["budget", "bytes", "predicted valid AUC", "valid AUC", "test AUC", "lost to full"]
    return table([*names, "best uniform", "which", "plan better by"], rows)


def without_reference(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns test AUC of plans that were made from the data alone."""
    rows = []
    for number, first in enumerate(records[0]["rows"]):
        found = [r["rows"][number] for r in records if "test.auc" in r["rows"][number]]
        shown = mean_and_spread([row["test.auc"] for row in found]) if found else "out of reach"
        chosen = "; ".join(first.get("tables", []))
        rows.append([first["budget"], shown, chosen])
    return table(["budget", "test AUC", f"chosen at seed {records[0]['seed']}"], rows)


def from_scratch(records: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Returns plans by probes against what the study trained from scratch, by budget.

    Args:
        records: of the plans, by seed.
        rows: of the study.
    """
    plans: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        for row in record["rows"]:
            plans.setdefault(row["budget"], {})[record["seed"]] = row
    lines = []
    for budget in sorted(plans, key=Fraction, reverse=True):
        own = plans[budget]
        most = max(row["bytes"] for row in own.values())
        within = [row for row in rows if row.in_training and training_bytes(row) <= most * _ROOM]
        aucs = [row["test.auc"] for row in own.values()]
        lines.append(
            [
                *(budget, f"{most:,}", f"{mean_and_spread(aucs)} ({len(own)} seeds)"),
                *_against(
                    own, max(within, key=lambda row: row.mean("valid.auc") or 0, default=None)
                ),
                "; ".join(own[min(own)]["tables"]),
            ]
        )
    names = ["budget", "bytes", "plan by probes", "best of one method", "its test AUC"]
    return table([*names, "plan better by", f"chosen at seed {records[0]['seed']}"], lines)


def _against(plans: Mapping[int, Mapping[str, Any]], best: Row | None) -> list[str]:
    """Returns the cells of a study's row and of how much better plans are, seed by seed."""
    if best is None:
        return [""] * 3
    better = [r["test.auc"] - best.aucs[seed] for seed, r in plans.items() if seed in best.aucs]
    return [
        f"{best.cell.name} ({training_bytes(best):,.0f} bytes)",
        mean_and_spread(list(best.aucs.values())),
        mean_and_spread(better, "+.4f"),
    ]


def study_rows() -> list[Row]:
    """Returns the rows of DCN-V2 in the study of MovieLens-1M."""
    study = load_study(ROOT / "studies" / "movielens_1m.toml")
    found = Records.load(study, ROOT / "studies" / "movielens_1m" / "results.json")
    return [row for row in summarize(found).rows if row.cell.model == "dcnv2"]


def training_bytes(row: Row) -> float:
    """Returns the mean bytes of a study row's tables and optimizer state."""
    return (row.mean("bytes.tables") or 0.0) + (row.mean("bytes.optimizer") or 0.0)


def best_uniform(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the policy of one method and one knob that validation picks."""
    return _best(row for row in rows[1:] if row["one_knob"])


def best_by_block(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the policy of one method that validation picks, whose ranks differ by block."""
    return _best(row for row in rows[1:] if not row["one_knob"])


def _best(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return max(rows, key=lambda row: float(row["valid.auc"]), default=None)


def choices(record: Mapping[str, Any]) -> str:
    """Returns what the plans of one seed chose."""
    rows = [
        [row["budget"], f"{row['rows'][0]['bytes']:,}", "; ".join(row["rows"][0]["tables"])]
        for row in record["rows"]
        if "rows" in row
    ]
    return table(["budget", "bytes", "tables"], rows)


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws predicted against measured rises as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(sorted({point["method"] for point in points})):
        own = [point for point in points if point["method"] == name]
        axes.plot(
            [max(point["predicted"], _LEAST) for point in own],
            [max(point["measured"], _LEAST) for point in own],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            c=COLOURS[i % len(COLOURS)],
            ms=4,
            alpha=0.7,
            label=name,
        )
    axes.plot([_LEAST, 1], [_LEAST, 1], "--", c=GREY, lw=1)
    axes.set(xscale="log", yscale="log", xlim=(_LEAST / 2, 0.5), ylim=(_LEAST / 2, 0.5))
    axes.set(xlabel="predicted rise of the logloss", ylabel="measured rise, on validation")
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
