"""Our collection inside torchrec's own model, and our fused optimizers against plain torch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Method,
    Policy,
    Rule,
    TableOptions,
)
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.quotient_remainder import QuotientRemainder
from recsys_compress.compress.methods.unified import Unified
from recsys_compress.train.shard import full_tensors, process_group, shard
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables
from tests.compress.test_contract import METHODS as ALL_METHODS

METHODS = (
    Full(),
    Hash(share=0.2),
    QuotientRemainder(share=0.1),
    Unified(num_embeddings=900, num_probes=3),
)


class Sum(nn.Module):
    """The smallest model: a weighted sum of all vectors."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.scale = nn.Parameter(torch.linspace(-1, 1, 36))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        output: KeyedTensor = self.embeddings(features)
        return output.values() @ self.scale


@pytest.mark.parametrize("method", ALL_METHODS.values(), ids=ALL_METHODS)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_torchrecs_dlrm_trains_with_our_collection(method: Method, optimizer: str) -> None:
    torch.manual_seed(0)
    with process_group():
        collection = CompressedEmbeddingBagCollection(
            tables=make_tables(), policy=make_policy(method, optimizer)
        )
        dlrm = DLRM(
            embedding_bag_collection=collection,
            dense_in_features=4,
            dense_arch_layer_sizes=[16, 12],
            over_arch_layer_sizes=[16, 1],
        )
        model = shard(dlrm, collection, torch.device("cpu"))
        fused = set(model.fused_optimizer.params)
        rest = [p for n, p in model.named_parameters() if n not in fused]
        adam = torch.optim.Adam(rest, lr=0.01)
        batch, dense = make_batch(256), torch.randn(256, 4)
        labels = (batch["user"].values() % 2).float()
        losses = []
        for _ in range(40):
            adam.zero_grad()
            loss = binary_cross_entropy_with_logits(model(dense, batch).squeeze(1), labels)
            loss.backward()
            adam.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_fused_training_equals_plain_torch(method: Method, optimizer: str) -> None:
    """Six steps of the sharded model against the unsharded one and an update written out here."""
    options = TableOptions(optimizer=optimizer, learning_rate=0.1)
    policy = Policy(default=Rule(method=method, options=options))
    torch.manual_seed(0)
    plain = Sum(CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy))
    with process_group():
        collection = CompressedEmbeddingBagCollection(
            tables=make_tables(), policy=policy, fused_device=torch.device("meta")
        )
        model = shard(Sum(collection), collection, torch.device("cpu"))
        whole = full_tensors(model.state_dict())
        for name, value in plain.state_dict().items():
            whole[name].copy_(value)
        sums = dict.fromkeys(whole, 0.0)
        for step in range(6):
            batch = make_batch(512, seed=step)
            model(batch).square().mean().backward()
            plain(batch).square().mean().backward()
            with torch.no_grad():
                for name, weight in plain.embeddings.named_parameters(prefix="embeddings"):
                    gradient = weight.grad
                    squared = gradient.square()
                    if optimizer == "rowwise_adagrad":
                        squared = squared.mean(1, keepdim=True)
                    sums[name] = sums[name] + squared
                    scale = 1.0 if optimizer == "sgd" else sums[name].sqrt() + 1e-8
                    weight -= 0.1 * gradient / scale
                    weight.grad = None
        after = plain.state_dict()
        error = max((whole[n] - after[n]).abs().max().item() for n in after)
    assert error < 1e-5


@pytest.mark.parametrize("method", ALL_METHODS.values(), ids=ALL_METHODS)
def test_sharding_keeps_vectors_and_what_combines_them(method: Method) -> None:
    policy = make_policy(method)
    torch.manual_seed(0)
    plain = Sum(CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy))
    with process_group():
        collection = CompressedEmbeddingBagCollection(
            tables=make_tables(), policy=policy, fused_device=torch.device("meta")
        )
        started = [p.clone() for p in collection.output.parameters()]
        model = shard(Sum(collection), collection, torch.device("cpu"))
        assert all(p.any() for p in started if p.ndim == 3)
        found = collection.output.parameters()
        assert all(torch.equal(p, s) for p, s in zip(found, started, strict=True))
        for name, value in full_tensors(model.state_dict()).items():
            value.copy_(plain.state_dict()[name])
        batch = make_batch(64)
        assert torch.allclose(model(batch), plain(batch), atol=1e-6)


def test_tables_are_made_once_and_initialised() -> None:
    with process_group():
        collection = CompressedEmbeddingBagCollection(
            tables=make_tables(), policy=make_policy(Full()), fused_device=torch.device("meta")
        )
        assert all(p.is_meta for p in collection.parameters())
        model = shard(Sum(collection), collection, torch.device("cpu"))
        (weight,) = [v for n, v in full_tensors(model.state_dict()).items() if "weight" in n]
    assert weight.shape == (sum(ROWS.values()), 12)
    assert 0.049 < weight.abs().max().item() <= 0.05
    assert abs(weight.mean().item()) < 1e-3


def test_a_table_for_two_features_is_shared() -> None:
    table = EmbeddingBagConfig(
        name="user", feature_names=["viewer", "author"], num_embeddings=50, embedding_dim=8
    )
    for method in (Full(), Hash(share=0.5), Unified(num_embeddings=30)):
        collection = CompressedEmbeddingBagCollection(
            tables=[table], policy=make_policy(method, min_rows=0)
        )
        same = KeyedJaggedTensor(
            keys=["viewer", "author"],
            values=torch.tensor([1, 2, 1, 2]),
            lengths=torch.ones(4, dtype=torch.int32),
        )
        output = collection(same)
        assert torch.equal(output["viewer"], output["author"])
