"""Decodes codes of blocks of ids, where each block has a width, a decoder and a mean of its own."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.bags import Bags, select
from recsys_compress.compress.hashing import along_keys, constant_tensor

_NEVER = 2**62  # no id is as great
_BAGS = 512  # whose codes and vectors stay in the cache


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
        # By feature: for each block the rows that decode its codes, and the row of its mean.
        owned: dict[str, tuple[list[list[int]], list[int]]] = {}
        row, mean = zero + 1, 0
        for table in tables:
            of_codes: list[list[int]] = []
            of_means: list[int] = []
            for block in blocks[table.name]:
                if block.rank == dim:
                    of_codes.append(list(unit))
                    of_means.append(zero)
                    continue
                of_codes.append(list(range(row, row + block.rank)))
                of_means.append(mean)
                row, mean = row + block.rank, mean + 1
            owned |= dict.fromkeys(table.feature_names, (of_codes, of_means))
        self._count = len(owned)
        self._levels = max(len(own) for own in blocks.values())
        self._rank = max(sum(map(len, codes)) for codes, _ in owned.values())
        # A feature's codes stand side by side, in the order of its blocks, filled up to one number
        # with any column: what decodes it there is zero.
        places: dict[tuple[str, int], int] = {}
        rows_of: list[int] = []
        for position, (feature, (codes, means)) in enumerate(owned.items()):
            place = position * self._rank
            for number, code in enumerate(codes):
                places[feature, number] = place
                place += len(code)
            own = list(itertools.chain.from_iterable(codes))
            rows_of += own + [zero] * (self._rank - len(own))
            rows_of += means + [zero] * (self._levels - len(means))
        self._rows = tuple(rows_of)
        self._back = tuple(
            places[feature, number] + k
            for feature, number in reads
            for k in range(len(owned[feature][0][number]))
        )
        columns = [0] * (self._count * self._rank)
        for source, column in enumerate(self._back):
            columns[column] = source
        self._columns = tuple(columns)
        # (most blocks - 1, F) first id of each feature's second, third, ... block
        ends = [
            list(itertools.accumulate(block.ids for block in blocks[table.name]))[:-1]
            for table in tables
            for _ in table.feature_names
        ]
        self._starts = list(itertools.zip_longest(*ends, fillvalue=_NEVER))

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:
        """Returns the features' vectors; see `Lowering.combine`."""
        output: Tensor = _Decode.apply(  # type: ignore[no-untyped-call]
            vectors, self._weights(bags), self._decoder(), self._columns, self._back
        )
        return output

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
        """Returns (F, B, blocks), the weight of each bag's ids in each block."""
        features = select(bags.features, list(bags.names))
        values, lengths = features.values(), features.lengths()
        block = torch.zeros_like(values)
        for starts in self._starts:
            ids, first = along_keys(values, starts, features.length_per_key())
            block += (ids >= first).view(-1)
        bag = torch.arange(len(lengths), device=values.device)
        if len(values) != len(lengths) or not bool((lengths == 1).all()):
            bag = bag.repeat_interleave(lengths, output_size=len(values))
        totals = self.means.new_zeros(len(lengths) * self._levels)
        weights = totals.new_ones(1).expand(len(values))
        if bags.is_weighted:
            weights = features.weights().to(totals.dtype)
        totals.index_add_(0, bag * self._levels + block, weights)
        return totals.view(self._count, -1, self._levels)


class _Decode(torch.autograd.Function):
    """Multiplies codes and weights by decoders, some bags at a time: little leaves the cache.

    Takes (B, C) codes in the order of the look-ups, (F, B, blocks) weights, (F, R + blocks, D)
    decoders, the (F x R) columns that make each feature's codes, and for each of the C where it
    went.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        weights: Tensor,
        decoder: Tensor,
        columns: tuple[int, ...],
        back: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(vectors, weights, decoder)
        ctx.columns, ctx.back = columns, back
        output = vectors.new_empty(len(vectors), len(decoder), decoder.shape[2])
        for inputs, out in _inputs(vectors, weights, columns, output):
            out.copy_(torch.bmm(inputs, decoder).transpose(0, 1))
        return output.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, weights, decoder = ctx.saved_tensors
        moved, learned = torch.empty_like(vectors), torch.zeros_like(decoder)
        back = constant_tensor(ctx.back, vectors.device)
        codes = decoder[:, : decoder.shape[1] - weights.shape[2]].transpose(1, 2).contiguous()
        given = gradient.view(len(vectors), len(decoder), -1)
        step = _step(vectors)
        for (inputs, own), to in zip(
            _inputs(vectors, weights, ctx.columns, given), torch.split(moved, step), strict=True
        ):
            part = own.transpose(0, 1).contiguous()
            learned.baddbmm_(inputs.transpose(1, 2), part)
            by_feature = torch.bmm(part, codes).transpose(0, 1).flatten(1)
            torch.index_select(by_feature, 1, back, out=to)
        return moved, None, learned, None, None


def _inputs(
    vectors: Tensor, weights: Tensor, columns: tuple[int, ...], others: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (F, b, R + blocks) codes and weights of some bags, and the same rows of `others`."""
    chosen = constant_tensor(columns, vectors.device)
    step, (count, bags, levels) = _step(vectors), weights.shape
    rank = len(columns) // count
    room = vectors.new_empty(count, min(step, bags), rank + levels)
    parts = (torch.split(vectors, step), torch.split(weights, step, dim=1))
    for own, weight, other in zip(*parts, torch.split(others, step), strict=True):
        inputs = room[:, : len(own)]
        codes = own.index_select(1, chosen).view(len(own), count, rank)
        inputs[:, :, :rank].copy_(codes.transpose(0, 1))
        inputs[:, :, rank:].copy_(weight)
        yield inputs, other


def _step(vectors: Tensor) -> int:
    """Returns how many bags are decoded at a time; other devices have no such caches."""
    return _BAGS if vectors.device.type == "cpu" else max(len(vectors), 1)
