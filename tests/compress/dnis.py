"""Tables under `dnis`, and what they must give, put together by hand."""

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.methods.dnis import DNIS
from tests.compress.tables import make_policy, make_tables


def make(
    method: DNIS,
    tables: list[EmbeddingBagConfig] | None = None,
    optimizer: str = "rowwise_adagrad",
    *,
    is_weighted: bool = False,
) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(
        tables=tables or make_tables(),
        policy=make_policy(method, optimizer, min_rows=0),
        is_weighted=is_weighted,
    )


def dense_tables(method: DNIS, collection: CompressedEmbeddingBagCollection) -> dict[str, Tensor]:
    """Returns the (n, D) vectors of all ids, put together by hand from the physical tables."""
    (values,) = collection.values(collection.state_dict())
    tables = {}
    for table in make_tables():
        dense = torch.zeros(table.num_embeddings, table.embedding_dim)
        for part in method.slices([table]):
            for column, dim in enumerate(part.dims):
                rows = slice(part.first, part.first + part.ids)
                dense[rows, dim] = values.tables[part.name][:, column]
        tables[table.name] = dense
    return tables


def pooled(tables: dict[str, Tensor], batch: KeyedJaggedTensor) -> Tensor:
    """Returns the bags' sums by a loop over bags."""
    columns = []
    for name, table in tables.items():
        bags = batch[name]
        weights = bags.weights_or_none()
        rows = table[bags.values()]
        if weights is not None:
            rows = rows * weights[:, None]
        columns.append(torch.stack([r.sum(0) for r in rows.split(bags.lengths().tolist())]))
    return torch.cat(columns, dim=1)


def soft(**knobs: float) -> DNIS:
    return DNIS(soft=True, num_blocks=3, growth=2.0, **knobs)


def set_alpha(collection: CompressedEmbeddingBagCollection) -> Tensor:
    """Gives alpha random values and returns it."""
    alpha = collection.output.combines["0"].alpha
    with torch.no_grad():
        alpha.copy_(torch.rand(alpha.shape, generator=torch.Generator().manual_seed(1)))
    return alpha
