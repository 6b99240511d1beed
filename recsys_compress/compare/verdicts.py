"""Whether the figures bear a study's claims out."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass

from recsys_compress.compare.cells import Cell, cells
from recsys_compress.compare.records import Records
from recsys_compress.compare.spec import AUC, Claim, StorageClaim


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim.

    Attributes:
        text: the claim.
        left: name of the cell that the claim is about; of a storage type, that which it costs most.
        right: name of the other, or the storage type; "" for a claim about one cell alone.
        sizes: table bytes of the cells; empty where one has not been run.
        asked: the bound.
        found: mean and spread, or why there is none; None where a cell has not been run.
        seeds: how many seeds they are over.
        holds: None where figures are missing.
    """

    text: str
    left: str
    right: str
    sizes: tuple[float, ...] = ()
    asked: str
    found: str | None
    seeds: int
    holds: bool | None


def verdicts(records: Records) -> list[Verdict]:
    """Returns what became of all claims of a study."""
    study = records.study
    return [
        *(judge(claim, records) for claim in study.claims),
        *(judge_storage(claim, records) for claim in study.storage_claims),
    ]


def judge(claim: Claim, records: Records) -> Verdict:
    """Returns whether the figures bear a claim out, seed by seed; None while seeds are missing."""
    named = {cell.name: cell for cell in cells(records.study)}
    compared = [named[name] for name in (claim.left, claim.right) if name is not None]
    figures = [records.figures(cell, claim.figure) for cell in compared]
    seeds = sorted(set.intersection(*(set(found) for found in figures)))
    is_auc = claim.figure.endswith("auc")
    values = [figures[0][seed] for seed in seeds]
    if claim.right is not None:
        pairs = zip(values, (figures[1][seed] for seed in seeds), strict=True)
        # To 0 there is no ratio.
        values = [a - b if is_auc else a / b for a, b in pairs if is_auc or b]
    form = (".4f" if claim.right is None else "+z.4f") if is_auc else ".2f"
    bounds = ((claim.least, "≥"), (claim.most, "≤"))
    beyond = any(record.error for cell in compared for record in records.all(cell))
    found, holds = "out of reach" if beyond else None, None
    if values and not beyond:
        middle = statistics.mean(values)
        found = mean_and_spread(values, form)
        if len(values) == len(records.study.seeds):
            least, most = claim.least, claim.most
            holds = (least is None or middle >= least) and (most is None or middle <= most)
    sizes = [records.figures(cell, "bytes.tables").values() for cell in compared]
    return Verdict(
        text=claim.text,
        left=claim.left,
        right=claim.right or "",
        sizes=tuple(max(size) for size in sizes) if all(sizes) else (),
        asked=" and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None),
        found=found,
        seeds=len(seeds),
        holds=holds,
    )


def judge_storage(claim: StorageClaim, records: Records) -> Verdict:
    """Returns whether the storage type costs little enough on the cell where it costs most.

    It does so where each row with a test AUC has been stored, and evaluated, at all its seeds; one
    row is enough to show that it does not.
    """
    trained = [cell for cell in cells(records.study) if records.figures(cell, AUC)]
    costs = {c.name: storage_costs(c, claim.storage, records) for c in trained}
    means = {
        c.name: statistics.mean(costs[c.name])
        for c in trained
        if len(costs[c.name]) == len(records.figures(c, AUC))
    }
    worst = max(means, key=means.__getitem__, default=None)
    holds = None if worst is None else means[worst] < claim.most
    if holds and len(means) < len(trained):
        holds = None  # what was not measured may cost more
    measured = f"{len(means)} of {len(trained)} rows measured"
    return Verdict(
        text=f"{claim.storage} costs less than {claim.most:g} on every method",
        left=worst or "",
        right=claim.storage,
        asked=f"< {claim.most:g}",
        found=measured if worst is None else f"{means[worst]:+z.4f} at most, {measured}",
        seeds=0 if worst is None else len(costs[worst]),
        holds=holds,
    )


def storage_costs(cell: Cell, storage: str, records: Records) -> list[float]:
    """Returns the test AUC that a storage type costs a cell, of each of its seeds that has both."""
    before, after = records.figures(cell, AUC), records.figures(cell, f"{storage}.auc")
    return [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]


def mean_and_spread(values: Collection[float], form: str = ".4f") -> str:
    """Returns the mean and, of several values, the standard deviation, as text."""
    shown = f"{statistics.mean(values):{form}}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {statistics.stdev(values):{form.removeprefix('+')}}"
