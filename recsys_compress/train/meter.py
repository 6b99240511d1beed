"""The training loss: how it is measured, and what is added to it."""

import time

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor


class Meter:
    """Training loss and speed since it was made."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._started = time.perf_counter()
        self.rows = 0

    def add(self, loss: Tensor, rows: int) -> None:
        """Counts a step in."""
        self._losses.append(loss)
        self.rows += rows

    def loss(self) -> float:
        """Returns the mean loss."""
        return float(torch.stack(self._losses).mean())

    @property
    def seconds(self) -> float:
        """Seconds that have passed."""
        return time.perf_counter() - self._started


class Penalty:
    """An L2 penalty on looked-up vectors; hears of them by a hook on the embeddings."""

    def __init__(self, strength: float, embeddings: nn.Module) -> None:
        self._strength = strength
        self._term: Tensor | None = None
        if strength:
            embeddings.register_forward_hook(lambda _module, _inputs, output: self._look(output))

    def added_to(self, loss: Tensor, rows: float) -> Tensor:
        """Returns the loss with the penalty of the last vectors looked up, which is of `rows`."""
        return loss if self._term is None else loss + self._term / rows

    def _look(self, output: KeyedTensor) -> None:
        self._term = self._strength / 2 * output.values().square().sum()
