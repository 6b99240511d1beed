"""Tables cut into slices of neighbouring ids, each of which is a physical table."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.bags import is_single_valued
from recsys_compress.compress.hashing import check_range, constant_tensor, per_value
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable
from recsys_compress.compress.merge import MAX_ROWS
from recsys_compress.compress.slice_sums import PlacedSlices, ScaledSlices, Single
from recsys_compress.errors import UserError

LEAST_IDS = 16  # in the first block, of the most frequent ids


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Neighbouring ids of a table, and the dims of their vectors that are stored.

    Attributes:
        table: the logical table.
        number: of the slice among the table's.
        first: its first id.
        ids: number of its ids.
        dims: positions in the vector.
    """

    table: EmbeddingBagConfig
    number: int
    first: int
    ids: int
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of its physical table."""
        return f"{self.table.name}#{self.number}"

    def values(self, vectors: Tensor) -> Tensor:
        """Returns (ids, number of dims), the slice's part of its table's (n, D) vectors."""
        return vectors[self.first : self.first + self.ids, list(self.dims)]


def frequency_blocks(
    method: str, table: EmbeddingBagConfig, num_blocks: int, growth: float
) -> list[int]:
    """Returns the ids of each block of neighbours; the last has what rounding leaves.

    Args:
        method: its name, for messages.
        table: whose ids are in the order of their frequency, as in prepared data.
        num_blocks: most blocks; fewer where the first would have too few ids.
        growth: how many times more ids a block has than the one before.

    Raises:
        UserError: the table's ids are hashes, whose order says nothing.
    """
    ids = int(table.num_embeddings)
    if ids > MAX_ROWS:
        raise UserError(
            f"table {table.name!r}: has {ids:,} ids, which are hashes and not in the order of "
            f"their frequency; {method!r} needs data prepared with --encoding vocabulary"
        )
    for count in range(min(num_blocks, max(ids // LEAST_IDS, 1)), 0, -1):
        if (count - 1) * math.log(growth) > math.log(ids):
            continue  # the first block would have none of the ids; and the power may overflow
        shares = [growth**number for number in range(count)]
        sizes = [int(ids * share / sum(shares)) for share in shares]
        if count == 1 or sizes[0] >= LEAST_IDS:
            break
    return [*sizes[:-1], ids - sum(sizes[:-1])]


def by_width(slices: Sequence[Slice]) -> tuple[list[Slice], list[tuple[Slice, str]]]:
    """Returns slices by falling width, and the slice and the feature of each look-up.

    Physical tables of one width are merged: look-ups in their order need no sorting.
    """
    ordered = sorted(slices, key=lambda part: -len(part.dims))
    return ordered, [(part, feature) for part in ordered for feature in part.table.feature_names]


def placed(slices: Sequence[Slice]) -> Lowering:
    """Returns tables of the dims that are stored; the others are zero in a feature's vector."""
    ordered, reads = by_width(slices)
    widths = _widths(slices)
    starts = dict(zip(widths, itertools.accumulate(widths.values(), initial=0), strict=False))
    targets = [starts[feature] + dim for part, feature in reads for dim in part.dims]
    combine = None
    if targets != list(range(sum(widths.values()))):
        combine = PlacedSlices(targets, sum(widths.values()))
    return sliced(ordered, reads, combine, tuple(widths))


def scaled(tables: Sequence[EmbeddingBagConfig], blocks: Mapping[str, Sequence[int]]) -> Lowering:
    """Returns tables of all dims, whose vectors are scaled by an alpha for each block and dim.

    A bag of several ids needs a look-up for each block, of those of its ids that lie there. One id
    needs a single one, so a table that is known to be single-valued stays in one slice.

    Args:
        tables: of one width D.
        blocks: the ids of each block, by table. Rows of alpha are those of the blocks of the first
            table, then of the second, and so on.
    """
    slices = whole_or_blocks(tables, blocks)
    counts = {name: len(ids) for name, ids in blocks.items()}
    firsts = dict(zip(counts, itertools.accumulate(counts.values(), initial=0), strict=False))
    features = list(_widths(slices))
    singles = [
        (part, feature)
        for part in slices
        if is_single_valued(part.table)
        for feature in part.table.feature_names
    ]
    ordered = sorted(
        (part for part in slices if not is_single_valued(part.table)),
        key=lambda part: (part.number, -counts[part.table.name]),
    )
    several = [(part, feature) for part in ordered for feature in part.table.feature_names]
    combine = ScaledSlices(
        [
            Single(
                name=feature,
                feature=features.index(feature),
                alpha=firsts[part.table.name],
                starts=tuple(itertools.accumulate(blocks[part.table.name][:-1], initial=0)),
            )
            for part, feature in singles
        ],
        [firsts[part.table.name] + part.number for part, _ in several],
        [features.index(feature) for _, feature in several],
        count=sum(counts.values()),
        dim=tables[0].embedding_dim,
    )
    return sliced(slices, [*singles, *several], combine, features)


