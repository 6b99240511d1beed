"""Every method x every property; a new method adds one row to METHODS."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, Method, method_classes
from recsys_compress.compress.methods.dnis import DNIS
from recsys_compress.compress.methods.double_hash import DoubleHash
from recsys_compress.compress.methods.dynamic_sparse import DynamicSparse
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.group_reduce import GroupReduce
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.methods.mixed_dim import MixedDim
from recsys_compress.compress.methods.quotient_remainder import QuotientRemainder
from recsys_compress.compress.methods.unified import Unified
from recsys_compress.compress.policy import describe, full_bytes
from recsys_compress.compress.selection import Block
from recsys_compress.compress.storage import StoragePlan, quantize
from recsys_compress.errors import UserError
from recsys_compress.settings import parse
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables

# By the name of the method, which may be followed by a variant.
METHODS: dict[str, Method] = {
    "dnis": DNIS(
        kept={
            "user": (Block(ids=2000, dims=tuple(range(12))), Block(ids=3000, dims=(1, 4, 6, 11))),
            "item": (Block(ids=2999, dims=tuple(range(8))), Block(ids=1, dims=())),
            "genre": (Block(ids=10, dims=tuple(range(12))), Block(ids=30, dims=(0, 1, 2))),
        }
    ),
    "dnis/soft": DNIS(soft=True),
    "double_hash": DoubleHash(share=0.1),
    "double_hash/add": DoubleHash(share=0.1, operation="add"),
    "dynamic_sparse": DynamicSparse(density=0.3),
    "dynamic_sparse/1": DynamicSparse(density=0.3, block=1),
    "full": Full(),
    "group_reduce": GroupReduce(
        ranks={"user": (12, 8, 6, 4), "item": (10, 4, 4, 0), "genre": (8,)}
    ),
    "hash": Hash(share=0.1),
    "low_rank": LowRank(rank=4),
    "mixed_dim": MixedDim(alpha=1.0, base_dim=8),
    "quotient_remainder": QuotientRemainder(share=0.1),
    "quotient_remainder/add": QuotientRemainder(share=0.1, operation="add"),
    "quotient_remainder/concat": QuotientRemainder(share=0.1, operation="concat"),
    "unified": Unified(num_embeddings=1500, num_probes=3),
}
FITTED = [name for name in METHODS if name != "full"]
POOLED = [name for name in METHODS if name != "quotient_remainder"]  # a product cannot be pooled
KNOBS = {
    "dnis": "kept",
    "double_hash": "share",
    "dynamic_sparse": "density",
    "group_reduce": "ranks",
    "hash": "share",
    "low_rank": "rank",
    "mixed_dim": "alpha",
    "quotient_remainder": "share",
    "unified": "num_embeddings",
}
OPTIMIZERS = ("rowwise_adagrad", "adam")

every_method = pytest.mark.parametrize("name", METHODS)
every_fitted = pytest.mark.parametrize("name", FITTED)
every_pooled = pytest.mark.parametrize("name", POOLED)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def make(
    name: str,
    optimizer: str = "rowwise_adagrad",
    *,
    min_rows: int = 100,
    is_weighted: bool = False,
    pooling: PoolingType = PoolingType.SUM,
) -> CompressedEmbeddingBagCollection:
    """Returns the method's collection, with other than initial values where those are zeros."""
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(pooling=pooling),
        policy=make_policy(METHODS[name], optimizer, min_rows),
        is_weighted=is_weighted,
    )
    with torch.no_grad():
        for parameter in collection.parameters():
            if not parameter.any():
                parameter.uniform_(-0.05, 0.05)
    return collection


def unset(name: str) -> Method:
    """Returns the method with the knob that `fit` finds unset."""
    return dataclasses.replace(METHODS[name], **{KNOBS[name.split("/")[0]]: None})


def test_every_registered_method_is_tested() -> None:
    assert {name.split("/")[0] for name in METHODS} == set(method_classes())


@every_method
@every_optimizer
def test_shape_keys_and_type(name: str, optimizer: str) -> None:
    collection = make(name, optimizer)
    output = collection(make_batch(32))
    configs = collection.embedding_bag_configs()
    assert output.keys() == list(ROWS)
    assert output.length_per_key() == [config.embedding_dim for config in configs] == [12] * 3
    assert output.values().shape == (32, 36)
    assert output.values().dtype == torch.float32


@every_method
def test_autocast_leaves_tables_in_fp32(name: str) -> None:
    collection, batch = make(name), make_batch(32)
    with torch.autocast("cpu", torch.bfloat16):
        output = collection(batch).values()
    assert output.equal(collection(batch).values())
    assert output.dtype == torch.float32


