"""The sum of what a feature's look-ups of several slices of its ids found."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.bags import Bags, select
from recsys_compress.compress.hashing import constant_tensor

_ROWS = 256  # whose products stay in the cache
_NEVER = 2**31 - 1  # no id is as great


class Watched:
    """The vectors of a pass.

    Attributes:
        vectors: (B, sum of the look-ups' widths).
    """

    vectors: Tensor


@dataclass(frozen=True, kw_only=True)
class Single:
    """A feature whose bags have at most one id, so that one look-up serves all its slices.

    Attributes:
        name: its name.
        feature: its position in the output.
        alpha: row of alpha of its first slice; those of the others follow.
        starts: first id of each slice, from 0 on.
    """

    name: str
    feature: int
    alpha: int
    starts: tuple[int, ...]


class ScaledSlices(nn.Module):
    """Scales each slice and sums, e_f = sum_l alpha_{f,l} * x_{f,l}, elementwise over D.

    Here x_{f,l} is the pooled look-up of slice l of feature f. A feature of `singles` has one
    look-up x_f instead, and e_f = alpha_{f,l} * x_f, where l is the slice of the bag's id. Those
    come first. With the other features sorted by falling number of slices, the first slices of all
    of them follow, then the second ones, and so on, so that what is added is always a prefix.

    Attributes:
        alpha: (slices of all tables, D), from all ones.

    Args:
        singles: (S,) the features of the first look-ups.
        slices: (K - S,) row of `alpha` of each further look-up.
        features: (K - S,) position of each further look-up's feature in the output.
        count: slices of all tables; every one is some look-up's.
        dim: D.
    """

    def __init__(
        self,
        singles: Sequence[Single],
        slices: Sequence[int],
        features: Sequence[int],
        *,
        count: int,
        dim: int,
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(count, dim))
        self._singles = tuple(singles)
        # (most slices, S) first id of each feature's slice
        self._starts = list(
            itertools.zip_longest(*(single.starts for single in singles), fillvalue=_NEVER)
        )
        self._slices = None if list(slices) == list(range(count)) else tuple(slices)
        several = features[: len(set(features))]
        sizes = Counter(features)
        self._widths = [
            sum(sizes[feature] > level for feature in several) * dim
            for level in range(sizes[several[0]] if several else 0)
        ]
        order = [*(single.feature for single in singles), *several]
        places = [
            order.index(feature) * dim + d for feature in range(len(order)) for d in range(dim)
        ]
        self._places = None if places == sorted(places) else tuple(places)
        self._watched: Watched | None = None

    @contextmanager
    def watched(self) -> Iterator["Watched"]:
        """Makes the vectors of the next pass a leaf whose gradient can be asked for."""
        self._watched = Watched()
        try:
            yield self._watched
        finally:
            self._watched = None

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:
        """Returns the features' vectors; see `Lowering.combine`.

        Raises:
            ValueError: a bag of a feature of `singles` has several ids.
        """
        if self._watched is not None:
            vectors = self._watched.vectors = vectors.detach().requires_grad_()
        if not self._singles:
            output = self._summed(vectors)
        elif not self._widths:
            output = self._scaled(vectors, bags)
        else:
            width = len(self._singles) * self.alpha.shape[1]
            one, several = torch.split(vectors, [width, sum(self._widths)], dim=1)
            output = torch.cat([self._scaled(one, bags), self._summed(several)], dim=1)
        if self._places is None:
            return output
        return _Permute.apply(output, self._places)  # type: ignore[no-untyped-call,no-any-return]

    def _scaled(self, vectors: Tensor, bags: Bags) -> Tensor:
        """Returns (B, S x D) of the singles' vectors."""
        names = [single.name for single in self._singles]
        ids = _one_each(select(bags.features, names)).view(len(names), -1)
        slices = torch.zeros_like(ids)
        for starts in self._starts[1:]:
            slices += ids >= constant_tensor(starts, ids.device).int().unsqueeze(1)
        firsts = constant_tensor(tuple(s.alpha for s in self._singles), ids.device).int()
        output: Tensor = _ScaleRows.apply(  # type: ignore[no-untyped-call]
            vectors, self.alpha, slices, firsts.unsqueeze(1), len(self._starts)
        )
        return output

    def _summed(self, vectors: Tensor) -> Tensor:
        """Returns (B, (F - S) x D) of the other look-ups' vectors."""
        alpha: Tensor = self.alpha
        if self._slices is not None:
            alpha = alpha.index_select(0, constant_tensor(self._slices, alpha.device))
        output: Tensor = _Scale.apply(  # type: ignore[no-untyped-call]
            vectors, alpha.view(-1), self._widths
        )
        return output


class PlacedSlices(nn.Module):
    """Places each column of the look-ups and sums, e_{f,d} = sum_l x_{f,l,k(f,l,d)}.

    Args:
        targets: column of the output that each column of the look-ups is added to.
        width: sum of the features' D.
    """

    def __init__(self, targets: Sequence[int], width: int) -> None:
        super().__init__()
        sources: list[list[int]] = [[] for _ in range(width)]
        for source, target in enumerate(targets):
            sources[target].append(source)
        # With the columns of most addends first, the second, third ... of each make a prefix.
        order = sorted(range(width), key=lambda column: -len(sources[column]))
        self._levels = tuple(
            tuple(sources[column][level] for column in order if level < len(sources[column]))
            for level in range(len(sources[order[0]]))
        )
        places = {column: place for place, column in enumerate(order)}
        self._order = tuple(places[column] for column in range(width))
        self._targets = tuple(targets)

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:  # noqa: ARG002
        """Returns the features' vectors; see `Lowering.combine`."""
        output: Tensor = _Place.apply(  # type: ignore[no-untyped-call]
            vectors, self._levels, self._order, self._targets
        )
        return output


class _ScaleRows(torch.autograd.Function):
    """Scales each vector by its row of alpha, some bags at a time so that little leaves the cache.

    Takes (B, S x D) vectors, (rows, D) alpha, and as int32 (S, B) slices and (S, 1) rows of alpha
    of each feature's first slice; and the most slices of a feature.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, alpha: Tensor, slices: Tensor, firsts: Tensor, most: int
    ) -> Tensor:
        ctx.save_for_backward(vectors, alpha, slices, firsts)
        ctx.most = most
        return _times_rows(vectors, alpha, slices + firsts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, alpha, slices, firsts = ctx.saved_tensors
        moved = learned = None
        if ctx.needs_input_grad[0]:
            moved = _times_rows(gradient, alpha, slices + firsts)
        if ctx.needs_input_grad[1]:
            levels = torch.arange(ctx.most, device=slices.device)
            sums = gradient.new_zeros(len(slices), len(levels), alpha.shape[1])
            parts = (torch.split(t, _ROWS) for t in (vectors, gradient, slices.t()))
            for own, given, of in zip(*parts, strict=True):
                # Sums by slice as a product with ones and zeros: index_add_ takes thrice as long.
                chosen = of.t().unsqueeze(1) == levels.unsqueeze(1)
                products = (own * given).view(len(of), len(slices), -1).transpose(0, 1)
                sums.baddbmm_(chosen.to(sums.dtype), products)
            # Where a feature has fewer slices than others, its further sums are zero.
            rows = (firsts + levels).clamp_(max=len(alpha) - 1).view(-1)
            learned = torch.zeros_like(alpha)
            learned.index_add_(0, rows, sums.flatten(0, 1).to(alpha.dtype))
        return moved, learned, None, None, None


def _times_rows(vectors: Tensor, alpha: Tensor, rows: Tensor) -> Tensor:
    """Returns (B, S x D) vectors times (rows, D) alpha's rows, given as (S, B)."""
    output = vectors.new_empty(vectors.shape, dtype=torch.result_type(vectors, alpha))
    parts = (torch.split(t, _ROWS) for t in (vectors, rows.t().contiguous(), output))
    for own, of, out in zip(*parts, strict=True):
        torch.mul(own, embedding(of, alpha).view_as(own), out=out)
    return output


class _Scale(torch.autograd.Function):
    """Sums scaled levels in place; autograd's own formula would keep a product of each."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, factors: Tensor, widths: list[int]) -> Tensor:
        ctx.save_for_backward(vectors, factors)
        ctx.widths = widths
        levels = list(
            zip(torch.split(vectors, widths, dim=1), torch.split(factors, widths), strict=True)
        )
        output: Tensor = levels[0][0] * levels[0][1]
        for level, factor in levels[1:]:
            output[:, : len(factor)].addcmul_(level, factor)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        vectors, factors = ctx.saved_tensors
        moved = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        learned = torch.zeros_like(factors) if ctx.needs_input_grad[1] else None
        start = 0
        for width in ctx.widths:
            columns, part = slice(start, start + width), gradient[:, :width]
            if moved is not None:
                torch.mul(part, factors[columns], out=moved[:, columns])
            if learned is not None:
                parts = torch.split(vectors[:, columns], _ROWS), torch.split(part, _ROWS)
                for rows, own in zip(*parts, strict=True):
                    learned[columns] += (rows * own).sum(dim=0)
            start += width
        return moved, learned, None


class _Place(torch.autograd.Function):
    """Sums columns. Both ways columns are gathered: a scatter takes ten times as long on CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        levels: tuple[tuple[int, ...], ...],
        order: tuple[int, ...],
        targets: tuple[int, ...],
    ) -> Tensor:
        ctx.targets = targets
        output = vectors.new_zeros(len(vectors), len(order))
        for level in levels:
            source = constant_tensor(level, vectors.device)
            output[:, : len(level)] += vectors.index_select(1, source)
        return output.index_select(1, constant_tensor(order, vectors.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            gradient.index_select(1, constant_tensor(ctx.targets, gradient.device)),
            None,
            None,
            None,
        )


class _Permute(torch.autograd.Function):
    """Permutes columns; autograd's own way back is a slow scatter."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, places: tuple[int, ...]) -> Tensor:
        ctx.places = places
        return columns.index_select(1, constant_tensor(places, columns.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        back = constant_tensor(ctx.places, gradient.device).argsort()
        return gradient.index_select(1, back), None


def _one_each(features: KeyedJaggedTensor) -> Tensor:
    """Returns (F x B,) the id of each bag, 0 for an empty one, in 32 bits, which hold any row.

    Raises:
        ValueError: a bag has several.
    """
    ids, lengths = features.values().int(), features.lengths()
    if len(lengths) and int(lengths.max()) > 1:
        raise ValueError("a feature that is said to be single-valued has several ids in a bag")
    if len(ids) == len(lengths):
        return ids
    padded = ids.new_zeros(len(lengths))
    padded[lengths.bool()] = ids
    return padded
