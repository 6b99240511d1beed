"""Short trainings that tell by how much estimates are off for each method."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress import Policy
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.policy import make_rule
from recsys_compress.config import Job
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import alone, joined
from recsys_compress.plan.curves import Evidence, Scales
from recsys_compress.plan.menu import Dish, Item, make_menu
from recsys_compress.plan.trials import untracked_training

SHARES = (0.2, 0.03)  # of the full tables' training bytes, for each method
_LEAST = 1e-5  # nats; a rise below this is noise of training
_BOUNDS = (1e-2, 1e2)


def probe(
    job: Job,
    tables: Sequence[EmbeddingBagConfig],
    evidence: Evidence,
    methods: Sequence[str],
    epochs: int,
) -> Scales:
    """Trains full tables and then, for each method, all free tables under it at two sizes.

    A method's factor is the geometric mean of measured over estimated rises. Runs leave no folder
    and are not tracked.

    Args:
        job: that is planned.
        tables: its logical tables.
        evidence: of the estimates to correct.
        methods: to try.
        epochs: passes over the training split for each run.
    """
    by_loss = dataclasses.replace(job, train=dataclasses.replace(job.train, monitor="logloss"))

    def logloss(policy: Policy) -> float:
        return float(untracked_training(by_loss, tables, policy, epochs)["logloss"])

    ratios: dict[str, list[float]] = defaultdict(list)
    full: float | None = None
    for name in methods:
        if name == "full":
            continue
        try:
            menu = make_menu(job, tables, evidence, "training", methods=["full", name])
        except UserError:
            continue
        for share in SHARES:
            dishes = uniform(menu.items, name, share)
            estimate = sum(dish.estimate.loss for dish in dishes)
            if estimate < _LEAST:
                continue
            if full is None:
                full = logloss(alone(Full(), make_rule("full", job.embedding).options))
            measured = logloss(joined([dish.candidate for dish in dishes])) - full
            ratios[name].append(min(max(measured / estimate, _BOUNDS[0]), _BOUNDS[1]))
    return scales_of(ratios)


def scales_of(ratios: Mapping[str, Sequence[float]]) -> Scales:
    """Returns the factors of measured over estimated rises."""
    logs = {name: [math.log(ratio) for ratio in found] for name, found in ratios.items() if found}
    return Scales(
        factors={name: math.exp(statistics.fmean(found)) for name, found in logs.items()},
        spread={n: statistics.stdev(found) if len(found) > 1 else 0.0 for n, found in logs.items()},
    )


def uniform(items: Sequence[Item], name: str, share: float) -> list[Dish]:
    """Returns for each table the candidate of a method that comes nearest to a share of its bytes.

    A table that cannot have the method keeps the candidate of most bytes.
    """
    found = []
    for item in items:
        own = [dish for dish in item.dishes if dish.candidate.name == name]
        most = item.dishes[-1]
        target = math.log(share * most.candidate.sizes.training)

        def distance(dish: Dish, target: float = target) -> float:
            return abs(math.log(dish.candidate.sizes.training) - target)

        found.append(min(own, key=distance) if own else most)
    return found