@every_method
@every_optimizer
def test_empty_bags_give_zeros(name: str, optimizer: str) -> None:
    collection = make(name, optimizer)
    empty = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.zeros(15, dtype=torch.int32),
        stride=5,
    )
    output = collection(empty)
    assert output.values().shape == (5, 36)
    assert not output.values().any()


@every_pooled
@every_optimizer
def test_pooled_is_the_sum_of_unpooled(name: str, optimizer: str) -> None:
    collection = make(name, optimizer, min_rows=0)
    batch = make_batch(64)
    genre = batch["genre"]
    flat = make_batch(len(genre.values()))
    one_each = KeyedJaggedTensor(
        keys=["genre", "user", "item"],
        values=torch.cat([genre.values(), flat["user"].values(), flat["item"].values()]),
        lengths=torch.ones(3 * len(genre.values()), dtype=torch.int32),
        stride=len(genre.values()),
    )
    vectors = collection(one_each)["genre"]
    bags = torch.arange(64).repeat_interleave(genre.lengths().long())
    expected = torch.zeros(64, 12).index_add(0, bags, vectors)
    assert torch.allclose(collection(batch)["genre"], expected, atol=1e-6)


@every_pooled
def test_mean_pooling_divides_by_the_bag(name: str) -> None:
    batch = make_batch(64)
    total = make(name, min_rows=0)(batch)
    mean = make(name, min_rows=0, pooling=PoolingType.MEAN)(batch)
    lengths = batch["genre"].lengths().clamp(min=1)[:, None]
    assert torch.allclose(mean["genre"], total["genre"] / lengths, atol=1e-7)
    assert torch.equal(mean["user"], total["user"])


@every_method
@every_optimizer
def test_weights_scale_vectors(name: str, optimizer: str) -> None:
    min_rows = 0 if name in POOLED else 100
    collection = make(name, optimizer, min_rows=min_rows, is_weighted=True)
    batch = make_batch(16, weighted=True)
    doubled = KeyedJaggedTensor(
        keys=batch.keys(),
        values=batch.values(),
        lengths=batch.lengths(),
        weights=batch.weights() * 2,
        stride=16,
    )
    assert torch.allclose(collection(doubled).values(), 2 * collection(batch).values())


def with_weights(batch: KeyedJaggedTensor, weights: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=batch.keys(),
        values=batch.values(),
        lengths=batch.lengths(),
        weights=weights,
        stride=batch.stride(),
    )


@every_method
def test_weights_of_one_change_nothing(name: str) -> None:
    min_rows = 0 if name in POOLED else 100
    batch = make_batch(16)
    ones = with_weights(batch, torch.ones(len(batch.values())))
    weighted = make(name, min_rows=min_rows, is_weighted=True)(ones)
    assert torch.allclose(weighted.values(), make(name, min_rows=min_rows)(batch).values())


@every_method
def test_first_values_have_the_range_of_a_full_tables(name: str) -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(METHODS[name])
    )
    vectors = collection(make_batch(2000))["user"]
    deviation = vectors.std().item() / (0.05 / 3**0.5)
    assert vectors.mean().abs() < 0.005
    assert 0.45 < deviation < 1.1
    if name not in ("group_reduce", "low_rank", "mixed_dim"):  # these keep the variance instead
        assert 0.03 < vectors.abs().max() <= 0.05


@every_method
def test_key_order_and_extra_keys_do_not_matter(name: str) -> None:
    collection = make(name)
    batch = make_batch(32)
    expected = collection(batch)
    other = KeyedJaggedTensor(
        keys=["genre", "item", "user", "extra"],
        values=torch.cat([batch[k].values() for k in ("genre", "item", "user", "user")]),
        lengths=torch.cat([batch[k].lengths() for k in ("genre", "item", "user", "user")]),
        stride=32,
    )
    assert torch.equal(collection(other).values(), expected.values())


@every_method
def test_int32_ids_give_the_same_vectors(name: str) -> None:
    collection = make(name)
    batch = make_batch(32)
    narrow = KeyedJaggedTensor(
        keys=batch.keys(), values=batch.values().int(), lengths=batch.lengths(), stride=32
    )
    assert torch.equal(collection(narrow).values(), collection(batch).values())


@every_method
@every_optimizer
def test_gradient_reaches_every_parameter(name: str, optimizer: str) -> None:
    collection = make(name, optimizer)
    collection(make_batch(4096)).values().square().sum().backward()
    for parameter in collection.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@every_method
