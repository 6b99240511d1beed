"""Each model's own formula, against a plain loop."""

import math

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.config import AutoIntConfig, DCNv2Config, DeepFMConfig, DLRMConfig
from recsys_compress.models.autoint import AutoInt
from recsys_compress.models.dcn import DCNv2
from recsys_compress.models.deepfm import DeepFM, second_order
from recsys_compress.models.dlrm import DLRM
from recsys_compress.models.layers import FeatureVectors

BATCH, FEATURES, DIM, DENSE = 5, 4, 4, 3


def build(kind, config):
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"f{i}", num_embeddings=7, embedding_dim=DIM, feature_names=[f"f{i}"]
            )
            for i in range(FEATURES)
        ]
    )
    model = kind(config, tables, DENSE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.startswith("embeddings"):
                parameter.normal_()
    return model


@pytest.fixture(name="batch")
def _batch():
    torch.manual_seed(1)
    sparse = KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(FEATURES)],
        values=torch.randint(7, (FEATURES * BATCH,)),
        lengths=torch.ones(FEATURES * BATCH, dtype=torch.int64),
    )
    return torch.randn(BATCH, DENSE), sparse


def rows(model, batch):
    """Yields each row's dense features and its list of feature vectors."""
    dense, sparse = batch
    pooled = model.embeddings(sparse)
    for i in range(BATCH):
        yield dense[i], [pooled[f"f{f}"][i] for f in range(FEATURES)]


def mlp(layers, x):
    for layer in layers:
        x = layer.weight @ x + layer.bias if isinstance(layer, nn.Linear) else x.clamp(min=0)
    return x


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
def test_dcnv2_crosses(batch, structure):
    model = build(DCNv2, DCNv2Config(cross_layers=2, hidden=(6, 5), structure=structure))
    expected = []
    for dense, vectors in rows(model, batch):
        x0 = torch.cat([dense, *vectors])
        x = x0
        for layer in model.cross:
            x = torch.stack(
                [x0[j] * (layer.weight[j] @ x + layer.bias[j]) + x[j] for j in range(len(x0))]
            )
        if structure == "stacked":
            expected.append(mlp(model.deep, x))
        else:
            expected.append(mlp([model.cross_output], x) + mlp(model.deep, x0))
    torch.testing.assert_close(model(*batch), torch.cat(expected))


def test_dlrm_pairs(batch):
    model = build(DLRM, DLRMConfig(bottom=(6,), top=(6, 5)))
    expected = []
    for dense, vectors in rows(model, batch):
        bottom = mlp(model.bottom, dense)
        vectors = [bottom, *vectors]
        dots = [
            vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + 1, len(vectors))
        ]
        expected.append(mlp(model.top, torch.cat([bottom, torch.stack(dots)])))
    torch.testing.assert_close(model(*batch), torch.cat(expected))


def test_deepfm_terms(batch):
    model = build(DeepFM, DeepFMConfig(hidden=(6, 5)))
    expected = []
    for dense, vectors in rows(model, batch):
        x = torch.cat([dense, *vectors])
        pairs = sum(a @ b for i, a in enumerate(vectors) for b in vectors[i + 1 :])
        expected.append(mlp([model.first_order], x) + mlp(model.deep, x) + pairs)
    torch.testing.assert_close(model(*batch), torch.cat(expected))


def test_second_order_of_one_feature_is_zero():
    torch.testing.assert_close(second_order(torch.randn(BATCH, 1, DIM)), torch.zeros(BATCH))


def test_second_order_is_not_rounded_within_autocast():
    vectors = torch.randn(BATCH, 26, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = second_order(vectors)
    torch.testing.assert_close(found, second_order(vectors))


@pytest.mark.parametrize("residual", [True, False])
def test_autoint_attends(batch, residual):
    config = AutoIntConfig(
        attention_layers=2, attention_dim=6, num_heads=3, residual=residual, hidden=(5,)
    )
    model = build(AutoInt, config)
    expected = []
    for dense, vectors in rows(model, batch):
        deep = mlp(model.deep, torch.cat([dense, *vectors]))
        x = [value * v for value, v in zip(dense, model.dense_vectors, strict=True)] + vectors
        for layer in model.attention:
            x = [attended(layer, x, m) for m in range(len(x))]
        expected.append(mlp([model.output], torch.cat(x)) + deep)
    torch.testing.assert_close(model(*batch), torch.cat(expected))


def attended(layer, x, m):
    """Returns the layer's output for feature m, head by head (Eq. 5-8)."""
    count, width = layer.heads
    heads = []
    for h in range(count):
        part = slice(h * width, (h + 1) * width)
        query, key, value = (p.weight[part] for p in (layer.query, layer.key, layer.value))
        scores = torch.stack([(query @ x[m]) @ (key @ v) / math.sqrt(width) for v in x])
        weights = scores.exp() / scores.exp().sum()
        heads.append(sum(w * (value @ v) for w, v in zip(weights, x, strict=True)))
    output = torch.cat(heads)
    if layer.residual is not None:
        output = output + layer.residual.weight @ x[m]
    return output.clamp(min=0)


def test_vectors_in_order_are_not_copied(batch):
    model = build(DeepFM, DeepFMConfig())
    pooled = model.embeddings(batch[1])
    assert FeatureVectors(model.embeddings)(pooled).data_ptr() == pooled.values().data_ptr()
