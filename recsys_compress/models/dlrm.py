"""DLRM: dot products of all pairs of features."""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.config import DLRMConfig
from recsys_compress.errors import UserError
from recsys_compress.models.layers import FeatureVectors, mlp


class DLRM(nn.Module):
    """DLRM (Naumov et al., "Deep Learning Recommendation Model", 2019).

    The bottom part turns the dense features into one more vector of width D. The top part reads
    that vector and the dot product of each pair of vectors, no vector with itself. Without dense
    features there is no bottom part.

    Args:
        config: the model's settings.
        embeddings: maps a `KeyedJaggedTensor` to a `KeyedTensor`, like an `EmbeddingBagCollection`.
        num_dense: number N of dense features; may be 0.

    Raises:
        UserError: features differ in width, or there is no pair of vectors.
    """

    pairs: Tensor

    def __init__(self, config: DLRMConfig, embeddings: nn.Module, num_dense: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.features = FeatureVectors(embeddings)
        dim = self.features.equal_width("dlrm")
        self.shape = (len(self.features.names), dim)
        self.bottom = mlp(num_dense, (*config.bottom, dim), config) if num_dense else None
        vectors = len(self.features.names) + (num_dense > 0)
        if vectors < 2:
            raise UserError("model 'dlrm' needs two features to pair, but has one; use 'dcnv2'")
        row, column = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("pairs", row * vectors + column, persistent=False)
        top_width = len(self.pairs) + (dim if num_dense else 0)
        self.top = mlp(top_width, config.top, config, out_width=1)

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Returns (B,) logits of (B, N) dense features and B bags of ids per feature."""
        vectors = self.features(self.embeddings(sparse_features)).unflatten(1, self.shape)
        if self.bottom is None:
            logits: Tensor = self.top(self.interactions(vectors))
        else:
            bottom = self.bottom(dense_features)
            vectors = torch.cat([bottom.unsqueeze(1), vectors], dim=1)
            logits = self.top(torch.cat([bottom, self.interactions(vectors)], dim=1))
        return logits.squeeze(1)

    def interactions(self, vectors: Tensor) -> Tensor:
        """Returns the (B, F (F - 1) / 2) dot products of the pairs of (B, F, D) vectors."""
        dots = torch.bmm(vectors, vectors.transpose(1, 2))
        # A third faster, backward included, than indexing with rows and columns.
        return dots.flatten(1).index_select(1, self.pairs)
