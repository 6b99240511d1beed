"""A job and a budget in, the best plan for its tables out."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.byte_sizes import budget_bytes
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.planned import PlanFile
from recsys_compress.compress.policy import Policy, make_rule
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import Purpose, Sizes, alone, joined, size_of
from recsys_compress.plan.evidence import gather
from recsys_compress.plan.menu import Dish, Item, Menu, chosen, make_menu
from recsys_compress.plan.plan import PLAN, Plan, rows, summary
from recsys_compress.plan.promise import Attempt, kept, tightened
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.ranks import Cluster, largest_that_fits
from recsys_compress.plan.reference import short_run
from recsys_compress.plan.request import Request
from recsys_compress.plan.solver import Choice, Options, cheapest, frontier, solve
from recsys_compress.plan.trials import Measure, Trial, Way
from recsys_compress.train.build import logical_tables, lowered
from recsys_compress.train.shard import process_group

# The budget, and the items with their best options.
Solved = tuple[int | None, list[Item], Choice]

_CURVE_POINTS = 100
_MORE = 1.1  # of the budget, for what a little more would buy
_UNCOMPRESSED = "full"
_TRIED = 4  # ways to store all tables that are tried out, but for plans without one method


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that plans of one job for one purpose have in common.

    Attributes:
        job: the job.
        request: what was asked; reference and grade are settled.
        dataset: the job's data.
        tables: the logical tables.
        worths: by table, the loss if all its ids had one vector.
        quality: what a rise of the logloss does to the AUC; None for the grade "data".
        measure: tries a policy out on validation; None for the grade "data".
        menu: what the tables may become.
        full: exact bytes of full tables in fp32.
    """

    job: Job
    request: Request
    dataset: PreparedDataset
    tables: Sequence[EmbeddingBagConfig]
    worths: Mapping[str, float]
    quality: AucByLoss | None
    measure: Measure | None
    menu: Menu
    full: Sizes


def make_plan(job: Job, request: Request) -> Plan:
    """Plans a job's tables.

    Args:
        job: the job; its rules and `min_rows` are kept, its `method` and `budget` are not looked
            at.
        request: what is asked.

    Raises:
        UserError: the budget is out of reach, the job or the reference run does not suit the data,
            or the plan cannot be built.
    """
    with process_group():  # one for all that is read and trained, and TorchRec stays quiet in it
        common = prepare(job, request)
        return plan_within(common, common.request)


def prepare(job: Job, request: Request) -> Prepared:
    """Gathers the evidence and makes the menu, whatever the budget.

    Raises:
        UserError: the job or the reference run does not suit the data.
    """
    if job.train.threads:
        torch.set_num_threads(job.train.threads)
    dataset = PreparedDataset.open(job.data.path)
    tables = logical_tables(dataset.schema, job.embedding.dim)
    if request.grade != "data" and request.reference is None:
        request = replace(request, reference=short_run(job, request.probe_epochs))
    gathered = gather(job, dataset, tables, request)
    return Prepared(
        job=job,
        request=request,
        dataset=dataset,
        tables=tables,
        worths={table.name: gathered.evidence.worth(table) for table in tables},
        quality=gathered.quality,
        measure=gathered.measure,
        menu=make_menu(
            job,
            tables,
            gathered.evidence,
            request.purpose,
            methods=request.methods,
            adopting=request.adopting,
            scales=gathered.scales,
        ),
        full=size_of(lowered(job, dataset.schema, _full(job)), job.train.optimizer),
    )


def plan_within(common: Prepared, request: Request) -> Plan:
    """Returns the best plan of what was prepared.

    Args:
        common: made for the same purpose, grade and methods.
        request: with its budget, or the AUC that it may lose.

    Raises:
        UserError: the budget is out of reach, or the plan cannot be built.
    """
    job, menu = common.job, common.menu
    cluster = None
    if request.world_size is not None:
        cluster = Cluster.of(job, request.world_size, request.hbm)
    asked, items, choice = solved = _solved(menu, request, common.full, common.quality)
    budget = asked
    try:
        way = _way(common, PLAN, chosen(items, choice), cluster)
    except UserError as error:
        if cluster is None:
            raise
        budget, items, choice = _smaller(common, cluster, solved, error)
        way = _way(common, PLAN, chosen(items, choice), cluster)
    trials = _tried(common, way, budget, cluster)
    if trials and asked is None:
        first = Attempt(items=items, choice=choice, trial=trials[0])
        best, trials = _tightened(common, request, first, cluster)
        items, choice, way = best.items, best.choice, best.trial.way
    elif trials:
        way = max(trials, key=lambda trial: job.train.score(trial.valid)).way
    _check(
        way.sizes, [dish.candidate.sizes for dish in way.dishes.values()], request.purpose, budget
    )
    path = frontier([item.options(menu.purpose) for item in items])
    points = np.unique(np.linspace(0, len(path.costs) - 1, _CURVE_POINTS).astype(int))
    plan = Plan(
        request=request,
        way=way,
        trials=trials,
        whys={item.tables: item.why for item in items},
        worths=common.worths,
        full=common.full,
        choice=replace(choice, loss=way.loss),
        budget=budget,
        asked=asked,
        more=_more(common, int(_MORE * (budget or choice.cost)), cluster),
        curve=[(float(path.costs[i]), float(path.losses[i])) for i in points],
        quality=common.quality,
        file=PlanFile.of(
            way.policy,
            common.tables,
            job.embedding.optimizer,
            needs_start=request.adopting and _differ(job, way.dishes.values()),
        ),
    )
    file = replace(plan.file, summary=summary(plan), tables=tuple(rows(plan)))
    return replace(plan, file=file)


