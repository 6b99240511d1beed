"""What each table may become: method x knob x storage type, with the exact bytes of each."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy, Rule, StoragePlan
from recsys_compress.compress.lowering import FP32_BYTES, TableOptions
from recsys_compress.compress.method import Method, Trained, Values, method_name
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.policy import describe
from recsys_compress.compress.size import DataType, SizeReport
from recsys_compress.config import DenseOptimizerName
from recsys_compress.errors import UserError

Purpose = Literal["training", "parameters", "serving"]

# Budgets are tried at these whole widths, and at shares of the full bytes that fall by a factor.
_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
_FACTOR = 1.3
_LEAST_SHARE = 1 / 1000
# Types that no other makes useless: bf16 has fp16's bytes and fewer digits.
STORAGE: tuple[DataType, ...] = ("fp32", "fp16", "int8", "int4", "int2")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Exact bytes of tables.

    Attributes:
        parameters: of weights, what combines them and maps of ids, in training.
        optimizer: of the optimizers' state for them.
        serving: of all that is served, in the planned storage types.
    """

    parameters: int
    optimizer: int
    serving: int

    @property
    def training(self) -> int:
        """Bytes in training."""
        return self.parameters + self.optimizer

    def of(self, purpose: Purpose) -> int:
        """Returns the bytes that a budget is for."""
        return int(getattr(self, purpose))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to store one table, or several that share.

    Attributes:
        tables: names of the logical tables.
        method: with its knobs.
        options: how its physical tables are trained and served.
        sizes: its bytes.
        rows: physical rows.
        dim: width of the widest physical table.
    """

    tables: tuple[str, ...]
    method: Method
    options: TableOptions
    sizes: Sizes
    rows: int
    dim: int

    @property
    def name(self) -> str:
        """The method's name."""
        return method_name(self.method)

    @property
    def label(self) -> str:
        """The method and what it is set to, in a few words."""
        return f"{self.name} {self.rows:,} x {self.dim} {self.options.storage}"

    def stored_as(self, storage: DataType, sizes: Sizes) -> "Candidate":
        """Returns the candidate in another storage type."""
        options = dataclasses.replace(self.options, storage=storage)
        return dataclasses.replace(self, options=options, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What candidates are made of.

    Attributes:
        rule: with the method's fixed knobs, and how its tables are trained.
        is_fixed: whether the method's knobs are all given, so that none is varied.
    """

    rule: Rule
    is_fixed: bool = False


def size_of(
    collection: CompressedEmbeddingBagCollection, dense_optimizer: DenseOptimizerName
) -> Sizes:
    """Returns the bytes of tables in the storage types that their options name.

    A sharded trainer's dry run, which knows the bytes of each rank, belongs here: a plan is checked
    against its budget by this function alone.
    """
    report = collection.size_report(dense_optimizer)
    return _sizes(report, StoragePlan.planned(collection).serving_bytes(collection))


def lowered(
    tables: Sequence[EmbeddingBagConfig], policy: Policy, *, on_cpu: bool = False
) -> CompressedEmbeddingBagCollection:
    """Returns tables under a policy, on the meta device unless they are to be used."""
    device = torch.device("cpu" if on_cpu else "meta")
    return CompressedEmbeddingBagCollection(tables=tables, policy=policy, device=device)


def alone(method: Method, options: TableOptions) -> Policy:
    """Returns the policy that gives every table a method."""
    return Policy(default=Rule(method=method, options=options), min_rows=0)


def methods_for(
    tables: Sequence[EmbeddingBagConfig],
    wanted: Wanted,
    trained: Trained | None,
    *,
    adopting: bool,
    budgets: Sequence[int] = (),
) -> Iterator[tuple[Method, Values | None]]:
    """Yields a method at every knob worth looking at, for one table or several that share.

    Knobs are found by fitting the method to budgets. One that it cannot take is passed over.

    Args:
        tables: the logical tables.
        wanted: the method.
        trained: the tables of a reference run, which the method then takes over; None for none.
        adopting: whether training is to begin with what it took over.
        budgets: parameter bytes; by default a ladder of them.

    Yields:
        The method with its knobs, and what its tables would begin with.
    """
    rule, seen = wanted.rule, []
    for budget in [None] if wanted.is_fixed else budgets or _ladder(tables, rule.options):
        try:
            method = rule.method.in_one_stage(adopting=adopting)
            method = method if budget is None else method.fit(tables, budget, rule.options)
            if method in seen:
                continue
            seen.append(method)
            if trained is None:
                yield method, None
            else:
                yield method.adopt(tables, trained, budget, rule.options)
        except UserError:
            continue  # out of reach, or it does not suit these tables


def candidate(
    tables: Sequence[EmbeddingBagConfig],
    method: Method,
    options: TableOptions,
    dense_optimizer: DenseOptimizerName,
    storage: Sequence[DataType],
) -> list[Candidate]:
    """Returns a method in all storage types that make a difference, the first one first.

    Args:
        tables: the logical tables, lowered together.
        method: with its knobs.
        options: how its tables are trained.
        dense_optimizer: what trains parameters that combine look-ups.
        storage: types, each finer than the next.

    Raises:
        UserError: the method does not suit the tables.
    """
    collection = lowered(tables, alone(method, options))
    report = collection.size_report(dense_optimizer)
    first = Candidate(
        tables=tuple(table.name for table in tables),
        method=method,
        options=options,
        sizes=_sizes(report, 0),
        rows=sum(table.num_embeddings for table in report.physical),
        dim=max(table.used_dim for table in report.physical),
    )
    found: list[Candidate] = []
    for data_type in storage:
        served = StoragePlan(types=data_type).serving_bytes(collection)
        # A coarser type of no fewer bytes is what `StoragePlan` stores finer anyway.
        if not found or served < found[-1].sizes.serving:
            found.append(first.stored_as(data_type, _sizes(report, served)))
    return found


def joined(candidates: Sequence[Candidate]) -> Policy:
    """Returns the policy of a candidate for each table.

    Tables whose methods differ in knobs by table alone, like ranks, become one rule, which is
    lowered at once. Methods that hash or pool would share rows then, so theirs stay apart.
    """
    groups: dict[object, list[Candidate]] = {}
    for each in candidates:
        own = _by_table(each)
        rest = {k: v for k, v in describe(each.method).items() if k not in own}
        alike = bool(own) or isinstance(each.method, Full)
        key = (each.options, repr(rest), sorted(own)) if alike else each.tables
        groups.setdefault(repr(key), []).append(each)
    return Policy(
        default=Rule(method=Full()), rules=tuple(_rule(members) for members in groups.values())
    )


def _rule(members: Sequence[Candidate]) -> Rule:
    first = members[0]
    knobs = {
        name: {key: value for each in members for key, value in _by_table(each)[name].items()}
        for name in _by_table(first)
    }
    names = [name for each in members for name in each.tables]
    return Rule(
        method=dataclasses.replace(first.method, **knobs),
        options=first.options,
        table="|".join(re.escape(name) for name in names),
    )


def _by_table(candidate: Candidate) -> dict[str, dict[str, Any]]:
    """Returns the knobs that have a value for each of the candidate's tables."""
    fields = dataclasses.fields(candidate.method)
    found = {field.name: getattr(candidate.method, field.name) for field in fields}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, dict) and set(value) == set(candidate.tables)
    }


def _sizes(report: SizeReport, serving: int) -> Sizes:
    return Sizes(parameters=report.table_bytes, optimizer=report.optimizer_bytes, serving=serving)


def _ladder(tables: Sequence[EmbeddingBagConfig], options: TableOptions) -> list[int]:
    """Returns parameter bytes to try, rising."""
    budgets = set()
    width = max(int(table.embedding_dim) for table in tables)
    for dim in [d for d in (*_WIDTHS, 3 * width // 4, width // 2) if 0 < d < width]:
        # A little more than rows of that width: a projection of it has to fit as well.
        budgets.add(
            sum(
                t.num_embeddings * options.row_bytes(dim) + (dim + 1) * t.embedding_dim * FP32_BYTES
                for t in tables
            )
        )
    full = sum(t.num_embeddings * options.row_bytes(t.embedding_dim) for t in tables)
    steps = math.ceil(math.log(1 / _LEAST_SHARE, _FACTOR))
    budgets |= {int(full * _FACTOR**-step) for step in range(steps + 1)}
    return sorted(budgets - {0})
