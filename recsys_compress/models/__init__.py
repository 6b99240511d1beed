"""CTR models: they know `KeyedJaggedTensor` to `KeyedTensor`, and nothing of compression."""

from torch import nn

from recsys_compress.config import ModelConfig
from recsys_compress.models.autoint import AutoInt
from recsys_compress.models.dcn import DCNv2
from recsys_compress.models.deepfm import DeepFM
from recsys_compress.models.dlrm import DLRM
from recsys_compress.models.factorized import factorize

_MODELS: dict[str, type[nn.Module]] = {
    "autoint": AutoInt,
    "dcnv2": DCNv2,
    "deepfm": DeepFM,
    "dlrm": DLRM,
}


def build_model(config: ModelConfig, embeddings: nn.Module, num_dense: int) -> nn.Module:
    """Builds the model that `config.name` names.

    Its `forward(dense_features, sparse_features)` maps (B, N) dense features and a
    `KeyedJaggedTensor` of stride B to (B,) logits. The embeddings are its submodule `embeddings`.

    Args:
        config: which model, and its settings.
        embeddings: has `embedding_bag_configs()` and maps a `KeyedJaggedTensor` to a `KeyedTensor`
            with one key per feature, like TorchRec's `EmbeddingBagCollection`.
        num_dense: number N of dense features; may be 0.

    Raises:
        UserError: the model cannot take these embeddings, its settings contradict each other, or it
            has no layer of a name in `config.ranks`.
    """
    model = _MODELS[config.name](getattr(config, config.name), embeddings, num_dense)
    factorize(model, config.ranks, config.between)
    return model