def _way(
    common: Prepared, name: str, dishes: Mapping[tuple[str, ...], Dish], cluster: Cluster | None
) -> Way:
    """Returns dishes for all tables, lowered together.

    Raises:
        UserError: the processes cannot hold them.
    """
    policy = joined([dish.candidate for dish in dishes.values()])
    collection = lowered(common.job, common.dataset.schema, policy)
    sizes = size_of(collection, common.job.train.optimizer)
    fullest = None if cluster is None else cluster.fullest(collection, sizes)
    return Way(name=name, dishes=dishes, policy=policy, sizes=sizes, fullest=fullest)


def _tried(common: Prepared, way: Way, budget: int | None, cluster: Cluster | None) -> list[Trial]:
    """Returns the plan, and others that are likely within its budget, measured.

    What is predicted adds up over tables, and is least to be trusted where much is lost, for some
    methods less than for others. So a policy of one method may do better, or a plan that does
    without one, and is planned instead. The latter are left out where a trial is a whole training.
    """
    if common.measure is None:
        return []
    ways = [way, *itertools.islice(_rivals(common, way, budget, cluster), _TRIED - 1)]
    if common.request.adopting:
        ways += _without(common, way, budget, cluster)
    return [Trial(way=each, valid=common.measure(each.policy)) for each in ways]


def _tightened(
    common: Prepared, request: Request, first: Attempt, cluster: Cluster | None
) -> tuple[Attempt, list[Trial]]:
    """Returns the smallest plan that is measured to lose no more than it may, and all trials."""
    measure, quality = common.measure, common.quality
    if measure is None or quality is None or request.max_auc_loss is None:
        raise ValueError("nothing to measure a plan by AUC with")

    def solved(most: float) -> tuple[list[Item], Choice, Way] | None:
        try:
            asked = replace(request, max_auc_loss=most)
            _, items, choice = _solved(common.menu, asked, common.full, quality)
            name = f"{PLAN} of a predicted {most:.2g}"
            return items, choice, _way(common, name, chosen(items, choice), cluster)
        except UserError:
            return None  # out of reach, or processes cannot hold it

    attempts = tightened(first, request.max_auc_loss, quality, solved, measure)
    best = kept(attempts, request.max_auc_loss, quality)
    return best, [attempt.trial for attempt in attempts]


def _rivals(
    common: Prepared, way: Way, budget: int | None, cluster: Cluster | None
) -> Iterator[Way]:
    """Yields policies of one method for all free tables, by rising predicted loss."""
    menu = common.menu
    free = tuple(table.name for table in menu.free)
    held = {tables: dish for tables, dish in way.dishes.items() if tables[0] not in free}
    if budget is None or len(free) < 2:
        return
    left = budget - sum(dish.candidate.sizes.of(menu.purpose) for dish in held.values())
    found = [
        dish
        for method in common.request.methods
        for dish in menu.cook.uniform(menu.free, method, left)
    ]
    for dish in sorted(found, key=lambda dish: dish.estimate.loss):
        candidate = dish.candidate
        label = f"{candidate.name} {candidate.options.storage}"
        # Processes may not be able to hold it.
        with contextlib.suppress(UserError):
            yield _way(common, label, {**held, free: dish}, cluster)


def _without(
    common: Prepared, way: Way, budget: int | None, cluster: Cluster | None
) -> Iterator[Way]:
    """Yields the plans that do without one of the plan's methods."""
    used = {dish.candidate.name for dish in way.dishes.values()}
    for name in sorted(used - {_UNCOMPRESSED}):
        menu = common.menu.without(name)
        found = None if menu is None or budget is None else _best(menu, budget)
        if found is not None:
            with contextlib.suppress(UserError):  # processes may not be able to hold it
                yield _way(common, f"{PLAN} without {name}", chosen(*found), cluster)


