"""AutoInt: self-attention over the features."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.config import AutoIntConfig
from recsys_compress.errors import UserError
from recsys_compress.models.layers import FeatureVectors, linear, mlp


class InteractingLayer(nn.Module):
    """Multi-head self-attention between features (Song et al., Eq. 5-8).

    Projections are linear as in the paper, which leaves out the ReLU on them and the layer norm of
    its public code; scores are divided by the square root of the head's width as in that code.

    Args:
        in_width: width of each input vector.
        out_width: width of each output vector: the heads' outputs, side by side.
        num_heads: attention heads.
        residual: whether a projection of the input is added before the ReLU.
        dropout: dropout rate of the attention weights.
    """

    def __init__(
        self, in_width: int, out_width: int, *, num_heads: int, residual: bool, dropout: float
    ) -> None:
        super().__init__()
        self.heads = (num_heads, out_width // num_heads)
        self.dropout = dropout
        self.query = linear(in_width, out_width, bias=False)
        self.key = linear(in_width, out_width, bias=False)
        self.value = linear(in_width, out_width, bias=False)
        self.residual = linear(in_width, out_width, bias=False) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, F, in_width) to (B, F, out_width)."""
        query, key, value = (
            project(x).unflatten(2, self.heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )
        output = attended.transpose(1, 2).flatten(2)
        if self.residual is not None:
            output = output + self.residual(x)
        return functional.relu(output)


class AutoInt(nn.Module):
    """AutoInt (Song et al., "AutoInt", CIKM 2019); with a deep part it is their AutoInt+.

    Each dense feature has a learned vector, multiplied by its value, and takes part in the
    attention like an embedding (their Eq. 4). The deep part reads the dense features' values and
    the embeddings.

    Args:
        config: the model's settings.
        embeddings: maps a `KeyedJaggedTensor` to a `KeyedTensor`, like an `EmbeddingBagCollection`.
        num_dense: number N of dense features; may be 0.

    Raises:
        UserError: features differ in width, or the heads do not divide the attention's width.
    """

    def __init__(self, config: AutoIntConfig, embeddings: nn.Module, num_dense: int) -> None:
        super().__init__()
        if config.attention_dim % config.num_heads:
            raise UserError(
                f"model.autoint.attention_dim = {config.attention_dim} is not a multiple of "
                f"num_heads = {config.num_heads}; change one of them"
            )
        self.embeddings = embeddings
        self.features = FeatureVectors(embeddings)
        dim = self.features.equal_width("autoint")
        self.shape = (len(self.features.names), dim)
        self.dense_vectors = _dense_vectors(num_dense, dim) if num_dense else None
        widths = [dim] + [config.attention_dim] * config.attention_layers
        self.attention = nn.Sequential(
            *(
                InteractingLayer(
                    in_width,
                    config.attention_dim,
                    num_heads=config.num_heads,
                    residual=config.residual,
                    dropout=config.dropout,
                )
                for in_width in widths[:-1]
            )
        )
        self.output = linear((len(self.features.names) + num_dense) * config.attention_dim, 1)
        deep_width = num_dense + self.features.width
        self.deep = mlp(deep_width, config.hidden, config, out_width=1) if config.hidden else None

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Returns (B,) logits of (B, N) dense features and B bags of ids per feature."""
        flat = self.features(self.embeddings(sparse_features))
        vectors = flat.unflatten(1, self.shape)
        if self.dense_vectors is not None:
            dense_vectors = dense_features.unsqueeze(2) * self.dense_vectors
            vectors = torch.cat([dense_vectors, vectors], dim=1)
            flat = torch.cat([dense_features, flat], dim=1)
        logits: Tensor = self.output(self.attention(vectors).flatten(1))
        if self.deep is not None:
            logits = logits + self.deep(flat)
        return logits.squeeze(1)


def _dense_vectors(num_dense: int, dim: int) -> nn.Parameter:
    """Returns (N, D) vectors, with the initial spread of the public code's."""
    return nn.Parameter(torch.empty(num_dense, dim).normal_(std=0.01))
