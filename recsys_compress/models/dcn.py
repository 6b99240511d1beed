"""DCN-V2: explicit crosses of all features, beside or below a deep part."""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.config import DCNv2Config
from recsys_compress.models.layers import FeatureVectors, linear, mlp


class DCNv2(nn.Module):
    """DCN-V2 (Wang et al., "DCN V2", WWW 2021), with full-rank cross layers.

    x_0 is the dense features and all embeddings, side by side; a cross layer (their Eq. 1) is
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l. Vectors may differ in width between features.

    Args:
        config: the model's settings.
        embeddings: maps a `KeyedJaggedTensor` to a `KeyedTensor`, like an `EmbeddingBagCollection`.
        num_dense: number N of dense features; may be 0.
    """

    def __init__(self, config: DCNv2Config, embeddings: nn.Module, num_dense: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.features = FeatureVectors(embeddings)
        self.num_dense = num_dense
        width = num_dense + self.features.width
        self.cross = nn.ModuleList(linear(width, width) for _ in range(config.cross_layers))
        # Without hidden layers, stacked or parallel is the same: a linear read-out of the crosses.
        parallel = config.structure == "parallel" and len(config.hidden) > 0
        self.cross_output = linear(width, 1) if parallel else None
        self.deep = mlp(width, config.hidden, config, out_width=1)

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Returns (B,) logits of (B, N) dense features and B bags of ids per feature."""
        x0 = self.features(self.embeddings(sparse_features))
        if self.num_dense:
            x0 = torch.cat([dense_features, x0], dim=1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        logits: Tensor = self.deep(x if self.cross_output is None else x0)
        if self.cross_output is not None:
            # The same as one read-out of [cross, deep], without copying them side by side.
            logits = logits + self.cross_output(x)
        return logits.squeeze(1)
