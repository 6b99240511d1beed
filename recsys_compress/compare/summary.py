"""What a study has found: its rows, the Pareto front, winners by budget, and advice in words."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from recsys_compress.byte_sizes import budget_bytes, format_bytes
from recsys_compress.compare.cells import Cell, Run, all_trials, cells, commands, first_cell
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.spec import AUC, PLAN, Study
from recsys_compress.compare.verdicts import Verdict, storage_costs, verdicts
from recsys_compress.compress.policy import Policy
from recsys_compress.config import load_job

# Half the width of a 95 % interval of a mean in standard errors, by degrees of freedom (Student).
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Advice = tuple[str, tuple[str, ...]]  # use, and sentences
NO_LOSS = 0.001  # test AUC; what users of such models take for none


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell with figures.

    Attributes:
        cell: the cell.
        records: its records, by seed.
        bytes: of the embedding tables while they train, without optimizer state: the greatest of
            the seeds.
        aucs: test AUC by seed.
        costs: test AUC that each storage type costs, the mean.
        on_front: whether all its seeds have been run and no other such row has at most its bytes
            and a higher mean AUC.
        in_training: whether the budget holds from the first step to the last: not where full
            tables are trained or searched first.
        commands: that run the first seed of it alone.
    """

    cell: Cell
    records: tuple[Record, ...]
    bytes: float
    aucs: Mapping[int, float]
    costs: Mapping[str, float]
    on_front: bool
    in_training: bool
    commands: tuple[str, ...]

    @property
    def auc(self) -> float:
        """Mean test AUC."""
        return statistics.mean(self.aucs.values())

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of the mean over seeds; 0 for one seed."""
        return margin(list(self.aucs.values()))

    def mean(self, figure: str) -> float | None:
        """Returns the mean of a figure; None where no seed has it."""
        found = [r.figures[figure] for r in self.records if figure in r.figures]
        return statistics.mean(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best rows within a budget.

    Attributes:
        budget: as the study has it.
        bytes: the same in bytes.
        row: the row of the highest mean test AUC that fits.
        lost: test AUC that it loses to the first entry, the mean; below 0 for a gain.
        ties: rows of other entries that fit and are no worse, as far as the seeds can tell: the
            95 % interval of the difference has 0 in it, or the difference is less than .0001.
    """

    budget: str
    bytes: int
    row: Row
    lost: float
    ties: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a report shows.

    Attributes:
        records: all records.
        rows: cells with figures, in the order of the study.
        beyond: cells that cannot be had, with the reason.
        missing: number of runs without figures.
        unserved: number of runs with figures, but not all of those of storage types and inference,
            where the study asks for storage types.
        tried: trials by entry and model: settings, validation AUC and whether they were picked.
        winners: by model and budget, from the largest.
        verdicts: of all claims.
        advice: by use, in words: (title, sentences); of the study's first model.
    """

    records: Records
    rows: tuple[Row, ...]
    beyond: tuple[tuple[Cell, str], ...]
    missing: int
    unserved: int
    tried: tuple[tuple[Cell, float | None, bool], ...]
    winners: tuple[Winner, ...]
    verdicts: tuple[Verdict, ...]
    advice: tuple[Advice, ...]


def summarize(records: Records) -> Summary:
    """Returns what the records of a study come to."""
    study = records.study
    found: list[Row] = []
    beyond: list[tuple[Cell, str]] = []
    missing = 0
    for cell in cells(study):
        own = records.all(cell)
        errors = [record.error for record in own if record.error]
        missing += len(study.seeds) - len(own)
        if errors:
            beyond.append((cell, errors[0]))
        elif own:
            run = records.run(cell)
            found += [] if run is None else [_row(records, cell, run, own)]
    whole = _whole(records, found)
    rows = [
        replace(row, on_front=row in whole and not any(_beats(r, row) for r in whole))
        for row in found
    ]
    by_model = {
        model: [row for row in rows if row.cell.model == model] for model in study.models or (None,)
    }
    won = {model: _winners(records, own) for model, own in by_model.items()}
    first = next(iter(by_model))
    return Summary(
        records=records,
        rows=tuple(rows),
        beyond=tuple(beyond),
        missing=missing,
        unserved=_unserved(study, found),
        tried=tuple(_tried(records)),
        winners=tuple(chain.from_iterable(won.values())),
        verdicts=tuple(verdicts(records)),
        advice=tuple(_advice(records, by_model[first], won[first])),
    )


def plain(summary: Summary) -> dict[str, Any]:
    """Returns a summary as plain data."""
    rows = [
        {
            "cell": row.cell.name,
            "bytes": row.bytes,
            "auc": row.auc,
            "margin": row.margin,
            "seeds": sorted(row.aucs),
            "costs": dict(row.costs),
            "on_front": row.on_front,
            "commands": list(row.commands),
        }
        for row in summary.rows
    ]
    winners = [
        {"budget": w.budget, "bytes": w.bytes, "cell": w.row.cell.name, "lost": w.lost}
        for w in summary.winners
    ]
    return {
        "rows": rows,
        "winners": winners,
        "claims": [asdict(verdict) for verdict in summary.verdicts],
        "advice": {title: list(said) for title, said in summary.advice},
        "beyond": {cell.name: reason for cell, reason in summary.beyond},
        "missing": summary.missing,
        "unserved": summary.unserved,
    }


def margin(values: Sequence[float]) -> float:
    """Returns half the width of the 95 % interval of a mean; 0 for one value."""
    if len(values) < 2:
        return 0.0
    factor = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
    return factor * statistics.stdev(values) / math.sqrt(len(values))


def _row(records: Records, cell: Cell, run: Run, own: Sequence[Record]) -> Row:
    costs = {kind: storage_costs(cell, kind, records) for kind in records.study.storage}
    return Row(
        cell=cell,
        records=tuple(own),
        bytes=max(record.figures["bytes.tables"] for record in own),
        aucs={record.seed: record.figures[AUC] for record in own},
        costs={kind: statistics.mean(values) for kind, values in costs.items() if values},
        on_front=False,
        in_training=run.after is None and _is_one_stage(run),
        commands=tuple(commands(records.study, run, own[0].seed)),
    )


def _is_one_stage(run: Run) -> bool:
    return len(Policy.from_config(load_job(Path(run.job), run.settings).embedding).phases()) == 1


def _beats(rival: Row, row: Row) -> bool:
    """Whether a row leaves no reason to take the other one, of the same model."""
    if rival.cell.model != row.cell.model:
        return False
    sizes, aucs = (rival.bytes, row.bytes), (rival.auc, row.auc)
    return (
        sizes[0] <= sizes[1] and aucs[0] >= aucs[1] and (sizes[0], aucs[0]) != (sizes[1], aucs[1])
    )


def _whole(records: Records, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows all of whose seeds have been run: none wins by a lucky one."""
    return [row for row in rows if len(row.aucs) == len(records.study.seeds)]


