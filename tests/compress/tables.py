"""Logical tables, batches and policies that the tests of compression share."""

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import Method, Policy, Rule, TableOptions

ROWS = {"user": 5000, "item": 3000, "genre": 40}


def make_tables(dim: int = 12, pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """Returns three logical tables, the last of which is small and multi-valued."""
    return [
        EmbeddingBagConfig(
            name=name,
            feature_names=[name],
            num_embeddings=rows,
            embedding_dim=dim,
            pooling=pooling if name == "genre" else PoolingType.SUM,
        )
        for name, rows in ROWS.items()
    ]


def make_batch(batch_size: int, seed: int = 0, *, weighted: bool = False) -> KeyedJaggedTensor:
    """Returns single-valued users and items, and bags of 0 to 3 genres with repeats."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(batch_size, dtype=torch.int32)
    genres = torch.randint(0, 4, (batch_size,), generator=generator, dtype=torch.int32)
    lengths = torch.cat([ones, ones, genres])
    values = torch.cat(
        [
            torch.randint(0, rows, (int(n),), generator=generator)
            for rows, n in zip(ROWS.values(), (batch_size, batch_size, genres.sum()), strict=True)
        ]
    )
    weights = torch.rand(len(values), generator=generator) if weighted else None
    return KeyedJaggedTensor(
        keys=list(ROWS), values=values, lengths=lengths, weights=weights, stride=batch_size
    )


def make_policy(method: Method, optimizer: str = "rowwise_adagrad", min_rows: int = 100) -> Policy:
    """Returns a policy that gives `method` every table of `min_rows` or more."""
    options = TableOptions(optimizer=optimizer, dense_rows=10**6)
    return Policy(default=Rule(method=method, options=options), min_rows=min_rows)
