"""Random ids, made with torch alone: an environment without TorchRec has the same ones."""

import torch
from torch import Tensor

from benchmarks.case import Shape


def random_ids(shape: Shape, *, zipf: float, count: int, seed: int = 0) -> Tensor:
    """Returns (count, F x B) ids, features outermost.

    Args:
        shape: the workload.
        zipf: exponent of the ids' frequencies; 0 for uniform.
        count: distinct batches.
        seed: of the ids.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (count, shape.features * shape.batch)
    u = torch.rand(size, dtype=torch.float64, generator=generator)
    power, rows = 1 - zipf, shape.rows_per_table
    # Inverse of the integral of x**-zipf from 1 to rows + 1.
    ranks = (1 + u * ((rows + 1) ** power - 1)) ** (1 / power) - 1
    ranks = ranks.long().clamp_(max=rows - 1)
    # Rank and id have nothing to do with each other: frequent rows lie anywhere in a table.
    return torch.randperm(rows, generator=generator)[ranks]
