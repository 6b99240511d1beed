"""Decodes codes of blocks of ids, where each block has a width, a decoder and a mean of its own."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.bags import Bags, select
from recsys_compress.compress.hashing import along_keys, constant_tensor
from recsys_compress.compress.slice_sums import PlacedSlices

_NEVER = 2**62  # no id is as great


@dataclass(frozen=True, kw_only=True)
class RankedBlock:
    """Neighbouring ids whose vectors are codes of one rank.

    Attributes:
        ids: their number.
        rank: width k of the codes; 0 where only the mean is left, D where rows are whole.
    """

    ids: int
    rank: int


class BlockDecoder(nn.Module):
    """Decodes and sums, e_f = sum_b (x_{f,b} P_{t,b} + w_{f,b} m_{t,b}) over the blocks b.

    Here x_{f,b} (1, k) is the pooled look-up of block b of feature f's table t and w_{f,b} the
    total weight, or number, of those ids of the bag that lie in b. Whole blocks have no P and no m:
    their rows are added as they are. The values of P start uniform in +-sqrt(3 / k), which gives
    decoded vectors the variance of the rows; m starts at zero.

    Attributes:
        projections: (sum of all k, D), the P of all tables' blocks one below the other; None where
            there are none.
        means: (blocks that are not whole, D).

    Args:
        tables: the logical tables, all of width D.
        blocks: of each table, in the order of their ids.
        reads: feature and number of the block of each look-up; blocks of rank 0 have none.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        blocks: Mapping[str, Sequence[RankedBlock]],
        reads: Sequence[tuple[str, int]],
    ) -> None:
        super().__init__()
        dim = int(tables[0].embedding_dim)
        narrow = [b.rank for t in tables for b in blocks[t.name] if b.rank < dim]
        parts = [
            torch.empty(rank, dim).uniform_(-math.sqrt(3 / rank), math.sqrt(3 / rank))
            for rank in narrow
            if rank
        ]
        self.projections = nn.Parameter(torch.cat(parts)) if parts else None
        self.means = nn.Parameter(torch.zeros(len(narrow), dim))
        # Rows of what `_decoder` makes: means, the unit vectors, one of zeros, projections.
        unit = range(len(narrow), len(narrow) + dim)
        zero = unit.stop
        owned: dict[str, tuple[dict[int, list[int]], list[int]]] = {}
        row, mean = zero + 1, 0
        for table in tables:
            of_codes: dict[int, list[int]] = {}
            of_means = []
            for number, block in enumerate(blocks[table.name]):
                if block.rank == dim:
                    of_codes[number] = list(unit)
                    of_means.append(zero)
                    continue
                of_codes[number] = list(range(row, row + block.rank))
                of_means.append(mean)
                row, mean = row + block.rank, mean + 1
            owned |= dict.fromkeys(table.feature_names, (of_codes, of_means))
        features = list(owned)
        self._count = len(features)
        self._levels = max(len(own) for own in blocks.values())
        self._rank = max(sum(len(rows) for rows in codes.values()) for codes, _ in owned.values())
        # A feature's codes stand side by side, in the order of its blocks.
        places = {}
        rows_of: list[list[int]] = []
        for position, feature in enumerate(features):
            codes, means = owned[feature]
            starts = itertools.accumulate((len(c) for c in codes.values()), initial=0)
            for number, start in zip(codes, starts, strict=False):
                places[feature, number] = position * self._rank + start
            own = [r for code in codes.values() for r in code]
            rows_of.append(
                own
                + [zero] * (self._rank - len(own))
                + means
                + [zero] * (self._levels - len(means))
            )
        widths = {(f, n): len(rows) for f, (codes, _) in owned.items() for n, rows in codes.items()}
        targets = [places[read] + k for read in reads for k in range(widths[read])]
        self._rows = tuple(row for own in rows_of for row in own)
        width = self._count * self._rank
        self._place = None if targets == list(range(width)) else PlacedSlices(targets, width)
        # (most blocks - 1, F) first id of each feature's second, third, ... block
        ends = [
            list(itertools.accumulate(block.ids for block in blocks[table.name]))[:-1]
            for table in tables
            for _ in table.feature_names
        ]
        self._starts = list(itertools.zip_longest(*ends, fillvalue=_NEVER))

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:
        """Returns the features' vectors; see `Lowering.combine`."""
        codes = vectors if self._place is None else self._place(vectors, bags)
        inputs = torch.cat([codes.view(-1, self._count, self._rank), self._weights(bags)], dim=2)
        output = torch.einsum("bfr,frd->bfd", inputs, self._decoder())
        return output.flatten(1)

    def _decoder(self) -> Tensor:
        """Returns (F, R + blocks, D), what decodes each feature's codes and weights of blocks."""
        means = self.means
        unit = torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
        rows = torch.cat([means, unit, torch.zeros_like(unit[:1])])
        if self.projections is not None:
            rows = torch.cat([rows, self.projections])
        found = rows.index_select(0, constant_tensor(self._rows, rows.device))
        return found.view(self._count, self._rank + self._levels, -1)

    def _weights(self, bags: Bags) -> Tensor:
        """Returns (B, F, blocks), the weight of each bag's ids in each block."""
        features = select(bags.features, list(bags.names))
        values, lengths = features.values(), features.lengths()
        block = torch.zeros_like(values)
        for starts in self._starts:
            ids, first = along_keys(values, starts, features.length_per_key())
            block += (ids >= first).view(-1)
        weights = features.weights() if bags.is_weighted else None
        own = torch.arange(len(lengths), device=values.device)
        bag = own.repeat_interleave(lengths, output_size=len(values))
        totals = self.means.new_zeros(len(lengths) * self._levels)
        if weights is None:
            weights = totals.new_ones(1).expand(len(values))
        totals.index_add_(0, bag * self._levels + block, weights.to(totals.dtype))
        return totals.view(self._count, -1, self._levels).transpose(0, 1)
