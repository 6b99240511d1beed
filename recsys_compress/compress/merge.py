"""Many physical tables into few: those of equal width and training become one with row offsets.

On CPU one merged table trains about four times faster than a table for each of 26 features.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from recsys_compress.compress.lowering import FP32_BYTES, Lowering, TableOptions
from recsys_compress.compress.size import PhysicalSize
from recsys_compress.errors import UserError

MAX_ROWS = 2**31 - 1  # of one FBGEMM table


@dataclass(frozen=True, kw_only=True)
class MergedTable:
    """A table as torchrec holds it.

    Attributes:
        name: unique within the collection.
        num_embeddings: rows of all its parts.
        used_dim: width that lowerings read; the rest of `stored_dim` is padding.
        options: how it is stored and trained.
        members: logical tables held in it.
        lookups: names of the look-ups into it.
    """

    name: str
    num_embeddings: int
    used_dim: int
    options: TableOptions
    members: tuple[str, ...]
    lookups: tuple[str, ...]

    @property
    def stored_dim(self) -> int:
        """Width in memory."""
        return self.options.stored_dim(self.used_dim)

    @property
    def parameter(self) -> str:
        """Name of its weights within the collection."""
        inner = f"embedding_bags.{self.name}.weight"
        return f"fused.{inner}" if self.options.fused else f"dense.{self.name}.{inner}"

    def config(self, features: Sequence[str]) -> EmbeddingBagConfig:
        """Returns torchrec's form of it, looked up by `features`."""
        return EmbeddingBagConfig(
            name=self.name,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.stored_dim,
            feature_names=list(features),
            pooling=PoolingType.SUM,
            init_fn=functools.partial(_uniform_, bound=self.options.init_range),
        )

    def size(self) -> PhysicalSize:
        """Returns its bytes."""
        return PhysicalSize(
            name=self.parameter,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.stored_dim,
            used_dim=self.used_dim,
            optimizer=self.options.optimizer,
            parameter_bytes=self.num_embeddings * self.stored_dim * FP32_BYTES,
            optimizer_bytes=self.options.state_bytes(self.num_embeddings, self.stored_dim),
            members=self.members,
        )


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a look-up lands.

    Attributes:
        lookup: its name.
        feature: the logical feature it serves.
        table: the merged table it reads.
        offset: first of its physical table's rows there.
        rows: number of its physical table's rows.
    """

    lookup: str
    feature: str
    table: MergedTable
    offset: int
    rows: int


@dataclass(kw_only=True)
class _Layout:
    """A merged table while it grows."""

    rows: int
    members: dict[str, None]
    lookups: list[str]


def merge(
    lowerings: Sequence[Lowering], options: Sequence[TableOptions]
) -> tuple[list[MergedTable], list[Slot]]:
    """Lays out the physical tables of several lowerings.

    Args:
        lowerings: of disjoint sets of logical tables.
        options: (same length) how each lowering's tables are stored and trained.

    Returns:
        The merged tables, fused ones first, and the slot of each look-up in the order in which the
        lowerings emit them.

    Raises:
        UserError: a table is too large for the kernel or for its optimizer.
    """
    layouts: dict[tuple[int, TableOptions], _Layout] = {}
    places: list[tuple[tuple[int, TableOptions], int, int]] = []
    for lowering, option in zip(lowerings, options, strict=True):
        offsets = {}
        for table in lowering.tables:
            key = (table.embedding_dim, option.starting_as(table.part))
            layout = layouts.setdefault(key, _Layout(rows=0, members={}, lookups=[]))
            offsets[table.name] = (key, layout.rows, table.num_embeddings)
            layout.rows += table.num_embeddings
            layout.members.update(dict.fromkeys(table.members))
        for lookup in lowering.lookups:
            places.append(offsets[lookup.table])
            layouts[offsets[lookup.table][0]].lookups.append(lookup.name)
    tables = _name(layouts)
    lookups = [lookup for lowering in lowerings for lookup in lowering.lookups]
    slots = [
        Slot(
            lookup=lookup.name,
            feature=lookup.feature,
            table=tables[key],
            offset=offset,
            rows=rows,
        )
        for lookup, (key, offset, rows) in zip(lookups, places, strict=True)
    ]
    return sorted(tables.values(), key=lambda t: not t.options.fused), slots


def _name(
    layouts: dict[tuple[int, TableOptions], _Layout],
) -> dict[tuple[int, TableOptions], MergedTable]:
    tables: dict[tuple[int, TableOptions], MergedTable] = {}
    used: Counter[str] = Counter()
    for (dim, options), layout in layouts.items():
        name = f"{options.optimizer}_d{dim}"
        used[name] += 1
        if used[name] > 1:
            name = f"{name}_{used[name]}"
        _check(layout.rows, tuple(layout.members), options)
        tables[dim, options] = MergedTable(
            name=name,
            num_embeddings=layout.rows,
            used_dim=dim,
            options=options,
            members=tuple(layout.members),
            lookups=tuple(layout.lookups),
        )
    return tables


def _check(rows: int, members: tuple[str, ...], options: TableOptions) -> None:
    if rows > MAX_ROWS:
        raise UserError(
            f"tables {', '.join(members)}: {rows:,} rows of one width are more than the kernel's "
            f"{MAX_ROWS:,}; use a method that shares rows (hash, unified) or set a budget"
        )
    if not options.fused and rows > options.dense_rows:
        raise UserError(
            f"embedding.optimizer = 'adam': there is no fused Adam on CPU, and dense Adam touches "
            f"all {rows:,} rows of {', '.join(members)} at every step, more than "
            f"embedding.dense_rows = {options.dense_rows:,}; use 'rowwise_adagrad' or raise it"
        )


def _uniform_(weight: Tensor, *, bound: float) -> Tensor:
    return nn.init.uniform_(weight, -bound, bound)
