"""Which table gets which method, and how a byte budget is shared out among them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.byte_sizes import budget_bytes
from recsys_compress.compress.lowering import FP32_BYTES, TableOptions
from recsys_compress.compress.method import (
    Kept,
    Method,
    Trained,
    Values,
    method_class,
    method_name,
)
from recsys_compress.compress.methods.full import Full
from recsys_compress.config import EmbeddingConfig
from recsys_compress.errors import UserError
from recsys_compress.settings import parse


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A method, and how its physical tables are stored and trained.

    Attributes:
        method: the compression method.
        options: of its physical tables.
        table: regular expression that matches the whole name of the tables meant; None for all.
        budget_bytes: what the method was fitted to; None where it was not.
    """

    method: Method
    options: TableOptions = field(default_factory=TableOptions)
    table: str | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is no regular expression.

        Raises:
            UserError: `table` is none.
        """
        try:
            re.compile(self.table or "")
        except (re.error, OverflowError) as error:
            raise UserError(
                f"embedding.rules: table = {self.table!r} is no regular expression ({error}); "
                f"write '.*' for any characters, or {re.escape(self.table or '')!r} for that name"
            ) from None

    def matches(self, name: str) -> bool:
        """Whether the rule is meant for the table `name`."""
        return self.table is None or re.fullmatch(self.table, name) is not None


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Tables that are lowered together, by one rule."""

    rule: Rule
    tables: tuple[EmbeddingBagConfig, ...]


