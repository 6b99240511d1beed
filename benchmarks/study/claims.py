"""What the study must show, as data, and whether the figures show it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.study.cells import CELLS, FRAPPE, MOVIELENS, by_name
from benchmarks.study.records import Records, mean_and_spread

AUC = "test.auc"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One cell against another, seed by seed.

    AUCs are compared by their difference, other figures by their ratio.

    Attributes:
        text: what is claimed.
        left: name of the cell that the claim is about.
        right: name of the cell that it is held against.
        figure: the figure compared.
        against: the other cell's figure, where it is another.
        least: least mean that lets the claim hold; None for no such bound.
        most: likewise, the greatest.
    """

    text: str
    left: str
    right: str
    figure: str = AUC
    against: str | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class StorageClaim:
    """A storage type costs every cell of a data set less than `most` test AUC."""

    text: str
    data: str
    storage: str
    most: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim.

    Attributes:
        text: the claim.
        left: name of the cell that the claim is about; of a storage type, that which it costs most.
        right: name of the other, or the storage type.
        sizes: table bytes of both.
        asked: the bound.
        found: mean and spread, or why there is none; None where a cell has not been run.
        seeds: how many seeds they are over.
        holds: None where figures are missing.
    """

    text: str
    left: str
    right: str
    sizes: tuple[float, float] | None
    asked: str
    found: str | None
    seeds: int
    holds: bool | None


def _claims(data: str, size: str, budget: str, tenth: str) -> tuple[Claim, ...]:
    """Returns the claims that both data sets share.

    Args:
        data: the data set.
        size: what DNIS is promised at, in words.
        budget: the same, as its cell has it.
        tenth: a tenth of the bytes, as the cells of `dynamic_sparse` have it.
    """
    full, dnis, rank = (
        f"{data}-full",
        f"{data}-dnis-{budget}",
        f"{data}-low_rank-0.25x-after-training",
    )
    sparse = f"{data}-dynamic_sparse"
    mixed, uniform = (
        (f"{data}-mixed_dim-0.5x", f"{data}-full-width-15")
        if data == MOVIELENS
        else (f"{data}-mixed_dim-86384", f"{data}-full-width-4")
    )
    return (
        Claim(text=f"DNIS at {size} is as good as full", left=dnis, right=full, least=-0.001),
        Claim(text=f"DNIS at {size} beats mixed_dim", left=dnis, right=mixed, least=0.0),
        Claim(text=f"DNIS at {size} beats uniform widths", left=dnis, right=uniform, least=0.0),
        Claim(
            text="DNIS, search and retraining, takes at most 3 trainings",
            left=dnis,
            right=full,
            figure="cpu_seconds",
            most=3.0,
        ),
        Claim(text="low rank beats the model that it comes from", left=rank, right=full, least=0.0),
        Claim(
            text="low rank leaves at most 1/4 of the whole model",
            left=rank,
            right=full,
            figure="bytes.model",
            most=0.25,
        ),
        Claim(
            text="low rank infers faster than full",
            left=rank,
            right=rank,
            figure="inference.rows_per_s",
            against="inference.before",
            least=1.0,
        ),
        Claim(
            text="dynamic sparse at 1/2 is as good as full",
            left=f"{sparse}-0.5x",
            right=full,
            least=-0.001,
        ),
        Claim(
            text="dynamic sparse at 1/10 beats a static random mask",
            left=f"{sparse}-{tenth}",
            right=f"{sparse}-{tenth}-static-growth",
            least=0.0,
        ),
        Claim(
            text="dynamic sparse at 1/10 beats random growth",
            left=f"{sparse}-{tenth}",
            right=f"{sparse}-{tenth}-random-growth",
            least=0.0,
        ),
        Claim(
            text="dynamic sparse at 1/10 beats pruning after training",
            left=f"{sparse}-{tenth}",
            right=f"{sparse}-0.1x-pruned-after-training",
            least=0.0,
        ),
    )


def _unified(text: str, data: str, others: dict[str, str]) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            text=f"unified at {budget} beats {text}",
            left=f"{data}-unified-{budget}",
            right=f"{data}-{other}",
            least=0.0,
        )
        for budget, other in others.items()
    )


def _own(method: str) -> dict[str, str]:
    return {budget: f"{method}-{budget}" for budget in ("1x", "0.5x", "0.1x", "0.0333x")}


# At 1x the hashing trick keeps every row, and so is `full`. Where width is free, hashing and
# quotient-remainder come down to full tables of a smaller width as far as these fit.
_HASH = _own("hash") | {"1x": "full"}
_FREE = {"1x": "full", "0.5x": "full-width-40", "0.1x": "full-width-8"}
CLAIMS = (
    *_claims(MOVIELENS, "1/2", "0.5x", "0.1x"),
    *_unified("hash", MOVIELENS, _HASH),
    *_unified("quotient_remainder", MOVIELENS, _own("quotient_remainder")),
    *_unified("uniform widths", MOVIELENS, {"0.5x": "full-width-15", "0.1x": "full-width-3"}),
    *_claims(FRAPPE, "1/20", "86384", "172768"),
    *_unified("hash", FRAPPE, _HASH),
    *_unified("hash of any width", FRAPPE, _FREE | {"0.0333x": "hash-57531-width-8"}),
    *_unified("quotient_remainder", FRAPPE, _own("quotient_remainder")),
    *_unified(
        "quotient_remainder of width 8", FRAPPE, {"0.0333x": "quotient_remainder-57531-width-8"}
    ),
)
STORAGE_CLAIMS = tuple(
    StorageClaim(
        text=f"{storage} costs less than {most} on every method",
        data=data,
        storage=storage,
        most=most,
    )
    for data in (MOVIELENS, FRAPPE)
    for storage, most in (("int8", 0.0003), ("int4", 0.002))
)


def judge(claim: Claim, records: Records) -> Verdict:
    """Returns whether the figures bear a claim out, over the seeds that both cells have."""
    left, right = by_name(claim.left), by_name(claim.right)
    ours, theirs = (
        records.figures(left, claim.figure),
        records.figures(right, claim.against or claim.figure),
    )
    seeds = sorted(ours.keys() & theirs.keys())
    is_auc = claim.figure.endswith("auc")
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    values = [mine - other if is_auc else mine / other for mine, other in pairs]
    bounds = ((claim.least, "≥"), (claim.most, "≤"))
    form = "+z.4f" if is_auc else ".2f"
    asked = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    beyond = any(record.error for cell in (left, right) for record in records.all(cell))
    found, holds = "out of reach" if beyond else None, None
    if values:
        middle = statistics.mean(values)
        found = mean_and_spread(values, form)
        holds = (claim.least is None or middle >= claim.least) and (
            claim.most is None or middle <= claim.most
        )
    sizes = [records.figures(cell, "bytes.tables").values() for cell in (left, right)]
    return Verdict(
        text=claim.text,
        left=claim.left,
        right=claim.right,
        sizes=(max(sizes[0]), max(sizes[1])) if all(sizes) else None,
        asked=asked,
        found=found,
        seeds=len(seeds),
        holds=holds,
    )


def judge_storage(claim: StorageClaim, records: Records) -> Verdict:
    """Returns whether the storage type costs little enough on the cell where it costs most."""
    costs = {
        cell.name: storage_costs(cell.name, claim.storage, records)
        for cell in CELLS
        if cell.data == claim.data
    }
    means = {name: statistics.mean(values) for name, values in costs.items() if values}
    worst = max(means, key=means.__getitem__, default=None)
    return Verdict(
        text=claim.text,
        left=worst or claim.data,
        right=claim.storage,
        sizes=None,
        asked=f"< {claim.most:g}",
        found=None if worst is None else f"{means[worst]:+z.4f} at most, of {len(means)} rows",
        seeds=0 if worst is None else len(costs[worst]),
        holds=None if worst is None else means[worst] < claim.most,
    )


def storage_costs(name: str, storage: str, records: Records) -> list[float]:
    """Returns the test AUC that a storage type costs a cell, by seed."""
    cell = by_name(name)
    before, after = records.figures(cell, AUC), records.figures(cell, f"{storage}.auc")
    return [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]


def verdicts(records: Records, data: str) -> Sequence[Verdict]:
    """Returns what became of all claims about a data set."""
    return [
        *(judge(claim, records) for claim in CLAIMS if by_name(claim.left).data == data),
        *(judge_storage(claim, records) for claim in STORAGE_CLAIMS if claim.data == data),
    ]
