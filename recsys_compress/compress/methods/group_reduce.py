"""GroupReduce: low rank by blocks, so that frequent ids have more components than rare ones.

Source: Chen et al., "GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model
Shrinking", NeurIPS 2018.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.block_decoder import BlockDecoder, RankedBlock
from recsys_compress.compress.budget import CLOSE, check_choice, out_of_reach, unreachable
from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.method import Kept, Method, Trained, Values, register
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.slices import Slice, by_width, frequency_blocks, placed, sliced
from recsys_compress.compress.spectrum import Item, Spectrum, choose_ranks, rank_steps
from recsys_compress.errors import UserError

NAME = "group_reduce"
Weighing = Literal["logloss", "frequency"]
_LEAST_FACTOR, _MOST_FACTOR = 1e-12, 1e12  # of ranks by look-ups


@register(NAME)
@dataclass(frozen=True, kw_only=True)
class GroupReduce(Method):
    """Block-wise low rank, e(id) = C_b[id] P_b + m_b for id in block b, from scratch or trained.

    A table is cut into blocks of neighbouring ids, which in prepared data are ids of like
    frequency. Each has its own rank k_b, codes C_b (n_b x k_b), decoder P_b (k_b x D) and mean m_b.
    At rank 0 its ids have the mean alone; at rank D its rows are stored as they are.

    The paper's decoders have no mean, its components are weighted by frequency, its ranks are
    proportional to each block's mean frequency, and it then moves ids between blocks, which would
    need a map of all ids here. With `weigh_by = "frequency"` weights and ranks are the paper's; by
    default components and ranks are such that the logloss rises least.
    """

    ranks: dict[str, tuple[int, ...]] | None = field(
        default=None, metadata={"help": "by table, the rank of each of its blocks"}
    )
    num_blocks: int = field(default=4, metadata={"help": "most blocks of a table"})
    growth: float = field(
        default=3.0, metadata={"help": "how many times more ids a block has than the one before"}
    )
    least_rank: int = field(
        default=0,
        metadata={"help": "rank that every block has at least; at 0 its ids may share one vector"},
    )
    weigh_by: Weighing = field(
        default="logloss",
        metadata={
            "help": "what components and ranks of trained tables are chosen by: 'logloss', such "
            "that it rises least, or 'frequency', as published"
        },
    )

    def __post_init__(self) -> None:
        check_choice(f"{NAME}.weigh_by", self.weigh_by, Weighing)
        for name, value in (("num_blocks", self.num_blocks), ("growth", self.growth)):
            if not 1 <= value < math.inf:
                raise UserError(
                    f"embedding.methods.{NAME}.{name} = {value}: must be 1 or more, and finite"
                )
        if self.least_rank < 0:
            raise UserError(
                f"embedding.methods.{NAME}.least_rank = {self.least_rank}: must be 0 or more"
            )

    def blocks(self, table: EmbeddingBagConfig) -> list[int]:
        """Returns the ids of each block; see `frequency_blocks`."""
        return frequency_blocks(NAME, table, self.num_blocks, self.growth)

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns a table and a look-up for each block that has codes, and what decodes them."""
        dims = {int(table.embedding_dim) for table in tables}
        if len(dims) > 1:
            raise UserError(f"method {NAME!r} takes tables of one width, not {sorted(dims)}")
        blocks = {table.name: self._ranked(table) for table in tables}
        slices = []
        for table in tables:
            first = 0
            for number, block in enumerate(blocks[table.name]):
                if block.rank:
                    dims_ = tuple(range(block.rank))
                    slices.append(
                        Slice(table=table, number=number, first=first, ids=block.ids, dims=dims_)
                    )
                first += block.ids
        slices, reads = by_width(slices)
        features = [feature for table in tables for feature in table.feature_names]
        if all(block.rank in dims for own in blocks.values() for block in own):
            return placed(slices)  # there is nothing to decode
        decoder = BlockDecoder(tables, blocks, [(feature, part.number) for part, feature in reads])
        return sliced(slices, reads, decoder, features)

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "GroupReduce":
        """Chooses ranks as if each block were read as often as the next, as by Zipf's law.

        Each component is taken to hold half of what the one before does. If that leaves more than
        5 % of the budget unused, the ranks are those that use most of it.
        """
        items = []
        for table in tables:
            halves = 0.5 ** torch.arange(table.embedding_dim + 1).double()
            items += self._items(table, options, [halves] * self.num_blocks)
        floor = min(CLOSE * budget_bytes, sum(item.sizes[-1] for item in items))
        method, used, _ = self._chosen(tables, items, budget_bytes)
        if used < floor:
            fullest = [replace(i, losses=tuple(-float(size) for size in i.sizes)) for i in items]
            method, used, above = self._chosen(tables, fullest, budget_bytes)
            if used < floor:
                raise unreachable(NAME, budget_bytes, used, above)
        return method

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple["GroupReduce", Values]:
        """Factorizes the blocks of trained tables by their weighted principal components.

        With E_b the block's vectors, a their weights, R = M^1/2 for the table's curvature M and
        U the k greatest eigenvectors of the weighted covariance of E_b R, the codes are
        (E_b - m_b) R U and the decoder U^T R^-1, m_b being the weighted mean. What that loses of
        the logloss is half the eigenvalues left out, weights included (`Curvature`), so ranks of
        all blocks are chosen together. A budget decides, or else `ranks`.
        """
        found = {t.name: self._components(t, trained) for t in tables}
        method = self
        if budget_bytes is not None and self.weigh_by == "frequency":
            method = self._by_frequency(tables, found, budget_bytes, options)
        elif budget_bytes is not None:
            items = [
                item
                for t in tables
                for item in self._items(t, options, [c.losses() for c in found[t.name]])
            ]
            method, _, _ = self._chosen(tables, items, budget_bytes)
        values: dict[str, Tensor] = {}
        projections, means = [], []
        for table in tables:
            vectors = trained.vectors(table.name)
            first = 0
            for number, block in enumerate(method._ranked(table)):
                own, part = vectors[first : first + block.ids], found[table.name][number]
                first += block.ids
                if block.rank < table.embedding_dim:
                    own, decoder = part.cut(own, block.rank)
                    means.append(part.mean())
                    if block.rank:
                        projections.append(decoder)
                if block.rank:
                    values[f"{table.name}#{number}"] = own
        combine = {"means": torch.stack(means)} if means else {}
        if projections:
            combine["projections"] = torch.cat(projections)
        return method, Values(tables=values, combine=combine)

    def kept_parts(self, tables: Sequence[EmbeddingBagConfig]) -> Kept | None:
        """Returns the rank of each block."""
        if self.ranks is None:
            return None
        return Kept(
            rows={t.name: [float(b.rank) for b in self._ranked(t)] for t in tables},
            most=max(int(table.embedding_dim) for table in tables),
            label="rank",
            columns="block, the most frequent ids first",
        )

    def _components(self, table: EmbeddingBagConfig, trained: Trained) -> list["_Components"]:
        """Returns the principal components of each block of a trained table."""
        vectors = trained.vectors(table.name).double()
        counts = torch.ones(len(vectors))
        if trained.weights is not None:
            counts = trained.weights(table.name)
        if self.weigh_by == "frequency" or trained.curvature is None:
            unit = torch.eye(vectors.shape[1], dtype=torch.float64).unsqueeze(0)
            curvature = Curvature(weights=counts.double(), matrices=unit)
        else:
            curvature = trained.curvature(table.name)
        root, inverse = curvature.roots()
        sizes = self.blocks(table)
        found = []
        for own, weights in zip(
            torch.split(vectors, sizes), torch.split(curvature.weights, sizes), strict=True
        ):
            moments = Moments.zeros(vectors.shape[1])
            moments.add(own @ root, weights)
            spectrum = Spectrum.of(moments)
            found.append(
                _Components(
                    spectrum=spectrum, mass=float(weights.sum()), root=root, inverse=inverse
                )
            )
        return found

    def _items(
        self, table: EmbeddingBagConfig, options: TableOptions, losses: Sequence[Tensor]
    ) -> list[Item]:
        """Returns the blocks of a table, whose ranks are to be chosen; the first keeps some."""
        dim = int(table.embedding_dim)
        items = []
        for i, (ids, lost) in enumerate(zip(self.blocks(table), losses, strict=False)):
            least = max(self.least_rank, 0 if i else 1)
            steps = rank_steps(ids, dim, options, least=least)
            items.append(Item.of(f"{table.name}#{i}", steps, lost))
        return items

    def _chosen(
        self, tables: Sequence[EmbeddingBagConfig], items: Sequence[Item], budget_bytes: int
    ) -> tuple["GroupReduce", int, int]:
        """Returns the method with the ranks of least loss, its bytes, and the next larger ones."""
        ranks = choose_ranks(NAME, items, budget_bytes)
        steps = [item.ranks.index(rank) for item, rank in zip(items, ranks, strict=True)]
        taken = list(zip(items, steps, strict=True))
        used = sum(item.sizes[step] for item, step in taken)
        rises = [
            item.sizes[step + 1] - item.sizes[step]
            for item, step in taken
            if step + 1 < len(item.sizes)
        ]
        rest = iter(ranks)
        by_table = {t.name: tuple(next(rest) for _ in self.blocks(t)) for t in tables}
        return replace(self, ranks=by_table), used, used + min(rises, default=0)

    def _by_frequency(
        self,
        tables: Sequence[EmbeddingBagConfig],
        found: Mapping[str, Sequence["_Components"]],
        budget_bytes: int,
        options: TableOptions,
    ) -> "GroupReduce":
        """Returns the method with ranks proportional to the mean frequency of each block's ids."""
        items = {
            t.name: self._items(t, options, [c.losses() for c in found[t.name]]) for t in tables
        }
        frequency = {
            t.name: [c.mass / ids for c, ids in zip(found[t.name], self.blocks(t), strict=True)]
            for t in tables
        }

        def ranks(factor: float) -> dict[str, list[int]]:
            """Returns the step of each block that is the greatest within its share."""
            return {
                name: [
                    max((i for i, k in enumerate(item.ranks) if k <= factor * mean), default=0)
                    for item, mean in zip(own, frequency[name], strict=True)
                ]
                for name, own in items.items()
            }

        def need(factor: float) -> int:
            steps = ranks(factor)
            return sum(
                item.sizes[step]
                for name, own in items.items()
                for item, step in zip(own, steps[name], strict=True)
            )

        if need(0.0) > budget_bytes:
            whole = sum(item.sizes[-1] for own in items.values() for item in own)
            raise out_of_reach(NAME, budget_bytes, need(0.0), whole)
        low, high = _LEAST_FACTOR, _MOST_FACTOR
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if need(middle) <= budget_bytes else (low, middle)
        return replace(
            self,
            ranks={
                name: tuple(items[name][i].ranks[step] for i, step in enumerate(steps))
                for name, steps in ranks(low).items()
            },
        )

    def _ranked(self, table: EmbeddingBagConfig) -> list[RankedBlock]:
        """Returns the blocks with their ranks.

        Raises:
            UserError: the ranks are not known, or do not suit the table.
        """
        if self.ranks is None:
            raise UserError(
                f"method {NAME!r} needs embedding.budget or embedding.methods.{NAME}.ranks"
            )
        sizes, ranks = self.blocks(table), self.ranks.get(table.name, ())
        key = f"embedding.methods.{NAME}.ranks.{table.name}"
        if len(ranks) != len(sizes):
            raise UserError(
                f"{key}: has {len(ranks)} ranks, but the table has {len(sizes)} blocks; leave it "
                "out and set embedding.budget"
            )
        if not any(ranks):
            raise UserError(f"{key}: has no rank above 0; each table has to keep some")
        for rank in ranks:
            if not 0 <= rank <= table.embedding_dim:
                raise UserError(f"{key}: {rank} must lie in [0, {table.embedding_dim}]")
        return [RankedBlock(ids=i, rank=rank) for i, rank in zip(sizes, ranks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Components:
    """Principal components of a block's vectors, in the metric of what they do to the logloss.

    Attributes:
        spectrum: of the vectors times `root`.
        mass: sum of the vectors' weights.
        root: (D, D), R.
        inverse: (D, D), R^-1.
    """

    spectrum: Spectrum
    mass: float
    root: Tensor
    inverse: Tensor

    def losses(self) -> Tensor:
        """Returns (D + 1,) what is lost at rank 0, 1, ..., D."""
        return self.spectrum.lost() * self.mass / 2

    def cut(self, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Returns (n, rank) codes of (n, D) vectors, and the (rank, D) decoder."""
        basis = self.spectrum.basis(rank)
        codes = (vectors.double() @ self.root - self.spectrum.mean) @ basis
        return codes.float(), (basis.t() @ self.inverse).float()

    def mean(self) -> Tensor:
        """Returns (D,) the mean of the vectors."""
        return (self.spectrum.mean @ self.inverse).float()