def _smaller(common: Prepared, cluster: Cluster, solved: Solved, error: UserError) -> Solved:
    """Returns what is solved for the largest budget whose plan processes can hold.

    Its bound stays that of the budget asked for, so that the gap tells what they cost at most.

    Args:
        common: what was prepared.
        cluster: the processes.
        solved: what they cannot hold.
        error: says so.

    Raises:
        UserError: no budget's plan fits, or AUC was asked for.
    """
    menu, (asked, _, choice) = common.menu, solved

    def fits(budget: int) -> bool:
        found = _best(menu, budget)
        if found is None:
            return False
        try:
            _way(common, PLAN, chosen(*found), cluster)
        except UserError:
            return False
        return True

    least = int(min(_extremes(menu, lambda options: float(options.costs.min()))))
    budget = largest_that_fits(fits, least, int(choice.cost))
    found = None if budget is None else _best(menu, budget)
    if found is None:
        raise UserError(f"{error}; no smaller plan fits either") from error
    if asked is None:
        raise UserError(f"{error}; --budget {budget} fits") from error
    items, smaller = found
    return budget, items, replace(smaller, bound=choice.bound)


def _more(common: Prepared, budget: int, cluster: Cluster | None) -> tuple[int, float] | None:
    """Returns a larger budget and the loss of its plan; None where processes cannot hold it."""
    found = _best(common.menu, budget)
    if found is None:
        raise ValueError(f"no plan within {budget:,} bytes")
    if cluster is not None:
        try:
            _way(common, PLAN, chosen(*found), cluster)
        except UserError:
            return None
    return budget, found[1].loss


def _best(menu: Menu, budget: int) -> tuple[list[Item], Choice] | None:
    """Returns the items and the choice of least loss within a budget; None where none fits."""
    return menu.best(lambda options: solve(options, budget), lambda choice: choice.loss)


def _differ(job: Job, dishes: Iterable[Dish]) -> bool:
    """Whether a method has another form where it begins with trained tables."""
    names = {dish.candidate.name for dish in dishes}
    methods = [make_rule(name, job.embedding).method for name in names]
    return any(m.in_one_stage(adopting=True) != m.in_one_stage(adopting=False) for m in methods)


def _full(job: Job) -> Policy:
    """Returns the policy of full tables."""
    rule = make_rule("full", job.embedding)
    return alone(Full(), replace(rule.options, storage="fp32"))


def _solved(menu: Menu, request: Request, full: Sizes, quality: AucByLoss | None) -> Solved:
    """Returns the budget, and the items with their best options.

    Raises:
        UserError: what is asked is out of reach.
    """
    if request.budget is not None:
        budget = budget_bytes(request.budget, full.of(request.purpose))
        found = _best(menu, budget)
        if found is None:
            least = min(_extremes(menu, lambda options: float(options.costs.min())))
            raise UserError(
                f"budget of {budget:,} bytes is out of reach: these tables take at least "
                f"{int(least):,} for {request.purpose}; raise it, allow more methods, or free "
                "tables that embedding.rules or embedding.min_rows hold"
            )
        return budget, *found
    if quality is None or request.max_auc_loss is None:
        raise ValueError("a plan by AUC needs a reference run")
    most = quality.rise(request.max_auc_loss)
    found = menu.best(lambda options: cheapest(options, most), lambda choice: choice.cost)
    if found is None:
        least = min(_extremes(menu, lambda options: float(options.losses.min())))
        lost = quality.auc(0.0) - quality.auc(least)
        raise UserError(
            f"--max-auc-loss {request.max_auc_loss}: out of reach; the best plan is expected to "
            f"lose {lost:.4f}; raise it, or free tables that embedding.rules hold"
        )
    items, choice = found
    # The solver's bound and gap are of the bytes then; the report's are of the loss.
    return None, items, replace(choice, bound=choice.loss)


def _extremes(menu: Menu, of: Callable[[Options], float]) -> list[float]:
    """Returns for each alternative the sum over its items of a figure."""
    return [sum(of(item.options(menu.purpose)) for item in items) for items in menu.alternatives()]


def _check(whole: Sizes, parts: Sequence[Sizes], purpose: Purpose, budget: int | None) -> None:
    """Compares the bytes of the lowered plan with those that it was made of.

    Raises:
        RuntimeError: they differ, which would be our fault. Merging saves the step counts of
            optimizers, so optimizer bytes may be fewer.
    """
    sums = Sizes(
        parameters=sum(part.parameters for part in parts),
        optimizer=sum(part.optimizer for part in parts),
        serving=sum(part.serving for part in parts),
    )
    exact = whole.parameters == sums.parameters and whole.serving == sums.serving
    if purpose != "serving":
        exact = whole.parameters == sums.parameters
    if not exact or whole.optimizer > sums.optimizer:
        raise RuntimeError(f"the plan takes {whole}, its tables alone {sums}")
    if budget is not None and whole.of(purpose) > budget:
        raise RuntimeError(f"the plan takes {whole.of(purpose):,} bytes of {budget:,}")
