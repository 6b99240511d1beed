"""The AUC that a plan may lose, kept as measured on validation and not as predicted alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recsys_compress.plan.menu import Item
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.solver import Choice
from recsys_compress.plan.trials import Measure, Trial, Way

_TRIES = 6  # plans that are measured; from scratch each is a whole training
_NOTHING = 1e-9  # loss of AUC

# Returns the smallest plan of at most so large a predicted loss of AUC; None where there is none.
Solve = Callable[[float], tuple[list[Item], Choice, Way] | None]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The items and the options of a plan, and what it was measured to be."""

    items: list[Item]
    choice: Choice
    trial: Trial

    def lost(self, quality: AucByLoss) -> float:
        """Returns the AUC on validation that it was measured to lose to the reference."""
        return quality.auc(0.0) - self.trial.valid["auc"]

    def predicted(self, quality: AucByLoss) -> float:
        """Returns the AUC that it was expected to lose."""
        return quality.auc(0.0) - quality.auc(self.trial.way.loss)


def tightened(
    first: Attempt, most: float, quality: AucByLoss, solve: Solve, measure: Measure
) -> list[Attempt]:
    """Returns a plan, and others of smaller predicted losses where it lost more than it may.

    What is predicted falls by as much as the last plan lost too much, which may be further than
    needed, since predictions fail most where much is lost. So once a plan lost little enough, those
    between it and the ones that did not are tried.

    Args:
        first: the smallest plan that is predicted to lose at most `most`.
        most: AUC that a plan may lose.
        quality: of the reference.
        solve: finds other plans.
        measure: tries them out on validation.
    """
    attempts = [first]
    while len(attempts) < _TRIES:
        good = [each.predicted(quality) for each in attempts if each.lost(quality) <= most]
        bad = [each.predicted(quality) for each in attempts if each.lost(quality) > most]
        if not bad:
            break
        if good:
            # Where a plan is expected to gain, there is no such mean.
            bound = math.sqrt(max(max(good), 0.0) * max(min(bad), 0.0))
        else:
            # Where losses are not in proportion, that alone would creep.
            tighter = min(most / attempts[-1].lost(quality), 0.5)
            bound = attempts[-1].predicted(quality) * tighter
            if len(attempts) == _TRIES - 1:
                bound = _NOTHING  # the last, before it is said that none holds
        found = solve(bound)
        if found is None or any(found[1].cost == each.choice.cost for each in attempts):
            break
        items, choice, way = found
        trial = Trial(way=way, valid=measure(way.policy))
        attempts.append(Attempt(items=items, choice=choice, trial=trial))
    return attempts


def kept(attempts: Sequence[Attempt], most: float, quality: AucByLoss) -> Attempt:
    """Returns the smallest plan that lost at most `most`; where none did, that of least loss."""
    good = [each for each in attempts if each.lost(quality) <= most]
    if good:
        return min(good, key=lambda each: each.choice.cost)
    return min(attempts, key=lambda each: each.lost(quality))
