"""Figures of a model on a split."""

from collections.abc import Iterable

import torch
from torch import nn

from recsys_compress.data.batch import Batch
from recsys_compress.ranks import Ranks
from recsys_compress.train.metrics import BinaryMetrics


def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> BinaryMetrics:
    """Returns the metrics of a model on all rows of a split; the model is left in evaluation mode.

    All processes call it, each with its share of the rows, and each gets the figures of all rows.

    Args:
        model: (dense (B, N), KeyedJaggedTensor) -> (B,) logits.
        batches: of this process's share of the split.
        device: that the model is on.
    """
    metrics = BinaryMetrics()
    model.eval()
    with torch.no_grad():
        for batch in batches:
            batch, rows = batch.to(device), slice(len(batch))
            logits = model(batch.dense, batch.sparse)[rows]
            weights = None if batch.weights is None else batch.weights[rows]
            metrics.update(logits, batch.labels[rows], weights)
    return metrics.of_all(Ranks.current())
