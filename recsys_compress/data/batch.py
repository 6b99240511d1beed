"""One batch of training examples."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B examples, ready for a CTR model.

    Attributes:
        dense: (B, N) float32, the N dense features; N may be 0.
        sparse: one key per categorical feature, in schema order, stride B, int64 ids.
        labels: (B,) float32, 0 or 1.
        weights: (B,) float32 example weights, or None where every example counts once.
        padding: number of examples at the end that stand for none: they have no ids and weight 0,
            and are there so that all processes have batches of one size.
        total: examples of this step over all processes; of this batch, unless given.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor | None = None
    padding: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.total = self.total or len(self)

    def __len__(self) -> int:
        return int(self.labels.shape[0]) - self.padding

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Returns the batch on `device`."""
        return replace(
            self,
            dense=self.dense.to(device=device, non_blocking=non_blocking),
            sparse=self.sparse.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
            weights=None
            if self.weights is None
            else self.weights.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the batch's memory until `stream` is done with it."""
        for tensor in (self.dense, self.labels, *(() if self.weights is None else (self.weights,))):
            tensor.record_stream(stream)
        self.sparse.record_stream(cast("torch.cuda.Stream", stream))

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory, from where copies to a GPU are asynchronous."""
        return replace(
            self,
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=None if self.weights is None else self.weights.pin_memory(),
        )
