"""One batch of training examples."""

from dataclasses import dataclass
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
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Returns the batch on `device`."""
        return Batch(
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
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=None if self.weights is None else self.weights.pin_memory(),
        )
