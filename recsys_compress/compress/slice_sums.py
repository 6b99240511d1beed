"""The sum of what a feature's look-ups of several slices of its ids found."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recsys_compress.compress.hashing import constant_tensor

_ROWS = 256  # whose products stay in the cache


class Watched:
    """The vectors of a pass.

    Attributes:
        vectors: (B, sum of the look-ups' widths).
    """

    vectors: Tensor


class ScaledSlices(nn.Module):
    """Scales each slice and sums, e_f = sum_l alpha_{f,l} * x_{f,l}, elementwise over D.

    Here x_{f,l} is the pooled look-up of slice l of feature f. With features sorted by falling
    number of slices, the first slices of all features come first, then the second ones, and so on,
    so that what is added is always a prefix of the features.

    Attributes:
        alpha: (slices of all tables, D), from all ones.

    Args:
        slices: (K,) row of `alpha` of each look-up; every row is some look-up's.
        features: (K,) position of each look-up's feature in the output.
        dim: D.
    """

    def __init__(self, slices: Sequence[int], features: Sequence[int], *, dim: int) -> None:
        super().__init__()
        count = max(slices) + 1
        self.alpha = nn.Parameter(torch.ones(count, dim))
        self._slices = None if list(slices) == list(range(count)) else tuple(slices)
        order = features[: len(set(features))]
        sizes = Counter(features)
        self._widths = [
            sum(sizes[feature] > level for feature in order) * dim
            for level in range(sizes[order[0]])
        ]
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

    def forward(self, vectors: Tensor, bag_weights: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the features' vectors; see `Lowering.combine`."""
        if self._watched is not None:
            vectors = self._watched.vectors = vectors.detach().requires_grad_()
        alpha: Tensor = self.alpha
        if self._slices is not None:
            alpha = alpha.index_select(0, constant_tensor(self._slices, alpha.device))
        output: Tensor = _Scale.apply(  # type: ignore[no-untyped-call]
            vectors, alpha.view(-1), self._widths
        )
        if self._places is None:
            return output
        return _Permute.apply(output, self._places)  # type: ignore[no-untyped-call,no-any-return]


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

    def forward(self, vectors: Tensor, bag_weights: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the features' vectors; see `Lowering.combine`."""
        output: Tensor = _Place.apply(  # type: ignore[no-untyped-call]
            vectors, self._levels, self._order, self._targets
        )
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