def _unserved(study: Study, rows: Sequence[Row]) -> int:
    """Returns how many runs lack figures of storage types, or of inference."""
    if not study.storage:
        return 0
    asked = {"inference.ratio", *(f"{kind}.auc" for kind in study.storage)}
    return sum(not asked <= record.figures.keys() for row in rows for record in row.records)


def _winners(records: Records, rows: Sequence[Row]) -> list[Winner]:
    """Returns the winner at each of the study's budgets, and at the first entry's own size."""
    whole = _whole(records, rows)
    if not whole or whole[0].cell.entry is not records.study.methods[0]:
        return []
    full = whole[0]
    whole_bytes = full.bytes if full.cell.budget is None else full.mean("bytes.full") or full.bytes
    found = []
    for budget in ("1x", *(b for b in records.study.budgets if b != "1x")):
        limit = budget_bytes(budget, int(whole_bytes))
        fitting = [row for row in whole if row.bytes <= limit]
        if not fitting:
            continue
        best = max(fitting, key=lambda row: row.auc)
        ties = [r for r in fitting if r.cell.entry is not best.cell.entry and _no_worse(r, best)]
        found.append(
            Winner(budget=budget, bytes=limit, row=best, lost=full.auc - best.auc, ties=tuple(ties))
        )
    return sorted(found, key=lambda winner: -winner.bytes)


def _no_worse(row: Row, best: Row) -> bool:
    """Whether the seeds, pair by pair, cannot tell a row from the best."""
    gaps = [best.aucs[seed] - row.aucs[seed] for seed in best.aucs.keys() & row.aucs.keys()]
    return bool(gaps) and statistics.mean(gaps) <= max(margin(gaps), 0.0001)


