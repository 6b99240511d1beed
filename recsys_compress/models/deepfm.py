"""DeepFM: a factorization machine and a deep part over the same embeddings."""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.config import DeepFMConfig
from recsys_compress.models.layers import FeatureVectors, linear, mlp


class DeepFM(nn.Module):
    """DeepFM (Guo et al., "DeepFM", IJCAI 2017).

    The logit is a first-order term, the sum of the dot products of all pairs of embeddings, and
    the output of a deep part that reads the dense features and the embeddings.

    Deviation: Guo et al. keep a weight per id for the first-order term, which is one more table
    1 wide for every feature; here the term is a linear read-out of the feature's own embedding,
    w_f . v_id. At small widths the extra tables would be a large part of all bytes (a fifth at
    D = 4), and compression would have to treat them apart.

    Args:
        config: the model's settings.
        embeddings: maps a `KeyedJaggedTensor` to a `KeyedTensor`, like an `EmbeddingBagCollection`.
        num_dense: number N of dense features; may be 0. They enter the first-order term and the
            deep part.

    Raises:
        UserError: features differ in width.
    """

    def __init__(self, config: DeepFMConfig, embeddings: nn.Module, num_dense: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.features = FeatureVectors(embeddings)
        dim = self.features.equal_width("deepfm")
        self.num_dense = num_dense
        self.shape = (len(self.features.names), dim)
        width = num_dense + self.features.width
        self.first_order = linear(width, 1)
        self.deep = mlp(width, config.hidden, config, out_width=1)

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Returns (B,) logits of (B, N) dense features and B bags of ids per feature."""
        vectors = self.features(self.embeddings(sparse_features))
        x = torch.cat([dense_features, vectors], dim=1) if self.num_dense else vectors
        logits: Tensor = (self.first_order(x) + self.deep(x)).squeeze(1)
        return logits + second_order(vectors.unflatten(1, self.shape))


def second_order(vectors: Tensor) -> Tensor:
    """Returns the (B,) sums of the dot products of all pairs of (B, F, D) vectors.

    Half of the squared sum less the sum of squares (Rendle, "Factorization Machines", ICDM 2010,
    Lemma 3.1): F * D multiplications instead of F * F * D / 2. By squares, which `torch.autocast`
    leaves in fp32: of products in bf16 the difference would be of rounding.
    """
    squares = vectors.sum(dim=1).square() - vectors.square().sum(dim=1)
    return 0.5 * squares.sum(dim=1)
