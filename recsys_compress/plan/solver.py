"""Which option each table takes: the multiple-choice knapsack problem, with a proven gap.

The Lagrangian relaxation gives a bound and a good choice at once, for any number of tables. Options
whose reduced cost exceeds the gap between the two cannot be in a better choice and are dropped
(Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 1979). What is left
is solved by dynamic programming over undominated partial choices, cut by the same bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_STATES = 20_000  # partial choices kept at a time; where it is reached, the gap may stay open
_ROUNDING = 1e-12  # of the sum of losses: what float64 may lose in summing them

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """What a table may become: (O,) costs, and (O,) losses, of the same options."""

    costs: Floats
    losses: Floats


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An option for each table.

    Attributes:
        options: (T,) number of each table's option.
        cost: sum of their costs.
        loss: sum of their losses.
        bound: no choice within the budget has less loss than this.
    """

    options: Ints
    cost: float
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much less the loss of another choice could be, at most."""
        return max(self.loss - self.bound, 0.0)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The best choices in the relaxation, from the cheapest to the least loss.

    Attributes:
        costs: (S + 1,) sums of costs, rising.
        losses: (S + 1,) sums of losses, falling.
        slopes: (S,) loss saved for a unit of cost by each step, falling.
        tables: (S,) the table that each step is of.
        before: (S,) the option from which it leads.
        after: (S,) the option to which it leads.
        first: (T,) each table's option in the cheapest choice.
    """

    costs: Floats
    losses: Floats
    slopes: Floats
    tables: Ints
    before: Ints
    after: Ints
    first: Ints

    def bound(self, budgets: Floats) -> Floats:
        """Returns the least loss in the relaxation for each budget; infinite below the cheapest."""
        found = np.interp(budgets, self.costs, self.losses)
        return np.where(budgets < self.costs[0] - _slack(self.costs[0]), np.inf, found)

    def choice(self, steps: int) -> Ints:
        """Returns (T,) options after so many steps."""
        options = self.first.copy()
        options[self.tables[:steps]] = self.after[:steps]  # a table's steps come in their order
        return options


def frontier(items: Sequence[Options]) -> Frontier:
    """Returns the relaxation's best choices at every budget.

    Each table alone has a lower convex hull of (cost, loss); the steps of all hulls, steepest
    first, are the choices.
    """
    hulls = [_hull(item) for item in items]
    firsts = np.array([hull[0] for hull in hulls], dtype=np.int64)
    tables = np.repeat(np.arange(len(items)), [len(hull) - 1 for hull in hulls])
    before = np.concatenate([hull[:-1] for hull in hulls]).astype(np.int64)
    after = np.concatenate([hull[1:] for hull in hulls]).astype(np.int64)
    costs = np.concatenate([np.diff(item.costs[h]) for item, h in zip(items, hulls, strict=True)])
    losses = np.concatenate([np.diff(item.losses[h]) for item, h in zip(items, hulls, strict=True)])
    slopes = -losses / costs
    # Stable, so that the steps of one table, whose slopes fall, stay in order.
    order = np.argsort(-slopes, kind="stable")
    start_cost = sum(item.costs[h[0]] for item, h in zip(items, hulls, strict=True))
    start_loss = sum(item.losses[h[0]] for item, h in zip(items, hulls, strict=True))
    return Frontier(
        costs=np.concatenate([[start_cost], start_cost + np.cumsum(costs[order])]),
        losses=np.concatenate([[start_loss], start_loss + np.cumsum(losses[order])]),
        slopes=slopes[order],
        tables=tables[order],
        before=before[order],
        after=after[order],
        first=firsts,
    )


def solve(items: Sequence[Options], budget: float) -> Choice | None:
    """Returns the options of least total loss whose total cost is within the budget.

    Args:
        items: the tables, each with at least one option; costs and losses are finite, and losses
            may be of any sign.
        budget: most total cost.

    Returns:
        None where even the cheapest options cost more.
    """
    path = frontier(items)
    if path.costs[0] > budget + _slack(budget):
        return None
    steps = int(np.searchsorted(path.costs, budget + _slack(budget), side="right")) - 1
    options = path.choice(steps)
    bound = float(path.bound(np.array([min(budget, path.costs[-1])]))[0])
    if steps == len(path.slopes):
        return _choice(items, options, bound)
    _fill(items, options, budget, path, steps)
    greedy = _choice(items, options, bound)
    kept = _reduced(items, budget, path.slopes[steps], greedy.loss)
    return _exact(items, kept, budget, greedy)


def cheapest(items: Sequence[Options], most_loss: float) -> Choice | None:
    """Returns the options of least total cost whose total loss is at most `most_loss`.

    Returns:
        None where even the best options lose more. `loss` and `cost` are as in `items`; `bound` is
        of the cost here.
    """
    swapped = [Options(costs=item.losses, losses=item.costs) for item in items]
    found = solve(swapped, most_loss)
    if found is None:
        return None
    return Choice(options=found.options, cost=found.loss, loss=found.cost, bound=found.bound)