def whole_or_blocks(
    tables: Sequence[EmbeddingBagConfig], blocks: Mapping[str, Sequence[int]]
) -> list[Slice]:
    """Returns the slices of `scaled`."""
    found = []
    for table in tables:
        own = blocks[table.name]
        ids = [sum(own)] if is_single_valued(table) else own
        firsts = itertools.accumulate(ids[:-1], initial=0)
        found += [
            Slice(
                table=table, number=i, first=first, ids=size, dims=tuple(range(table.embedding_dim))
            )
            for i, (first, size) in enumerate(zip(firsts, ids, strict=True))
        ]
    return found


def _widths(slices: Sequence[Slice]) -> dict[str, int]:
    """Returns D by feature, in the order of the tables."""
    return {f: int(part.table.embedding_dim) for part in slices for f in part.table.feature_names}


def sliced(
    slices: Sequence[Slice],
    reads: Sequence[tuple[Slice, str]],
    combine: nn.Module | None,
    features: Sequence[str],
) -> Lowering:
    """Returns a table for each slice.

    Args:
        slices: with at least one dim each.
        reads: the slice and the feature of each look-up.
        combine: makes features of the look-ups, in their order; see `Lowering.combine`.
        features: in the order in which they come out.
    """
    return Lowering(
        tables=tuple(
            PhysicalTable(
                name=part.name,
                num_embeddings=part.ids,
                embedding_dim=len(part.dims),
                members=(part.table.name,),
            )
            for part in slices
        ),
        lookups=tuple(
            Lookup(name=f"{feature}#{part.number}", feature=feature, table=part.name)
            for part, feature in reads
        ),
        ids=SliceIds(reads, features),
        combine=combine,
        order=tuple(features),
    )


class SliceIds(nn.Module):
    """Maps ids to their rows in each slice; a look-up's bags lack the ids outside its slice.

    Args:
        reads: (K,) the slice and the feature of each look-up.
        features: (F,) in the order of the batches.
    """

    def __init__(self, reads: Sequence[tuple[Slice, str]], features: Sequence[str]) -> None:
        super().__init__()
        limits = {feature: int(part.table.num_embeddings) for part, feature in reads}
        self.features = list(features)
        self.limits = tuple(limits[feature] for feature in features)
        self.source = tuple(self.features.index(feature) for _, feature in reads)
        self.first = tuple(part.first for part, _ in reads)
        self.ids = tuple(part.ids for part, _ in reads)
        self.names = [f"{feature}#{part.number}" for part, feature in reads]
        whole = all(part.ids == part.table.num_embeddings for part, _ in reads)
        self._as_given = whole and [feature for _, feature in reads] == self.features

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the K look-ups' bags with values that are rows of their slices.

        Raises:
            ValueError: an id lies outside its feature's table.
        """
        check_range(features.values(), self.limits, features.length_per_key(), self.features)
        if self._as_given:
            return features
        read = self._single if _is_single(features) else self._several
        counts, rows, weights = read(features)
        return KeyedJaggedTensor(
            keys=self.names,
            values=rows,
            weights=weights,
            lengths=counts.view(-1),
            stride=features.stride(),
            length_per_key=counts.sum(dim=1).tolist(),
        )

    def _single(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (K, B) counts, the rows, and their weights where each bag has one id."""
        source = constant_tensor(self.source, features.device())
        first = constant_tensor(self.first, features.device()).int().unsqueeze(1)
        ends = constant_tensor(self.ids, features.device()).int().unsqueeze(1)
        # 32 bits halve the traffic of what is by far the largest tensor here.
        ids = features.values().int().view(len(self.features), -1)
        rows = ids.index_select(0, source) - first
        inside = (rows >= 0).logical_and_(rows < ends)
        weights = features.weights_or_none()
        if weights is not None:
            weights = weights.view_as(ids).index_select(0, source).masked_select(inside)
        return inside.to(features.lengths().dtype), rows.masked_select(inside), weights

    def _several(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the same for bags of any length."""
        repeated = features.permute(list(self.source))
        lengths, per_key = repeated.lengths(), repeated.length_per_key()
        rows = repeated.values() - per_value(self.first, per_key, features.device())
        inside = rows < per_value(self.ids, per_key, features.device())
        inside.logical_and_(rows >= 0)
        bags = torch.arange(len(lengths), device=lengths.device)
        bags = bags.repeat_interleave(lengths, output_size=len(rows))[inside]
        counts = torch.bincount(bags, minlength=len(lengths)).to(lengths.dtype)
        weights = repeated.weights_or_none()
        return (
            counts.view(len(self.names), -1),
            rows[inside],
            None if weights is None else weights[inside],
        )


def _is_single(features: KeyedJaggedTensor) -> bool:
    lengths = features.lengths()
    return len(lengths) == len(features.values()) and bool((lengths == 1).all())