@dataclass(frozen=True, kw_only=True)
class PolicyPhase:
    """A stage of training, for all tables; see `Phase`."""

    name: str
    policy: "Policy"
    epochs: int | None
    rate: float
    freeze_model: bool
    search: bool


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Ordered rules; the first that matches a table wins.

    Attributes:
        default: rule of tables that no other rule names.
        rules: exceptions by name.
        min_rows: tables with fewer rows that no exception names are left full, with the default's
            options.
    """

    default: Rule
    rules: tuple[Rule, ...] = ()
    min_rows: int = 100

    def assign(self, tables: Sequence[EmbeddingBagConfig]) -> list[Assignment]:
        """Groups tables by the rule that holds for each.

        Raises:
            UserError: a rule matches no table.
        """
        for rule in self.rules:
            if not any(rule.matches(table.name) for table in tables):
                raise UserError(
                    f"embedding.rules: no table matches {rule.table!r}; "
                    f"tables: {', '.join(t.name for t in tables)}"
                )
        left_alone = Rule(method=Full(), options=self.default.options)
        groups: dict[int, tuple[Rule, list[EmbeddingBagConfig]]] = {}
        for table in tables:
            otherwise = left_alone if table.num_embeddings < self.min_rows else self.default
            rule = next((r for r in self.rules if r.matches(table.name)), otherwise)
            groups.setdefault(id(rule), (rule, []))[1].append(table)
        return [Assignment(rule=rule, tables=tuple(members)) for rule, members in groups.values()]

    def fit(self, tables: Sequence[EmbeddingBagConfig], budget: int) -> "Policy":
        """Returns the policy whose methods together take at most `budget` bytes.

        Full tables take what they need; the rest is shared among the other rules in proportion to
        the bytes that their tables would take in full.

        Raises:
            UserError: out of reach.
        """
        assignments = self.assign(tables)
        fixed = [a for a in assignments if isinstance(a.rule.method, Full)]
        spent = sum(
            t.num_embeddings * a.rule.options.row_bytes(t.embedding_dim)
            for a in fixed
            for t in a.tables
        )
        if spent > budget:
            raise UserError(
                f"budget of {budget:,} bytes is out of reach: the tables left full alone take "
                f"{spent:,}; raise the budget or compress more of them"
            )
        open_ = [a for a in assignments if a not in fixed]
        wanted = sum(full_bytes(a.tables) for a in open_)
        fitted = {}
        for a in open_:
            share = (budget - spent) * full_bytes(a.tables) // wanted
            method = a.rule.method.fit(a.tables, share, a.rule.options)
            fitted[id(a.rule)] = dataclasses.replace(a.rule, method=method, budget_bytes=share)
        return self._with(fitted)

    def phases(self) -> list[PolicyPhase]:
        """Returns the stages in which the methods train; a method of one stage is in all of them.

        Raises:
            UserError: two methods train in different stages.
        """
        rules = [self.default, *self.rules]
        by_rule = {id(rule): rule.method.phases() for rule in rules}
        staged = {tuple(p.name for p in found) for found in by_rule.values() if len(found) > 1}
        if len(staged) > 1:
            raise UserError(
                "embedding.rules: methods that train in different stages cannot go together: "
                f"{'; '.join(sorted(', '.join(names) for names in staged))}; use one of them"
            )
        longest = max(by_rule.values(), key=len)
        return [
            PolicyPhase(
                name=phase.name,
                epochs=phase.epochs,
                rate=phase.rate,
                freeze_model=phase.freeze_model,
                search=phase.search,
                policy=self._with(
                    {
                        id(rule): dataclasses.replace(rule, method=by_rule[id(rule)][number].method)
                        for rule in rules
                        if len(by_rule[id(rule)]) > 1
                    }
                ),
            )
            for number, phase in enumerate(longest)
        ]

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        before: "Policy",
        values: Sequence[Values],
        trained: Trained,
    ) -> tuple["Policy", list[Values]]:
        """Returns this policy fitted to trained tables, and what its tables begin with.

        Args:
            tables: the logical tables.
            before: the policy of the trained tables.
            values: theirs, in the order of `before`'s assignments.
            trained: the same tables as methods see them.

        Raises:
            UserError: a method cannot take over what another has trained, or vectors have another
                width than their table.
        """
        same = {
            tuple(t.name for t in a.tables): (a.rule.method, given)
            for a, given in zip(before.assign(tables), values, strict=True)
        }
        adopted, found = {}, []
        for a in self.assign(tables):
            method, given = same.get(tuple(t.name for t in a.tables), (None, Values()))
            if method != a.rule.method:  # else they are as they were
                _check_widths(a.tables, trained.widths)
                method, given = a.rule.method.adopt(
                    a.tables, trained, a.rule.budget_bytes, a.rule.options
                )
                adopted[id(a.rule)] = dataclasses.replace(a.rule, method=method)
            found.append(given)
        return self._with(adopted), found

    def in_one_stage(self, *, adopting: bool) -> "Policy":
        """Returns the policy whose methods train in one stage; see `Method.in_one_stage`."""
        return self._with(
            {
                id(rule): dataclasses.replace(
                    rule, method=rule.method.in_one_stage(adopting=adopting)
                )
                for rule in (self.default, *self.rules)
            }
        )

    def kept_parts(self, tables: Sequence[EmbeddingBagConfig]) -> Iterator[Kept]:
        """Yields what methods that choose by part keep."""
        for assignment in self.assign(tables):
            part = assignment.rule.method.kept_parts(assignment.tables)
            if part is not None:
                yield part

    def describe(self, tables: Sequence[EmbeddingBagConfig]) -> list[dict[str, Any]]:
        """Returns the assignments as plain data, of which `Policy.described` makes a policy."""
        return [
            {
                "tables": [table.name for table in assignment.tables],
                **describe(assignment.rule.method),
                "options": dataclasses.asdict(assignment.rule.options),
                "budget_bytes": assignment.rule.budget_bytes,
            }
            for assignment in self.assign(tables)
        ]

    @staticmethod
    def described(assignments: Sequence[Mapping[str, Any]], *, where: str) -> "Policy":
        """Returns the policy that `describe` wrote.

        Args:
            assignments: what it wrote.
            where: the file, for messages.

        Raises:
            UserError: it is not valid.
        """
        rules = []
        for assignment in assignments:
            knobs = dict(assignment)
            names, options = knobs.pop("tables"), knobs.pop("options")
            budget, kind = knobs.pop("budget_bytes", None), method_class(knobs.pop("method"))
            rules.append(
                Rule(
                    method=parse(kind, knobs, where=where),
                    options=parse(TableOptions, options, where=where),
                    table="|".join(re.escape(name) for name in names),
                    budget_bytes=budget,
                )
            )
        return Policy(default=Rule(method=Full()), rules=tuple(rules))

    def without_idle(self, tables: Sequence[EmbeddingBagConfig]) -> "Policy":
        """Returns the policy in which methods that no table gets add no stages of training.

        Raises:
            UserError: a rule matches no table.
        """
        at_work = {id(assignment.rule) for assignment in self.assign(tables)}
        idle = [rule for rule in (self.default, *self.rules) if id(rule) not in at_work]
        return self._with({id(rule): dataclasses.replace(rule, method=Full()) for rule in idle})

    def _with(self, replaced: Mapping[int, Rule]) -> "Policy":
        """Returns the policy with rules replaced, by their identity."""
        return dataclasses.replace(
            self,
            default=replaced.get(id(self.default), self.default),
            rules=tuple(replaced.get(id(rule), rule) for rule in self.rules),
        )

    @staticmethod
    def from_config(config: EmbeddingConfig) -> "Policy":
        """Builds the policy that a job describes; its budget is not applied yet.

        Raises:
            UserError: a method or option is unknown or of the wrong type.
        """
        for name in config.methods:
            make_rule(name, config)  # what is written there must be valid even where it is not used
        default = make_rule(config.method, config)
        rules = tuple(make_rule(rule.method, config, rule.table) for rule in config.rules)
        return Policy(default=default, rules=rules, min_rows=config.min_rows)


def resolve(config: EmbeddingConfig, tables: Sequence[EmbeddingBagConfig]) -> Policy:
    """Returns the policy of a job for its tables: its plan's, or its own fitted to its budget.

    Raises:
        UserError: an option is wrong, the plan is for other tables, or the budget is out of reach.
    """
    if config.plan is not None:
        from recsys_compress.compress.planned import planned_policy

        return planned_policy(config, tables)
    policy = Policy.from_config(config).without_idle(tables)
    if config.budget is None:
        return policy
    return policy.fit(tables, budget_bytes(config.budget, full_bytes(tables)))


def full_bytes(tables: Sequence[EmbeddingBagConfig]) -> int:
    """Returns the bytes of the logical tables, uncompressed, in fp32 and without padding."""
    return sum(t.num_embeddings * t.embedding_dim * FP32_BYTES for t in tables)


def describe(method: Method) -> dict[str, Any]:
    """Returns a method's name and knobs as plain data."""
    return {"method": method_name(method), **dataclasses.asdict(method)}


def make_rule(name: str, config: EmbeddingConfig, table: str | None = None) -> Rule:
    """Builds a rule: a method's knobs in a job, and the job's options for all tables.

    Raises:
        UserError: the method is unknown, or a knob or option is not valid.
    """
    kind = method_class(name)
    knobs = dict(config.methods.get(name, {}))
    if "seed" in {f.name for f in dataclasses.fields(kind)}:
        knobs.setdefault("seed", config.seed)
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(TableOptions)}
    return Rule(
        method=parse(kind, knobs, where=f"embedding.methods.{name}"),
        options=TableOptions(**options),
        table=table,
    )


def _check_widths(tables: Sequence[EmbeddingBagConfig], widths: Mapping[str, int]) -> None:
    for table in tables:
        width = widths.get(table.name, table.embedding_dim)
        if width != table.embedding_dim:
            raise UserError(
                f"table {table.name!r}: has trained vectors of width {width}, and embedding.dim is "
                f"{table.embedding_dim}; train a model whose vectors have that width"
            )
