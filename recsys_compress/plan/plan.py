"""A plan: what each table becomes, in how many bytes, and at what expected loss."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recsys_compress.compress.planned import PlanFile
from recsys_compress.compress.policy import Policy
from recsys_compress.plan.candidates import Sizes
from recsys_compress.plan.menu import Dish
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.ranks import FullestRank
from recsys_compress.plan.request import Request
from recsys_compress.plan.solver import Choice
from recsys_compress.plan.trials import Trial, Way

PLAN = "plan"  # the way of the solver
MUCH = 0.04  # validation AUC; plans that lose more of it do better from scratch, see docs/plan.md


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each table should be.

    Attributes:
        request: what was asked.
        way: what is planned.
        trials: the solver's plan first, then policies of one method, measured on validation, of
            which the best is planned; where AUC was asked for, then plans that are predicted to
            lose less, see `promise`. None for the grade "data".
        whys: by the same, what limited the choice.
        worths: by table, the loss if all its ids had one vector.
        full: exact bytes of full tables in fp32.
        choice: the solver's, with the loss of what is planned.
        budget: bytes that it was solved for; None where AUC was asked for.
        asked: bytes that were asked for: more than `budget` where processes cannot hold them.
        more: bytes a little beyond the budget, and the predicted rise of the logloss there;
            None where processes cannot hold them.
        curve: (bytes, predicted rise) of the best plans at all sizes, rising.
        quality: what a rise does to the AUC; None for the grade "data".
        file: the plan as it is written.
    """

    request: Request
    way: Way
    trials: Sequence[Trial]
    whys: Mapping[tuple[str, ...], str]
    worths: Mapping[str, float]
    full: Sizes
    choice: Choice
    budget: int | None
    asked: int | None
    more: tuple[int, float] | None
    curve: Sequence[tuple[float, float]]
    quality: AucByLoss | None
    file: PlanFile

    @property
    def policy(self) -> Policy:
        """What is trained."""
        return self.way.policy

    @property
    def dishes(self) -> Mapping[tuple[str, ...], Dish]:
        """By the tables that are stored together, what they become and the estimate."""
        return self.way.dishes

    @property
    def sizes(self) -> Sizes:
        """Exact bytes of the whole plan."""
        return self.way.sizes

    @property
    def fullest(self) -> FullestRank | None:
        """The process that holds most; None where their number was not given."""
        return self.way.fullest

    @property
    def loss(self) -> float:
        """The predicted rise of the logloss."""
        return self.way.loss

    @property
    def lost_too_much(self) -> bool:
        """Whether what the reference hands over is too little to be worth beginning with."""
        return self.request.adopting and (self.lost_auc or 0.0) > MUCH

    @property
    def lost_auc(self) -> float | None:
        """The AUC that it was measured to lose to the reference; None where it was not tried."""
        if self.quality is None or not self.trials:
            return None
        (own,) = [trial for trial in self.trials if trial.way is self.way]
        return self.quality.auc(0.0) - own.valid["auc"]

    @property
    def warning(self) -> str | None:
        """Says that it loses more AUC than was asked for, where it does."""
        most, lost = self.request.max_auc_loss, self.lost_auc
        if most is None or lost is None or lost <= most:
            return None
        return (
            f"loses {lost:.4f} AUC on validation, more than the {most:g} asked for; of the "
            f"{len(self.trials)} plans that were tried none loses less"
        )

    @property
    def error(self) -> float:
        """The standard error of the predicted rise."""
        errors = [dish.estimate.error for dish in self.dishes.values()]
        return float(np.sqrt(np.square(errors).sum()))

    def reason(self, tables: tuple[str, ...]) -> str:
        """Returns in a few words why tables are what they are."""
        total = sum(self.worths.values()) or 1.0
        worth = sum(self.worths[name] for name in tables) / total
        rows = self.file.rows
        ids = sum(rows[name] for name in tables) / sum(rows.values())
        found = f"{worth:.1%} of what ids say, {ids:.1%} of ids"
        # Tables that the solver did not put together are those of a policy of one method.
        why = self.whys.get(tables, "measured better than a mix of methods")
        return "; ".join(part for part in (found, why) if part)


def summary(plan: Plan) -> dict[str, Any]:
    """Returns what was asked for and what was found, as plain data."""
    request, quality = plan.request, plan.quality
    return {
        "for": request.purpose,
        "budget_bytes": plan.budget,
        "asked_bytes": plan.asked,
        "max_auc_loss": request.max_auc_loss,
        "lost_auc": plan.lost_auc,
        "warning": plan.warning,
        "grade": request.grade,
        "reference": None if request.reference is None else str(request.reference),
        "bytes": {**_bytes(plan.sizes), "full": _bytes(plan.full)},
        "loss_rise": plan.loss,
        "loss_rise_error": plan.error,
        "fullest_rank": None
        if plan.fullest is None
        else {**asdict(plan.fullest), "training": plan.fullest.training},
        "gap": plan.choice.gap,
        "auc_before": None if quality is None else quality.auc(0.0),
        "auc_after": None if quality is None else quality.auc(plan.loss),
        "more_bytes": plan.more and plan.more[0],
        "more_loss_rise": plan.more and plan.more[1],
        "trials": [
            {
                "name": trial.way.name,
                **_bytes(trial.way.sizes),
                "loss_rise": trial.way.loss,
                "auc": trial.valid["auc"],
                "logloss": trial.valid["logloss"],
            }
            for trial in plan.trials
        ],
    }


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Returns a line of plain data for each table, or group of tables that share rows."""
    return [
        {
            "tables": list(names),
            "method": dish.candidate.label.partition(" ")[0],
            "storage": dish.candidate.options.storage,
            "rows": dish.candidate.rows,
            "dim": dish.candidate.dim,
            **_bytes(dish.candidate.sizes),
            "loss_rise": dish.estimate.loss,
            "loss_rise_error": dish.estimate.error,
            "reason": plan.reason(names),
        }
        for names, dish in plan.dishes.items()
    ]


def _bytes(sizes: Sizes) -> dict[str, int]:
    return {**asdict(sizes), "training": sizes.training}