def _hull(item: Options) -> Ints:
    """Returns the options on the lower convex hull, cheapest first."""
    order = np.lexsort((item.losses, item.costs))
    hull: list[int] = []
    costs, losses = item.costs.tolist(), item.losses.tolist()
    for option in order.tolist():
        if hull and losses[option] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise = (losses[a] - losses[b]) * (costs[option] - costs[a])
            if rise > (losses[a] - losses[option]) * (costs[b] - costs[a]):
                break
            hull.pop()
        if hull and costs[option] <= costs[hull[-1]]:
            hull.pop()  # equal cost and more loss; only where rounding ties
        hull.append(option)
    return np.array(hull, dtype=np.int64)


def _fill(
    items: Sequence[Options], options: Ints, budget: float, path: Frontier, steps: int
) -> None:
    """Spends what is left of the budget, in place: the next steps that still fit."""
    left = budget - path.costs[steps]
    for step in range(steps, len(path.slopes)):
        table, after = int(path.tables[step]), int(path.after[step])
        if options[table] != path.before[step]:
            continue  # an earlier step of this table did not fit
        cost = items[table].costs[after] - items[table].costs[options[table]]
        if cost <= left:
            options[table] = after
            left -= cost


def _reduced(items: Sequence[Options], budget: float, slope: float, incumbent: float) -> list[Ints]:
    """Returns for each table the options that a choice better than the incumbent may have."""
    reduced = [item.losses + slope * item.costs for item in items]
    least = np.array([costs.min() for costs in reduced])
    room = incumbent - (float(least.sum()) - slope * budget)
    room += _ROUNDING * sum(float(np.abs(item.losses).max()) for item in items)
    return [np.flatnonzero(costs - low <= room) for costs, low in zip(reduced, least, strict=True)]


def _exact(items: Sequence[Options], kept: Sequence[Ints], budget: float, greedy: Choice) -> Choice:
    """Returns the best choice among the kept options, by extending undominated partial ones."""
    open_ = [table for table, options in enumerate(kept) if len(options) > 1]
    options = np.array([int(own[0]) for own in kept], dtype=np.int64)
    fixed = [table for table, own in enumerate(kept) if len(own) == 1]
    cost = sum(float(items[t].costs[options[t]]) for t in fixed)
    loss = sum(float(items[t].losses[options[t]]) for t in fixed)
    # Tables whose options differ most come first: partial choices are told apart early.
    open_.sort(key=lambda t: -float(np.ptp(items[t].losses[kept[t]])))
    rest = [Options(items[t].costs[kept[t]], items[t].losses[kept[t]]) for t in open_]
    costs, losses = np.array([cost]), np.array([loss])
    trail: list[tuple[Ints, Ints]] = []
    dropped = np.inf  # least bound of what was dropped for want of room
    limit = budget + _slack(budget)
    for position, item in enumerate(rest):
        parents = np.repeat(np.arange(len(costs)), len(item.costs))
        picks = np.tile(np.arange(len(item.costs)), len(costs))
        costs = costs[parents] + item.costs[picks]
        losses = losses[parents] + item.losses[picks]
        ahead = rest[position + 1 :]
        bounds = losses.copy()
        if ahead:
            bounds += frontier(ahead).bound(limit - costs)
        else:
            bounds[costs > limit] = np.inf
        may = np.flatnonzero(bounds < greedy.loss)
        order = may[np.lexsort((losses[may], costs[may]))]
        falling = np.minimum.accumulate(losses[order])
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = losses[order][1:] < falling[:-1]
        order = order[is_new]
        if len(order) > _STATES:
            by_bound = np.argsort(bounds[order], kind="stable")
            dropped = min(dropped, float(bounds[order[by_bound[_STATES]]]))
            order = order[np.sort(by_bound[:_STATES])]
        costs, losses = costs[order], losses[order]
        trail.append((parents[order], picks[order]))
        if not len(order):
            break
    if not len(costs) or not open_:
        # Nothing among what was looked at is better than the greedy choice.
        return _choice(items, greedy.options, max(greedy.bound, min(dropped, greedy.loss)))
    state = int(np.argmin(losses))
    for table, (parents, picks) in zip(reversed(open_), reversed(trail), strict=True):
        options[table] = kept[table][picks[state]]
        state = int(parents[state])
    best = _choice(items, options, greedy.bound)
    return _choice(items, options, max(greedy.bound, min(dropped, best.loss)))


def _choice(items: Sequence[Options], options: Ints, bound: float) -> Choice:
    cost = sum(float(item.costs[o]) for item, o in zip(items, options, strict=True))
    loss = sum(float(item.losses[o]) for item, o in zip(items, options, strict=True))
    return Choice(options=options, cost=cost, loss=loss, bound=min(bound, loss))


def _slack(budget: float) -> float:
    """Returns what rounding may add to sums of float64 that should equal the budget."""
    return 1e-12 * abs(budget)
