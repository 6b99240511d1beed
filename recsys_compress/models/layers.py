"""Parts that the models share: ordered embeddings, width checks, dense layers."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys_compress.errors import UserError


class DeepSettings(Protocol):
    """The settings of hidden layers, which every model's config has."""

    @property
    def batch_norm(self) -> bool:
        """Whether hidden layers are batch-normalised."""

    @property
    def dropout(self) -> float:
        """Dropout rate of hidden layers."""


class FeatureVectors(nn.Module):
    """The pooled embeddings as one matrix, features in the order of the tables' configs.

    A sharded collection groups its keys by kind of table and by rank, so the order of a
    `KeyedTensor` says nothing. This is a module, not a function, so that the tracer of TorchRec's
    training pipeline takes it as one opaque step.

    Args:
        embeddings: anything with `embedding_bag_configs()`, like an `EmbeddingBagCollection`.

    Attributes:
        names: the F keys, in the order of the output's columns.
        widths: the width D of each feature's vector.

    Raises:
        UserError: there is no feature.
    """

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        configs = embeddings.embedding_bag_configs()
        # A feature that is looked up in two tables has the keys "feature@table".
        keys = get_embedding_names_by_table(configs)
        self.names: list[str] = [key for table in keys for key in table]
        self.widths: list[int] = [
            config.embedding_dim for config, table in zip(configs, keys, strict=True) for _ in table
        ]
        if not self.names:
            raise UserError("a model needs at least one categorical feature; the data have none")

    @property
    def width(self) -> int:
        """Columns of the output: the sum of all widths."""
        return sum(self.widths)

    def equal_width(self, model: str) -> int:
        """Returns the one width D that all features have.

        Raises:
            UserError: two features differ.
        """
        first = self.widths[0]
        for name, width in zip(self.names, self.widths, strict=True):
            if width != first:
                raise UserError(
                    f"model {model!r} needs vectors of one width, but feature {name!r} has {width} "
                    f"and {self.names[0]!r} has {first}; give all one dim, or use model 'dcnv2'"
                )
        return first

    def forward(self, pooled: KeyedTensor) -> Tensor:
        """Returns the (B, sum of D) matrix; no copy where the keys already stand in order."""
        if pooled.keys() == self.names:
            values: Tensor = pooled.values()
            return values
        vectors = pooled.to_dict()
        return torch.cat([vectors[name] for name in self.names], dim=1)


def linear(in_width: int, out_width: int, *, bias: bool = True) -> nn.Linear:
    """Returns a linear layer, Xavier-normal with zero bias, as in the models' public code."""
    layer = nn.Linear(in_width, out_width, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(
    in_width: int, hidden: Sequence[int], settings: DeepSettings, *, out_width: int | None = None
) -> nn.Sequential:
    """Returns linear, batch norm, ReLU and dropout for each hidden width.

    Args:
        in_width: columns of the input.
        hidden: widths of the hidden layers; may be empty.
        settings: of the hidden layers.
        out_width: width of a last, linear layer; None for none.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        # Batch norm subtracts the mean, and with it any bias.
        layers.append(linear(in_width, width, bias=not settings.batch_norm))
        if settings.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if settings.dropout > 0:
            layers.append(nn.Dropout(settings.dropout))
        in_width = width
    if out_width is not None:
        layers.append(linear(in_width, out_width))
    return nn.Sequential(*layers)
