"""Figures of a model on a split."""

import torch
from torch import nn

from recsys_compress.data.reader import Reader
from recsys_compress.train.metrics import BinaryMetrics


def evaluate(model: nn.Module, reader: Reader, device: torch.device) -> BinaryMetrics:
    """Returns the metrics of a model on all rows of a reader; the model is left in evaluation mode.

    Args:
        model: (dense (B, N), KeyedJaggedTensor) -> (B,) logits.
        reader: of the split.
        device: that the model is on.
    """
    metrics = BinaryMetrics()
    model.eval()
    with torch.no_grad():
        for batch in reader:
            batch = batch.to(device)
            metrics.update(model(batch.dense, batch.sparse), batch.labels, batch.weights)
    return metrics
