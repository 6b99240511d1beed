"""The bags of a batch, as what combines their look-ups sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass
class LogicalTable(EmbeddingBagConfig):
    """A logical table of which more is known than torchrec's form says.

    Attributes:
        single_valued: whether no bag of its features ever has more than one id.
    """

    single_valued: bool = False


def is_single_valued(table: EmbeddingBagConfig) -> bool:
    """Returns whether a table is known to be; of torchrec's own form that is not known."""
    return isinstance(table, LogicalTable) and table.single_valued


@dataclass(frozen=True, kw_only=True)
class Bags:
    """The bags of the features of a `Lowering`; what is not asked for costs nothing.

    Attributes:
        features: of the batch, these and perhaps others.
        names: (F,) of the features.
        is_weighted: whether ids come with weights.
    """

    features: KeyedJaggedTensor
    names: Sequence[str]
    is_weighted: bool

    def weights(self) -> Tensor:
        """Returns (B, F) the total weight of each bag, or its length without weights."""
        keys, lengths = self.features.keys(), self.features.lengths()
        totals = lengths.float()
        if self.is_weighted:
            given, lengths = self.features.weights(), lengths.long()
            totals = torch.segment_reduce(given, "sum", lengths=lengths, initial=0)
        return totals.view(len(keys), -1)[[keys.index(name) for name in self.names]].t()


def without_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Returns bags without weights, which collections that are not weighted do not look at."""
    if features.weights_or_none() is None:
        return features
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        stride=features.stride(),
        length_per_key=features.length_per_key(),
    )


def select(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Returns the named features in their order, without a copy where that is how they stand.

    Raises:
        ValueError: one is missing.
    """
    keys = features.keys()
    if keys == names:
        return features
    missing = set(names) - set(keys)
    if missing:
        raise ValueError(f"features {sorted(missing)} are missing; the batch has {keys}")
    return features.permute([keys.index(name) for name in names])
