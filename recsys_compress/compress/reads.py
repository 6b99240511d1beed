"""Which rows the ids of a table read, and what their vectors are."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.lowering import Lookup, Lowering
from recsys_compress.compress.merge import MAX_ROWS
from recsys_compress.errors import UserError

_CHUNK = 1 << 16  # ids that are looked up at a time
_CHUNK_BYTES = 64 << 20  # and of their vectors, since those of all features come out


class Collection(Protocol):
    """Tables as trained or as served."""

    def __call__(self, features: KeyedJaggedTensor, /) -> KeyedTensor:
        """Looks up and pools."""
        ...

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the logical tables."""
        ...

    def is_weighted(self) -> bool:
        """Whether bags come with a weight for each id."""
        ...


def one_feature(
    keys: Sequence[str], feature: str, ids: Tensor, *, is_weighted: bool = False
) -> KeyedJaggedTensor:
    """Returns bags of one id each for one feature, and empty ones for the others.

    Args:
        keys: all features.
        feature: the one whose bags hold `ids`.
        ids: (N,) an id for each bag.
        is_weighted: whether ids come with a weight, which is 1.
    """
    lengths = torch.zeros(len(keys), len(ids), dtype=torch.int64)
    lengths[list(keys).index(feature)] = 1
    return KeyedJaggedTensor(
        keys=list(keys),
        values=ids,
        lengths=lengths.view(-1),
        weights=torch.ones(len(ids)) if is_weighted else None,
        stride=len(ids),
    )


def all_vectors(collection: Collection, table: str, device: torch.device | None = None) -> Tensor:
    """Returns the (n, D) vectors of all ids of a logical table, on CPU.

    Args:
        collection: the tables.
        table: name of the logical table.
        device: that the collection is on; None for the CPU.

    Raises:
        UserError: its ids are hashes, too many to look at.
    """
    configs = collection.embedding_bag_configs()
    config = next(t for t in configs if t.name == table)
    if config.num_embeddings > MAX_ROWS:
        raise UserError(
            f"table {table!r}: has {config.num_embeddings:,} ids, too many to take over one by "
            "one; prepare the data with --encoding vocabulary"
        )
    keys = [feature for t in configs for feature in t.feature_names]
    own, weighted = config.feature_names[0], collection.is_weighted()
    width = sum(t.embedding_dim * len(t.feature_names) for t in configs)
    chunk = min(_CHUNK, max(1, _CHUNK_BYTES // (4 * width)))
    with torch.no_grad():
        chunks = [
            collection(one_feature(keys, own, ids, is_weighted=weighted).to(device or ids.device))[
                own
            ]
            .clone()
            .cpu()
            for ids in torch.split(torch.arange(config.num_embeddings), chunk)
        ]
    return torch.cat(chunks)


def rows_read(lowering: Lowering, feature: str, ids: Tensor) -> list[tuple[Lookup, Tensor, Tensor]]:
    """Returns what each look-up of a feature reads.

    Args:
        lowering: of the feature's table, and perhaps of others.
        feature: the feature.
        ids: (N,) its ids.

    Returns:
        For each look-up of the feature the (R,) positions of those of the ids that it reads rows
        for, rising, and the (R,) rows, in its physical table.
    """
    own = [i for i, lookup in enumerate(lowering.lookups) if lookup.feature == feature]
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in own]
    for number, chunk in enumerate(torch.split(ids, _CHUNK)):
        # The look-ups of all features come out, so all ids at once would take much memory.
        emitted = lowering.ids(one_feature(lowering.features, feature, chunk))
        lengths = emitted.lengths().view(len(lowering.lookups), -1)
        rows = torch.split(emitted.values().long(), lengths.sum(dim=1).tolist())
        for found, i in zip(read, own, strict=True):
            found.append((lengths[i].nonzero().squeeze(1) + number * _CHUNK, rows[i]))
    return [
        (lowering.lookups[i], torch.cat([w for w, _ in found]), torch.cat([r for _, r in found]))
        for found, i in zip(read, own, strict=True)
    ]