def test_same_seed_same_vectors(name: str) -> None:
    assert torch.equal(make(name)(make_batch(32)).values(), make(name)(make_batch(32)).values())


@every_method
@every_optimizer
def test_reported_bytes_are_the_state_dicts(name: str, optimizer: str) -> None:
    collection = make(name, optimizer)
    tensors = collection.state_dict().values()
    assert collection.size_report().table_bytes == sum(t.nbytes for t in tensors)


@every_method
def test_bytes_on_disk_and_round_trip(name: str, tmp_path: Path) -> None:
    collection = make(name)
    path = tmp_path / "tables.safetensors"
    save_file(collection.state_dict(), path)
    assert path.stat().st_size == pytest.approx(collection.size_report().table_bytes, rel=0.02)
    torch.manual_seed(1)
    other = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(load_file(path))
    batch = make_batch(32)
    assert torch.equal(other(batch).values(), collection(batch).values())


@every_fitted
@every_optimizer
@given(share=st.floats(min_value=0.02, max_value=0.95))
def test_fit_meets_the_budget(name: str, optimizer: str, share: float) -> None:
    tables = make_tables()
    budget = int(full_bytes(tables) * share)
    try:
        policy = make_policy(unset(name), optimizer).fit(tables, budget)
    except UserError as error:
        # The method's share is what the full genres leave of the budget.
        budget -= 4 * 12 * ROWS["genre"]
        found = [
            int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?= to| and| bytes)", f"{error}")
        ]
        assert found[0] == budget
        least, greatest = found[1:]
        if "no size within" in str(error):
            assert least < 0.95 * budget
            assert budget < greatest
        else:
            assert budget < least or greatest < 0.95 * budget
        return
    used = CompressedEmbeddingBagCollection(tables=tables, policy=policy).size_report().table_bytes
    assert 0.95 * budget <= used <= budget


@every_fitted
@every_optimizer
@pytest.mark.parametrize("share", [0.3, 0.38, 0.46])
def test_fit_succeeds_on_tables_of_many_sizes(name: str, optimizer: str, share: float) -> None:
    tables = [
        dataclasses.replace(make_tables(16)[0], name=f"f{i}", feature_names=[f"f{i}"])
        for i in range(40)
    ]
    for i, table in enumerate(tables):
        table.num_embeddings = int(10 * 1.12 ** (i % 35) * (1 + i / 20))
    budget = int(full_bytes(tables) * share)
    method = unset(name)
    if name == "unified":
        method = dataclasses.replace(method, num_probes=2)
    policy = make_policy(method, optimizer, min_rows=0).fit(tables, budget)
    used = CompressedEmbeddingBagCollection(tables=tables, policy=policy).size_report().table_bytes
    assert 0.95 * budget <= used <= budget


@every_method
def test_a_budget_out_of_reach_names_its_limits(name: str) -> None:
    with pytest.raises(UserError, match=r"out of reach.*\d"):
        make_policy(METHODS[name], min_rows=0).fit(make_tables(), 10)


@every_method
def test_knobs_survive_plain_data_and_toml(name: str) -> None:
    method = METHODS[name]
    described = describe(method)
    assert described.pop("method") == name.split("/")[0]
    assert parse(type(method), described, where="here") == method
    written = tomli_w.dumps({key: knob for key, knob in described.items() if knob is not None})
    assert parse(type(method), tomllib.loads(written), where="here") == method


@every_method
def test_every_knob_is_explained(name: str) -> None:
    method = type(METHODS[name])
    assert method.__doc__
    assert all(field.metadata.get("help") for field in dataclasses.fields(method))


@every_method
def test_weights_count_only_in_collections_that_are_weighted(name: str) -> None:
    batch = make_batch(8)
    weighted = with_weights(batch, torch.rand(len(batch.values())))
    collection = make(name)
    served = quantize(collection, StoragePlan(types="fp32"))
    for tables in (collection, served):
        torch.testing.assert_close(tables(weighted).values(), tables(batch).values())


@every_method
def test_ids_outside_full_tables_are_refused(name: str) -> None:
    batch = make_batch(8)
    for bad in (-1, ROWS["genre"]):
        values = batch.values().clone()
        values[-1] = bad
        wrong = KeyedJaggedTensor(
            keys=batch.keys(), values=values, lengths=batch.lengths(), stride=8
        )
        with pytest.raises(ValueError, match=rf"'genre': id {bad} lies outside \[0, 40\)"):
            make(name)(wrong)
