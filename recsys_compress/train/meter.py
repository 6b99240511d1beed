"""The training loss: how it is measured, and what is added to it; and the time it takes."""

import math
import time

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_compress.errors import UserError
from recsys_compress.ranks import Ranks
from recsys_compress.train.state import Progress


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


class Clock:
    """The time that a run has taken, in all the processes that it has gone on in."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._counted = time.perf_counter(), 0.0  # CPU time from the start of the process

    def count(self, progress: Progress) -> None:
        """Adds to the run's time what has passed since it was counted last; all processes call."""
        now = time.perf_counter(), sum(self._ranks.gather(time.process_time()))
        progress.seconds += now[0] - self._counted[0]
        progress.cpu_seconds += now[1] - self._counted[1]
        self._counted = now


def check_finite(figure: str, value: float, step: int) -> None:
    """Checks that training has not diverged.

    Raises:
        UserError: it has.
    """
    if not math.isfinite(value):
        raise UserError(
            f"training diverged: {figure} {value} before step {step}; lower train.learning_rate or "
            "embedding.learning_rate"
        )


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
