"""Search of a soft selection by gradients of the validation loss.

Source: Cheng et al., "Differentiable Neural Input Search for Recommender Systems",
arXiv 2006.04466; the second order as in Liu et al., "DARTS", ICLR 2019, equations 7 and 8.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.hook import Hook, LiveTable, SearchStep
from recsys_compress.compress.lowering import Lowering
from recsys_compress.compress.slice_sums import ScaledSlices
from recsys_compress.compress.slices import SliceIds
from recsys_compress.ranks import Ranks

_STABLE = 1e-8  # added to the mean gradient that gradients are divided by
_RADIUS = 0.01  # length of the step over which the second order takes a difference, as in DARTS


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of one physical table and the direction to move them in."""

    weight: Tensor  # (rows, stored D), live
    rows: Tensor  # (R,) those that are here, no two alike
    saved: Tensor  # (R, D)
    direction: Tensor  # (R, D)
    length: Tensor  # of the directions of all rows of the table, squared


class AlphaSearch(Hook):
    """Moves the alpha of a soft selection after each training step, and nothing else.

    g_l = d L_valid / d alpha_l + l1 * sign(alpha_l), for each block l;
    alpha_l <- clamp(alpha_l - alpha_lr * g_l / (mean |g_l| + 1e-8), 0, 1).

    The division (the paper's gradient normalisation) makes rare blocks learn as fast as frequent
    ones. A block that the validation batch does not touch has no gradient but `l1`, which the
    division would blow up to a full step; such a block stays as it is.

    Args:
        lowering: made by `scaled`; its `combine` holds alpha, (blocks, D).
        alpha_lr: step size.
        l1: pressure on alpha towards zero.
        inner_lr: learning rate xi of the training step that is unrolled; 0 for first order.
    """

    def __init__(self, lowering: Lowering, *, alpha_lr: float, l1: float, inner_lr: float) -> None:
        self._combine = cast("ScaledSlices", lowering.combine)
        self._ids = cast("SliceIds", lowering.ids)
        self._tables = [lookup.table for lookup in lowering.lookups]
        self.parameters = (self._combine.alpha,)
        self._alpha_lr = alpha_lr
        self._l1 = l1
        self._inner_lr = inner_lr

    def bind(self, table: Callable[[str], LiveTable]) -> None:
        """Takes alpha out of training steps, which hold it fixed: its gradient is not free."""
        self._table = table
        self._combine.alpha.requires_grad_(False)

    def search(self, step: SearchStep) -> None:
        """Takes a step of alpha."""
        with self._learning() as alpha:
            gradient = self._gradient(step, alpha)
        with torch.no_grad():
            gradient = Ranks.current().mean_(gradient)
            touched = gradient.any(dim=1, keepdim=True)
            gradient = gradient + self._l1 * alpha.sign()
            gradient = gradient / (gradient.abs().mean(dim=1, keepdim=True) + _STABLE)
            alpha.sub_(self._alpha_lr * gradient * touched).clamp_(0.0, 1.0)

    @contextmanager
    def _learning(self) -> Iterator[Tensor]:
        alpha = self._combine.alpha.requires_grad_()
        try:
            yield alpha
        finally:
            alpha.requires_grad_(False)

    def _gradient(self, step: SearchStep, alpha: Tensor) -> Tensor:
        """Returns d L_valid / d alpha, through the training step if `inner_lr` is set."""
        if not self._inner_lr:
            return torch.autograd.grad(step.valid_loss(), alpha)[0]
        with self._combine.watched() as watched:
            loss = step.valid_loss()
        gradient, pooled = torch.autograd.grad(loss, [alpha, watched.vectors])
        return gradient - self._inner_lr * self._curvature(step, alpha, pooled)

    @torch.no_grad()
    def _curvature(self, step: SearchStep, alpha: Tensor, pooled: Tensor) -> Tensor:
        """Returns the derivative of L_train by alpha and w, times v = d L_valid / d w.

        It is (d L_train(w + eps v) / d alpha - d L_train(w - eps v) / d alpha) / (2 eps), where w
        are the rows that the validation batch looks up.

        Args:
            step: the batches and losses.
            alpha: the soft selection.
            pooled: (B, K x D) gradient of the validation loss by the pooled look-ups.
        """
        moved = self._directions(step.valid, pooled)
        length = torch.stack([rows.length for rows in moved]).sum().sqrt()
        if not length:
            return torch.zeros_like(alpha)
        epsilon = float(_RADIUS / length)
        try:
            ahead = self._train_gradient(step, alpha, moved, epsilon)
            behind = self._train_gradient(step, alpha, moved, -epsilon)
        finally:
            for rows in moved:  # by copy: what is added and subtracted again is not the same
                _write(rows, rows.saved)
        return (ahead - behind) / (2 * epsilon)

    def _train_gradient(
        self, step: SearchStep, alpha: Tensor, moved: Sequence[_Rows], epsilon: float
    ) -> Tensor:
        for rows in moved:
            _write(rows, rows.saved + epsilon * rows.direction)
        with torch.enable_grad():
            return torch.autograd.grad(step.train_loss(), alpha)[0]

    def _directions(self, features: KeyedJaggedTensor, pooled: Tensor) -> list[_Rows]:
        """Returns the rows that `features` look up, and the gradient of each."""
        keys = features.keys()
        own = features.permute([keys.index(name) for name in self._ids.features])
        lookups = self._ids(own)
        lengths = lookups.lengths().long()
        bags = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        by_lookup = pooled.view(len(pooled), len(self._tables), -1).transpose(0, 1)
        gradients = by_lookup.reshape(len(lengths), -1)[bags]
        weights = lookups.weights_or_none()
        if weights is not None:
            gradients = gradients * weights.unsqueeze(1)
        sizes = lookups.length_per_key()
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for table, *part in zip(
            self._tables,
            torch.split(lookups.values(), sizes),
            torch.split(gradients, sizes),
            strict=True,
        ):
            parts.setdefault(table, []).append((part[0], part[1]))
        return [self._table_rows(table, given) for table, given in parts.items()]

    def _table_rows(self, table: str, parts: Sequence[tuple[Tensor, Tensor]]) -> _Rows:
        ranks = Ranks.current()
        looked_up = ranks.concat(torch.cat([r for r, _ in parts]).long())
        rows, places = torch.unique(looked_up, return_inverse=True)
        gradients = ranks.concat(torch.cat([g for _, g in parts])) / ranks.size
        direction = gradients.new_zeros(len(rows), gradients.shape[1])
        direction.index_add_(0, places, gradients)
        live = self._table(table)
        here = (rows >= live.first) & (rows < live.first + len(live.weight))
        rows = rows[here] - live.first
        return _Rows(
            weight=live.weight,
            rows=rows,
            saved=live.weight[rows, : direction.shape[1]],
            direction=direction[here],
            length=direction.square().sum(),
        )


def _write(rows: _Rows, values: Tensor) -> None:
    rows.weight[rows.rows, : values.shape[1]] = values