def _tried(records: Records) -> Iterator[tuple[Cell, float | None, bool]]:
    study, picks = records.study, records.picks()
    for cell in all_trials(study, cells(study)):
        record = records.trial(cell)
        if record is not None:
            picked = picks.get((cell.entry.name, cell.model)) == cell.tried
            yield cell, record.figures.get("valid.auc"), picked


def _advice(records: Records, rows: Sequence[Row], won: Sequence[Winner]) -> Iterator[Advice]:
    """Yields what to take for which use, as far as the figures say so."""
    whole = _whole(records, rows)
    if not won:
        return
    full = whole[0]
    enough = [row for row in whole if row.auc >= full.auc - NO_LOSS]
    small = min(enough, key=lambda row: row.bytes)
    yield (
        "As small as can be without a loss",
        (
            f"{_named(small, full)}: {small.bytes / full.bytes:.3g} of the bytes, the smallest "
            f"that loses less than {NO_LOSS:g}.",
        ),
    )
    for title, rivals in (
        ("The budget must hold while training too", [r for r in whole if r.in_training]),
        ("There is a trained model to start from", [r for r in whole if r.cell.entry.after]),
    ):
        best = _by_budget(rivals, won, full)
        if best:
            yield title, tuple(best)
    yield from _fast(records, whole, full)
    yield from _stored(records, rows)


def _by_budget(rivals: Sequence[Row], won: Sequence[Winner], full: Row) -> list[str]:
    """Returns the best of some rows within each budget, in words; once where it stays the best."""
    best: dict[str, list[str]] = {}
    for winner in won:
        fitting = [r for r in rivals if r.bytes <= winner.bytes and r is not full]
        if fitting:
            row = max(fitting, key=lambda row: row.auc)
            best.setdefault(_named(row, full), []).append(winner.budget)
    return [f"At {', '.join(budgets)}: {text}." for text, budgets in best.items()]


def _fast(records: Records, whole: Sequence[Row], full: Row) -> Iterator[Advice]:
    """Yields which of the rows that lose little takes the least time to train."""
    spent = {
        row.cell.label: _seconds(records.study, whole, row)
        for row in whole
        if row.bytes <= full.bytes / 2 and row.auc >= full.auc - 5 * NO_LOSS
    }
    known = {name: seconds for name, seconds in spent.items() if seconds is not None}
    base = full.mean("cpu_seconds")
    if known and base:
        name = min(known, key=lambda name: known[name])
        yield (
            "Training time counts",
            (
                f"{name}: {known[name] / base:.2f} of the CPU time of {full.cell.label}, the least "
                f"of those at half the bytes or less that lose at most {5 * NO_LOSS:g}. The "
                "training of a model that a row begins with counts.",
            ),
        )


def _seconds(study: Study, rows: Sequence[Row], row: Row) -> float | None:
    """Returns the mean CPU time of a row and of the trainings that it begins with, if known.

    That of plans is not: what planning takes is not recorded.
    """
    own, after = row.mean("cpu_seconds"), row.cell.entry.after
    if row.cell.entry.stored_by == PLAN:
        return None
    if own is None or after is None:
        return own
    first = first_cell(study, after, row.cell.model)
    begun = next((_seconds(study, rows, r) for r in rows if r.cell == first), None)
    return None if begun is None else own + begun


def _stored(records: Records, rows: Sequence[Row]) -> Iterator[Advice]:
    """Yields what the storage types cost at serving."""
    told = []
    for kind in records.study.storage:
        costs = [row.costs[kind] for row in rows if kind in row.costs]
        if costs:
            middle = statistics.mean(costs)
            of = (
                "whatever the method"
                if len(costs) == len(rows)
                else (f"of the {len(costs)} of {len(rows)} rows measured")
            )
            told.append(
                f"{kind} costs {max(costs):.4f} AUC at most, {middle:.4f} in the mean, {of}."
            )
    if told:
        yield "What is served is to be small", tuple(told)


def _named(row: Row, full: Row) -> str:
    return f"{row.cell.label} ({format_bytes(row.bytes)}, {row.auc - full.auc:+z.4f} AUC)"
