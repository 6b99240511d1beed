"""The menu of a plan: every table's candidates with their estimates, and groups that share rows."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.method import Method, method_class, method_name
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.policy import Policy, Rule, make_rule
from recsys_compress.compress.size import DATA_TYPE_BITS, DataType
from recsys_compress.config import Job
from recsys_compress.errors import UserError, nearest
from recsys_compress.plan.candidates import (
    STORAGE,
    Candidate,
    Purpose,
    Wanted,
    candidate,
    methods_for,
)
from recsys_compress.plan.curves import Estimate, Evidence, Scales
from recsys_compress.plan.ranks import largest_that_fits
from recsys_compress.plan.solver import Choice, Options

# What free tables may have unless told otherwise; and what they may have when asked for.
METHODS = (
    "full",
    "low_rank",
    "group_reduce",
    "quotient_remainder",
    "hash",
    "dnis",
    "dynamic_sparse",
    "unified",
)
ALLOWED = (*METHODS, "double_hash", "mixed_dim")
# Of several tables under one rule these make something else than of each alone: rows or blocks that
# all share, or widths that follow from their sizes.
_TOGETHER = ("unified", "dynamic_sparse", "mixed_dim")
_GROUPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)  # members of groups that are tried
_STEP, _STEPS = 0.8, 20  # by which a method for all tables is made smaller until it fits


@dataclass(frozen=True, kw_only=True)
class Dish:
    """A candidate with what it is expected to cost."""

    candidate: Candidate
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table, or several that are lowered together, and what they may become.

    Attributes:
        tables: names of the logical tables.
        dishes: undominated candidates, by rising bytes.
        why: what limits them, for the report; empty where nothing does.
        others: those that would be undominated if one of the methods were left out.
    """

    tables: tuple[str, ...]
    dishes: tuple[Dish, ...]
    why: str = ""
    others: tuple[Dish, ...] = ()

    def without(self, method: str, purpose: Purpose) -> "Item":
        """Returns the item without a method's candidates."""
        left = [d for d in (*self.dishes, *self.others) if d.candidate.name != method]
        return dataclasses.replace(self, dishes=undominated(left, purpose), others=())

    def options(self, purpose: Purpose) -> Options:
        """Returns the candidates' bytes and losses."""
        return Options(
            costs=np.array([d.candidate.sizes.of(purpose) for d in self.dishes], dtype=np.float64),
            losses=np.array([dish.estimate.loss for dish in self.dishes]),
        )


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What there is to choose from.

    Attributes:
        items: one for each table, or for all tables of a rule that makes one thing of them.
        groups: sets of tables that may share rows, of which a plan has one at most.
        free: the tables that may have any method.
        cook: makes more of it.
    """

    items: tuple[Item, ...]
    groups: tuple[Item, ...]
    free: tuple[EmbeddingBagConfig, ...]
    cook: "Cook"

    @property
    def purpose(self) -> Purpose:
        """Which bytes count."""
        return self.cook.purpose

    def alternatives(self) -> list[list[Item]]:
        """Returns the ways to cover all tables: by the items, or with a group in place of some."""
        found = [list(self.items)]
        for group in self.groups:
            rest = [item for item in self.items if not set(item.tables) & set(group.tables)]
            found.append([*rest, group])
        return found

    def without(self, method: str) -> "Menu | None":
        """Returns the menu without a method; None if a table could become nothing then."""
        items, groups = (
            tuple(item.without(method, self.purpose) for item in given)
            for given in (self.items, self.groups)
        )
        if not all(item.dishes for item in items):
            return None
        groups = tuple(group for group in groups if group.dishes)
        return dataclasses.replace(self, items=items, groups=groups)

    def best(
        self, solve: Callable[[list[Options]], Choice | None], value: Callable[[Choice], float]
    ) -> tuple[list[Item], Choice] | None:
        """Returns the items and the choice of least value over all alternatives.

        The bound of the choice is that of all alternatives together.
        """
        solved = []
        for items in self.alternatives():
            choice = solve([item.options(self.purpose) for item in items])
            if choice is not None:
                solved.append((items, choice))
        if not solved:
            return None
        items, choice = min(solved, key=lambda pair: value(pair[1]))
        bound = min(choice.bound for _, choice in solved)
        return items, dataclasses.replace(choice, bound=bound)


def undominated(dishes: Sequence[Dish], purpose: Purpose) -> tuple[Dish, ...]:
    """Returns the dishes than which none of fewer bytes loses less, by rising bytes."""
    kept: list[Dish] = []
    for dish in sorted(dishes, key=lambda d: (d.candidate.sizes.of(purpose), d.estimate.loss)):
        if not kept or dish.estimate.loss < kept[-1].estimate.loss:
            kept.append(dish)
    return tuple(kept)


def make_menu(
    job: Job,
    tables: Sequence[EmbeddingBagConfig],
    evidence: Evidence,
    purpose: Purpose,
    *,
    methods: Sequence[str] = METHODS,
    adopting: bool = False,
    scales: Scales | None = None,
) -> Menu:
    """Returns what a job's tables may become.

    The job's rules are kept: a table that a rule names has that rule's method, and one with fewer
    than `embedding.min_rows` rows stays full. Knobs that the job gives a method hold for its
    candidates, but for those that a budget decides.

    Args:
        job: the job.
        tables: its logical tables.
        evidence: for the estimates.
        purpose: which bytes count. But for serving, nothing is stored in another type than fp32.
        methods: that free tables may have.
        adopting: whether training is to begin with the evidence's trained tables.
        scales: corrections of the estimates; None for none.

    Raises:
        UserError: a method is unknown, or a table is left without any candidate.
    """
    for name in methods:
        if name not in ALLOWED:
            raise UserError(f"--methods: {name!r} is unknown; {nearest(name, ALLOWED)}")
    cook = Cook(
        job=job,
        evidence=evidence,
        storage=STORAGE if purpose == "serving" else ("fp32",),
        purpose=purpose,
        adopting=adopting,
        scales=scales or Scales(),
    )
    items: list[Item] = []
    free: list[EmbeddingBagConfig] = []
    for members, wanted, why in _wanted(job, tables, methods):
        items.append(cook.item(members, wanted, why))
        _check_any(items[-1], wanted)
        free += [] if why else members
    sharing = [make_rule(m, job.embedding) for m in methods if method_class(m).across_tables]
    groups = []
    if sharing:
        # Tables whose bytes are worth least come first: they have least to lose by sharing.
        free.sort(key=lambda t: evidence.worth(t) / (t.num_embeddings * t.embedding_dim))
        for count in sorted({n for n in (*_GROUPS, len(free)) if 1 < n <= len(free)}):
            group = cook.item(free[:count], [Wanted(rule=rule) for rule in sharing])
            if group.dishes:
                groups.append(group)
    return Menu(items=tuple(items), groups=tuple(groups), free=tuple(free), cook=cook)


@dataclass(frozen=True, kw_only=True)
class Cook:
    """Makes items and dishes; see `make_menu`."""

    job: Job
    evidence: Evidence
    storage: Sequence[DataType]
    purpose: Purpose
    adopting: bool
    scales: Scales

    def item(
        self, tables: Sequence[EmbeddingBagConfig], wanted: Sequence[Wanted], why: str = ""
    ) -> Item:
        """Returns tables that are lowered together with what they may become, perhaps nothing."""
        found = [dish for each in wanted for dish in self._all(tables, each)]
        dishes = undominated(found, self.purpose)
        kept = {id(dish) for dish in dishes}
        others = {
            id(dish): dish
            for method in {dish.candidate.name for dish in dishes}
            for dish in undominated([d for d in found if d.candidate.name != method], self.purpose)
            if id(dish) not in kept
        }
        return Item(
            tables=tuple(table.name for table in tables),
            dishes=dishes,
            why=why,
            others=tuple(others.values()),
        )

    def uniform(
        self, tables: Sequence[EmbeddingBagConfig], method: str, budget: int
    ) -> Iterator[Dish]:
        """Yields a method for all tables alike in each storage type, as large as a budget holds."""
        rule = make_rule(method, dataclasses.replace(self.job.embedding, budget=None, plan=None))
        whole = isinstance(rule.method, Full)
        for storage in self.storage:
            size = 0 if whole else self._largest(tables, rule, budget, storage)
            if size is not None:
                wanted = Wanted(rule=rule, is_fixed=whole)
                for dish in self._all(tables, wanted, budgets=[size], storage=[storage]):
                    if dish.candidate.sizes.of(self.purpose) <= budget:
                        yield dish

    def _largest(
        self, tables: Sequence[EmbeddingBagConfig], rule: Rule, budget: int, storage: DataType
    ) -> int | None:
        """Returns the parameter bytes in training of a method that keeps to a budget."""
        method = rule.method.in_one_stage(adopting=self.adopting)
        optimizer = self.job.train.optimizer

        def fits(size: int) -> bool:
            try:
                fitted = method.fit(tables, size, rule.options)
                (own,) = candidate(tables, fitted, rule.options, optimizer, [storage])
            except UserError:
                return False  # out of reach
            return own.sizes.of(self.purpose) <= budget

        # No form takes fewer bytes than its values; scales and optimizer state come on top.
        size = budget * DATA_TYPE_BITS["fp32"] // DATA_TYPE_BITS[storage]
        for _ in range(_STEPS):
            if fits(smaller := int(size * _STEP)):
                return largest_that_fits(fits, smaller, size)
            size = smaller
        return None

    def _all(
        self,
        tables: Sequence[EmbeddingBagConfig],
        wanted: Wanted,
        *,
        budgets: Sequence[int] = (),
        storage: Sequence[DataType] = (),
    ) -> Iterator[Dish]:
        optimizer, storage = self.job.train.optimizer, storage or self.storage
        trained, adopting = self.evidence.trained, self.adopting
        for method, values in methods_for(
            tables, wanted, trained, adopting=adopting, budgets=budgets
        ):
            try:
                candidates = candidate(tables, method, wanted.rule.options, optimizer, storage)
                estimates = self.evidence.estimates(tables, candidates, values)
            except UserError:  # it does not suit the tables, or a type not their values
                if wanted.is_fixed:
                    raise
                continue
            for each, estimate in zip(candidates, estimates, strict=True):
                yield Dish(candidate=each, estimate=self.scales.apply(method, estimate))


def _wanted(
    job: Job, tables: Sequence[EmbeddingBagConfig], methods: Sequence[str]
) -> list[tuple[tuple[EmbeddingBagConfig, ...], list[Wanted], str]]:
    """Returns tables with the methods that they may have, and why no others.

    Each table is alone but where a rule of the job makes one thing of several.
    """
    embedding = dataclasses.replace(job.embedding, budget=None, plan=None)
    policy = Policy.from_config(embedding)
    free = [Wanted(rule=make_rule(name, embedding)) for name in methods]
    named = {id(rule) for rule in policy.rules}
    found: list[tuple[tuple[EmbeddingBagConfig, ...], list[Wanted], str]] = []
    for assignment in policy.assign(tables):
        rule, members = assignment.rule, assignment.tables
        if id(rule) in named and _go_together(rule.method, members):
            whole = _is_whole(rule.method, members)
            found.append((members, [Wanted(rule=rule, is_fixed=whole)], "set by embedding.rules"))
            continue
        for table in members:
            if id(rule) in named:
                whole = _is_whole(rule.method, [table])
                wanted, why = [Wanted(rule=rule, is_fixed=whole)], "set by embedding.rules"
            elif rule is not policy.default and table.num_embeddings < policy.min_rows:
                why = f"fewer than {policy.min_rows} rows"
                wanted = [Wanted(rule=rule, is_fixed=True)]
            else:
                wanted, why = free, ""
            found.append(((table,), wanted, why))
    places = {table.name: place for place, table in enumerate(tables)}
    return sorted(found, key=lambda each: places[each[0][0].name])


def _check_any(item: Item, wanted: Sequence[Wanted]) -> None:
    """Refuses tables that may become nothing."""
    if not item.dishes:
        methods = ", ".join(sorted({method_name(w.rule.method) for w in wanted}))
        tables = ", ".join(repr(name) for name in item.tables)
        several = len(item.tables) > 1
        raise UserError(
            f"{'tables' if several else 'table'} {tables}: none of the methods "
            f"{'they' if several else 'it'} may have ({methods}) suits "
            f"{'them' if several else 'it'}; allow 'full' or change embedding.rules"
        )


def _go_together(method: Method, tables: Sequence[EmbeddingBagConfig]) -> bool:
    """Whether a method makes of several tables what it cannot make of each alone."""
    if method_name(method) in _TOGETHER:
        return True
    # Knobs that name the tables, like ranks, suit no table alone.
    alone = all(_is_whole(method, [table]) for table in tables)
    return not alone and _is_whole(method, tables)


def _is_whole(method: Method, tables: Sequence[EmbeddingBagConfig]) -> bool:
    """Whether the job gives the method all the knobs it needs for tables."""
    if isinstance(method, Full):
        return True
    try:
        method.lower(tables)
    except UserError:
        return False
    return True


def chosen(items: Sequence[Item], choice: Choice) -> Mapping[tuple[str, ...], Dish]:
    """Returns the dish of each item that a choice takes."""
    return {
        item.tables: item.dishes[option]
        for item, option in zip(items, choice.options.tolist(), strict=True)
    }
