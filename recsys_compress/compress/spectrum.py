"""Principal components of what tables and layers give out, and ranks chosen to a byte budget.

Source: atomic feature mimicking, Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but
Weights Are Not!", AAAI 2023; for CTR models Guo et al., "Unified Low-rank Compression Framework for
Click-through Rate Prediction", KDD 2024. They choose one rank by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys_compress.compress.budget import out_of_reach
from recsys_compress.compress.lowering import FP32_BYTES, TableOptions
from recsys_compress.compress.moments import Moments

_CELLS = 10_000
_ROUNDING = 1e-14  # of the mean squared norm: about the square of float32's precision


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Centred principal components of outputs y: Cov(y) = U diag(lambda) U^T.

    Of all maps of rank k, y -> U_k U_k^T (y - mu) + mu loses the least of the outputs, in squared
    error: the sum of the eigenvalues beyond the first k.

    Attributes:
        mean: (D,) float64, mu.
        eigenvalues: (D,) float64, falling, none below 0.
        eigenvectors: (D, D) float64, U, a column each.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @staticmethod
    def of(moments: Moments) -> "Spectrum":
        """Returns the spectrum of outputs by their moments; that of none is zero."""
        if not moments.count:
            dim = len(moments.total)
            none, eye = torch.zeros(dim).double(), torch.eye(dim).double()
            return Spectrum(mean=none, eigenvalues=none, eigenvectors=eye)
        values, vectors = torch.linalg.eigh(moments.covariance())  # rising
        is_rounding = values <= _ROUNDING * moments.outer.trace() / moments.count
        return Spectrum(
            mean=moments.mean(),
            eigenvalues=values.masked_fill(is_rounding, 0).flip(0),
            eigenvectors=vectors.flip(1),
        )

    def basis(self, rank: int) -> Tensor:
        """Returns (D, rank) the first columns of U."""
        return self.eigenvectors[:, :rank]

    def lost(self) -> Tensor:
        """Returns (D + 1,) the variance that is lost at rank 0, 1, ..., D: all of it, ..., none."""
        from_last = self.eigenvalues.flip(0).cumsum(0).flip(0)
        return torch.cat([from_last, from_last.new_zeros(1)])

    def lost_share(self, unit: float | None = None) -> Tensor:
        """Returns `lost` by a unit, the whole variance unless given; zeros where that is zero."""
        lost = self.lost()
        unit = float(lost[0]) if unit is None else unit
        return lost / (unit or 1.0)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table or a layer whose rank is to be chosen.

    Attributes:
        name: unique among the items.
        ranks: rising; the last is its whole width, and means that it is left whole.
        sizes: (same length) bytes at each rank, rising.
        losses: (same length) what is lost at each rank, in a unit common to all items, falling.
    """

    name: str
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    losses: tuple[float, ...]

    @staticmethod
    def of(name: str, steps: Sequence[tuple[int, int]], lost: Tensor) -> "Item":
        """Returns an item.

        Args:
            name: its name.
            steps: its ranks with their bytes, rising.
            lost: (D + 1,) what is lost at rank 0, 1, ..., D.
        """
        losses = lost.tolist()
        return Item(
            name=name,
            ranks=tuple(rank for rank, _ in steps),
            sizes=tuple(size for _, size in steps),
            losses=tuple(losses[rank] for rank, _ in steps),
        )


def rank_steps(
    ids: int, dim: int, options: TableOptions, *, least: int = 1
) -> list[tuple[int, int]]:
    """Returns (rank, bytes) of codes with a decoder and a mean: the ranks worth having, rising.

    A code of such a rank has no padding, and all takes fewer values than the rows in full, which
    are the last step.

    Args:
        ids: number of the rows.
        dim: D, their width.
        options: how they are stored.
        least: rank from which on; at 0 all that is left is the mean.
    """
    steps = [
        (rank, ids * options.row_bytes(rank) + (rank + 1) * dim * FP32_BYTES)
        for rank in range(least, dim)
        if options.stored_dim(rank) == rank and saves(ids, dim, rank)
    ]
    return [*steps, (dim, ids * options.row_bytes(dim))]


def saves(ids: int, dim: int, rank: int) -> bool:
    """Whether codes of a rank, with a decoder and a mean, have fewer values than the rows."""
    return rank * (ids + dim) + dim < ids * dim


def layer_item(
    name: str,
    layer: nn.Linear,
    spectrum: Spectrum,
    *,
    activation: bool = False,
    lost: Tensor | None = None,
) -> Item:
    """Returns a linear layer as an item: a product of k (in + out) weights, or in * out.

    Only ranks that make the layer smaller are offered; the last, `layer.out_features`, means whole.

    Args:
        name: of the layer.
        layer: the layer.
        spectrum: of its outputs.
        activation: whether there is one between the two factors, and so one bias more.
        lost: (out + 1,) what is lost at each rank; None for the share of its outputs' variance.
    """
    width, biases = layer.in_features + layer.out_features, layer.out_features
    whole = layer.weight.numel() + (0 if layer.bias is None else biases)
    values = [rank * (width + activation) + biases for rank in range(1, layer.out_features)]
    steps = [(k, v) for k, v in enumerate(values, 1) if v < whole] + [(layer.out_features, whole)]
    steps = [(rank, values * FP32_BYTES) for rank, values in steps]
    return Item.of(name, steps, spectrum.lost_share() if lost is None else lost)


def choose_ranks(name: str, items: Sequence[Item], budget_bytes: int) -> list[int]:
    """Chooses the ranks of all items together such that the sum of their losses is least.

    This is the multiple-choice knapsack problem, solved by dynamic programming over the bytes, in
    cells of at most 0.01 % of the budget (each size is rounded up, so it is never exceeded).

    Args:
        name: of the method, for messages.
        items: what shares the budget.
        budget_bytes: for all of them.

    Returns:
        The items' ranks; the whole width of one that is best left whole.

    Raises:
        UserError: the least ranks take more.
    """
    least, whole = (sum(item.sizes[end] for item in items) for end in (0, -1))
    if least > budget_bytes:
        raise out_of_reach(name, budget_bytes, least, whole)
    if whole <= budget_bytes:
        return [item.ranks[-1] for item in items]
    left = budget_bytes - least
    if not left:
        return [item.ranks[0] for item in items]
    cells = min(_CELLS, left)
    total = np.zeros(cells + 1)  # least loss of the items so far in so many cells
    picks = []
    for item in items:
        taken = [-(-(size - item.sizes[0]) * cells // left) for size in item.sizes]
        before, total = total, np.full(cells + 1, np.inf)
        pick = np.zeros(cells + 1, dtype=np.int64)
        for level, (cost, loss) in enumerate(zip(taken, item.losses, strict=True)):
            if cost > cells:
                break
            found = before[: cells + 1 - cost] + loss
            better = found < total[cost:]
            total[cost:][better] = found[better]
            pick[cost:][better] = level
        picks.append((item, taken, pick))
    ranks = []
    for item, taken, pick in reversed(picks):
        level = int(pick[cells])
        ranks.append(item.ranks[level])
        cells -= taken[level]
    return ranks[::-1]
