"""Measures how much a trained model's logloss rises where the vectors of its tables change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_compress.compress.curvature import Curvature
from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.train.build import Built

MOST_ROWS = 2_000_000  # of the training split on which it is measured
_FOLDS = 4
_PRIOR = 8.0  # occurrences for which the table's mean counts beside an id's own figure


@dataclass(kw_only=True)
class _Sums:
    """Sums over batches, for one table."""

    dim: int
    curvature: Tensor  # (n,)
    counts: Tensor  # (n,)
    matrices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.matrices = torch.zeros(_FOLDS, self.dim, self.dim, dtype=torch.float64)


def measure(
    built: Built, dataset: PreparedDataset, most_rows: int = MOST_ROWS
) -> dict[str, Curvature]:
    """Returns the curvature of each table, by a pass over (part of) the training split.

    Nothing is trained: the backward pass stops at the tables' output.

    Args:
        built: the trained model.
        dataset: what it was trained on.
        most_rows: rows that are read at most.
    """
    embeddings = built.embeddings
    tables = embeddings.embedding_bag_configs()
    sums = {
        table.name: _Sums(
            dim=table.embedding_dim,
            curvature=torch.zeros(table.num_embeddings, dtype=torch.float64),
            counts=torch.zeros(table.num_embeddings, dtype=torch.float64),
        )
        for table in tables
    }
    most = max(1, min(most_rows, dataset.rows("train")) // _FOLDS)  # so that every fold has some
    size = min(built.job.train.eval_batch_size, most)
    reader = Reader(dataset, "train", batch_size=size, seed=0, shuffle=True)
    pooled: list[KeyedTensor] = []
    hook = embeddings.register_forward_hook(lambda _m, _x, output: pooled.append(output))
    built.model.eval()
    rows, masses = [0] * _FOLDS, [0.0] * _FOLDS
    for number, batch in enumerate(reader.epoch(0)):
        fold = number % _FOLDS
        rows[fold] += len(batch)
        masses[fold] += len(batch) if batch.weights is None else float(batch.weights.sum())
        pooled.clear()
        _add(built, batch.to(built.device), tables, pooled, sums, fold)
        if sum(rows) >= most_rows:
            break
    hook.remove()
    used = [fold for fold in range(_FOLDS) if masses[fold] > 0]
    sizes = torch.tensor([masses[fold] for fold in used], dtype=torch.float64)
    return {
        name: Curvature(
            weights=_weights(found, torch.tensor(dataset.frequencies(name)).double()),
            matrices=found.matrices[used] / sizes.view(-1, 1, 1),
        )
        for name, found in sums.items()
    }


def _add(
    built: Built,
    batch: Batch,
    tables: list[EmbeddingBagConfig],
    pooled: list[KeyedTensor],
    sums: Mapping[str, _Sums],
    fold: int,
) -> None:
    """Counts a batch in."""
    logits = built.model.module(batch.dense, batch.sparse)
    (gradient,) = torch.autograd.grad(logits.sum(), pooled[0].values())
    by_key = dict(
        zip(
            pooled[0].keys(),
            torch.split(gradient.double().cpu(), pooled[0].length_per_key(), dim=1),
            strict=True,
        )
    )
    p = torch.sigmoid(logits.detach().double().cpu())
    second = p * (1 - p)
    if batch.weights is not None:
        second *= batch.weights.double().cpu()
    for table in tables:
        found = sums[table.name]
        for feature in table.feature_names:
            bags, g = batch.sparse[feature], by_key[feature]
            lengths = bags.lengths().cpu().long()
            example = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            scale = torch.ones(len(example), dtype=torch.float64)
            if table.pooling == PoolingType.MEAN:
                scale /= lengths[example].square()
            if bags.weights_or_none() is not None:
                scale *= bags.weights().double().cpu().square()
            each = second[example] * scale
            ids = bags.values().cpu().long()
            found.curvature.index_add_(0, ids, each * g.square().sum(dim=1)[example])
            found.counts.index_add_(0, ids, torch.ones_like(each))
            found.matrices[fold] += g[example].t() @ (each.unsqueeze(1) * g[example])


def _weights(sums: _Sums, frequencies: Tensor) -> Tensor:
    """Returns (n,) a_r: an id's frequency times its mean curvature, rare ids' near the table's."""
    mean = sums.curvature.sum() / sums.counts.sum().clamp(min=1)
    own = (sums.curvature + _PRIOR * mean) / (sums.counts + _PRIOR)
    weights = own * frequencies
    return weights / weights.sum().clamp(min=1e-300)
