"""What holds for every model, whatever its formula."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.config import (
    AutoIntConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    ModelConfig,
    ModelName,
)
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.train.metrics import BinaryMetrics

BATCH = 6
SMALL = {
    "dcnv2": ModelConfig(name="dcnv2", dcnv2=DCNv2Config(hidden=(8, 4))),
    "dcnv2-stacked": ModelConfig(name="dcnv2", dcnv2=DCNv2Config(structure="stacked", hidden=(8,))),
    "dcnv2-cross": ModelConfig(name="dcnv2", dcnv2=DCNv2Config(hidden=())),
    "dcnv2-low-rank": ModelConfig(
        name="dcnv2", dcnv2=DCNv2Config(hidden=(8, 4)), ranks={"cross.1": 3, "deep.0": 4}
    ),
    "dlrm": ModelConfig(name="dlrm", dlrm=DLRMConfig(bottom=(8,), top=(8, 4))),
    "dlrm-plain": ModelConfig(name="dlrm", dlrm=DLRMConfig(bottom=(), top=())),
    "deepfm": ModelConfig(name="deepfm", deepfm=DeepFMConfig(hidden=(8, 4))),
    "autoint": ModelConfig(name="autoint", autoint=AutoIntConfig(attention_dim=8)),
    "autoint+": ModelConfig(
        name="autoint", autoint=AutoIntConfig(attention_dim=8, hidden=(8,), residual=False)
    ),
}
SETTINGS = {
    name: {"batch_norm": True, "dropout": 0.5} | ({"hidden": (8,)} if name == "autoint" else {})
    for name in get_args(ModelName)
}


class Reversed(nn.Module):
    """Gives the keys of a collection in the opposite order, as a sharded one may."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def embedding_bag_configs(self):
        return self.inner.embedding_bag_configs()

    def forward(self, features):
        pooled = self.inner(features)
        keys = pooled.keys()[::-1]
        return KeyedTensor.from_tensor_list(keys, [pooled[key] for key in keys])


def collection(dims=(4, 4, 4), rows=10, **features):
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t{i}",
                num_embeddings=rows,
                embedding_dim=dim,
                feature_names=features.get(f"t{i}", [f"f{i}"]),
                pooling=PoolingType.SUM,
            )
            for i, dim in enumerate(dims)
        ]
    )


def bags(keys=("f0", "f1", "f2"), batch=BATCH, rows=10):
    """Bags of 0 to 3 ids."""
    lengths = torch.randint(0, 4, (len(keys) * batch,))
    values = torch.randint(0, rows, (int(lengths.sum()),))
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=SMALL, name="config")
def _config(request):
    return SMALL[request.param]


@pytest.mark.parametrize("num_dense", [0, 1, 3])
def test_returns_one_logit_a_row_and_trains_every_parameter(config, num_dense):
    model = build_model(config, collection(), num_dense)
    logits = model(torch.randn(BATCH, num_dense), bags())
    assert logits.shape == (BATCH,)
    functional.binary_cross_entropy_with_logits(logits, torch.rand(BATCH)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_bf16_layers_are_near_to_fp32_ones(config):
    model = build_model(config, collection(), 3)
    dense, sparse = torch.randn(BATCH, 3), bags()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(dense, sparse)
    exact = model(dense, sparse)
    assert not logits.float().equal(exact)
    torch.testing.assert_close(logits.float(), exact, atol=0.02, rtol=0.02)
    logits.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_norm_and_dropout_act_in_training_only(name):
    kind = type(getattr(ModelConfig(), name))
    model = build_model(ModelConfig(name=name, **{name: kind(**SETTINGS[name])}), collection(), 2)
    dense, sparse = torch.randn(BATCH, 2), bags()
    assert not model(dense, sparse).equal(model(dense, sparse))
    model.eval()
    assert model(dense, sparse).equal(model(dense, sparse))
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())


def test_order_of_keys_does_not_matter(config):
    model = build_model(config, collection(), 2)
    dense, sparse = torch.randn(BATCH, 2), bags()
    expected = model(dense, sparse)
    model.embeddings = Reversed(model.embeddings)
    assert model(dense, sparse).equal(expected)


def test_rows_do_not_depend_on_their_batch(config):
    model = build_model(config, collection(), 2).eval()
    dense, sparse = torch.randn(BATCH, 2), bags()
    lengths = sparse.lengths().view(3, BATCH)[:, 2:3].flatten()
    starts = sparse.offsets()[:-1].view(3, BATCH)[:, 2]
    ids = [
        sparse.values()[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    alone = KeyedJaggedTensor(keys=sparse.keys(), values=torch.cat(ids), lengths=lengths)
    torch.testing.assert_close(model(dense[2:3], alone), model(dense, sparse)[2:3])


def test_tables_may_serve_several_features_and_features_several_tables(config):
    tables = collection(t0=["a", "b"], t1=["b", "c"], t2=["d"])
    model = build_model(config, tables, 0)
    assert model.features.names == ["a", "b@t0", "b@t1", "c", "d"]
    assert model(torch.randn(BATCH, 0), bags(("a", "b", "c", "d"))).shape == (BATCH,)


@pytest.mark.parametrize("name", get_args(ModelName))
def test_only_dcnv2_takes_vectors_of_different_widths(name):
    tables = collection(dims=(4, 8, 4))
    if name == "dcnv2":
        model = build_model(ModelConfig(name=name), tables, 1)
        assert model(torch.randn(BATCH, 1), bags()).shape == (BATCH,)
        return
    with pytest.raises(UserError, match=f"'{name}' needs .* feature 'f1' has 8 and 'f0' has 4"):
        build_model(ModelConfig(name=name), tables, 1)


def test_contradicting_settings_are_named():
    config = ModelConfig(name="autoint", autoint=AutoIntConfig(attention_dim=9, num_heads=2))
    with pytest.raises(UserError, match="attention_dim = 9 is not a multiple of num_heads = 2"):
        build_model(config, collection(), 0)
    with pytest.raises(UserError, match="two features"):
        build_model(ModelConfig(name="dlrm"), collection(dims=(4,)), 0)
    with pytest.raises(UserError, match="at least one categorical feature"):
        build_model(ModelConfig(), collection(dims=()), 3)


def test_torchrec_can_trace_the_model(config):
    # As its training pipeline does: modules without sharded children are opaque.
    model = build_model(config, collection(), 2)
    leaves = [name for name, _ in model.named_children()]
    graph = torch.fx.GraphModule(model, Tracer(leaf_modules=leaves).trace(model))
    dense, sparse = torch.randn(BATCH, 2), bags()
    assert graph(dense, sparse).equal(model(dense, sparse))


def test_state_dict_has_weights_only_and_embeddings_under_their_own_name(config):
    state = build_model(config, collection(), 2).state_dict()
    assert all(tensor.is_floating_point() for tensor in state.values())
    assert "embeddings.embedding_bags.t0.weight" in state


def test_learns_an_interaction(config):
    # Neither feature alone says anything of the label.
    x, y = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    ids = torch.stack([x.flatten(), y.flatten()])
    labels = ((ids[0] ^ ids[1]) & 1).float()
    sparse = KeyedJaggedTensor(
        keys=["f0", "f1"], values=ids.flatten(), lengths=torch.ones(128, dtype=torch.int64)
    )
    model = build_model(config, collection(dims=(4, 4), rows=8), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        logits = model(torch.empty(64, 0), sparse)
        functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
    collected = BinaryMetrics()
    collected.update(model(torch.empty(64, 0), sparse), labels)
    assert collected.compute()["auc"] > 0.99
