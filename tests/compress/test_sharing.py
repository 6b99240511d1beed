"""Trained vectors taken over by methods whose ids share rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.compress import CompressedEmbeddingBagCollection, Method, reads
from recsys_compress.compress.method import Trained
from recsys_compress.compress.methods.double_hash import DoubleHash
from recsys_compress.compress.methods.dynamic_sparse import DynamicSparse
from recsys_compress.compress.methods.group_reduce import GroupReduce
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.quotient_remainder import QuotientRemainder
from recsys_compress.compress.methods.unified import Unified
from recsys_compress.compress.reads import rows_read
from recsys_compress.compress.sharing import two_factors
from recsys_compress.errors import UserError
from tests.compress.tables import make_policy, make_tables

METHODS = (
    Hash(share=0.3),
    Unified(num_embeddings=900, num_probes=3),
    DoubleHash(share=0.3),
    QuotientRemainder(share=0.3, operation="concat"),
    QuotientRemainder(share=0.3),
    QuotientRemainder(share=0.3, operation="add"),
)

RANKS = {"user": (12, 6, 3, 0), "item": (5, 3, 2, 1), "genre": (4,)}


def trained(*, weighted: bool = False) -> Trained:
    generator = torch.Generator().manual_seed(0)
    tables = make_tables()
    vectors = {t.name: torch.randn(t.num_embeddings, 12, generator=generator) for t in tables}
    counts = {t.name: 1000 / torch.arange(1, t.num_embeddings + 1) for t in tables}
    return Trained(
        vectors=vectors.__getitem__,
        moments=lambda name: pytest.fail(name),
        weights=counts.__getitem__ if weighted else None,
    )


def adopted(method: Method, given_: Trained) -> CompressedEmbeddingBagCollection:
    policy = make_policy(method, "adam", min_rows=0)
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy)
    found, values = method.adopt(make_tables(), given_, None, policy.default.options)
    assert found == method
    collection.write([values], collection.state_dict())
    return collection


def error(collection: CompressedEmbeddingBagCollection, given_: Trained) -> float:
    """Returns the weighted squared error of all vectors."""
    total = 0.0
    for table in make_tables():
        change = collection.vectors(table.name) - given_.vectors(table.name)
        weights = 1.0 if given_.weights is None else given_.weights(table.name).unsqueeze(1)
        total += float((weights * change.square()).sum())
    return total


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_small_change_of_the_rows_comes_nearer(method: Method, weighted: bool) -> None:
    given_ = trained(weighted=weighted)
    collection = adopted(method, given_)
    best = error(collection, given_)
    assert best < error_of_zeros(given_)
    generator = torch.Generator().manual_seed(1)
    state = collection.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            before = value.clone()
            for _ in range(3):
                value += 0.3 * torch.randn(value.shape, generator=generator)
                assert error(collection, given_) > best, name
                value.copy_(before)


def error_of_zeros(given_: Trained) -> float:
    total = 0.0
    for table in make_tables():
        vectors = given_.vectors(table.name)
        weights = 1.0 if given_.weights is None else given_.weights(table.name).unsqueeze(1)
        total += float((weights * vectors.square()).sum())
    return total


def test_rows_that_nobody_shares_are_the_vectors() -> None:
    given_ = trained()
    assert error(adopted(Hash(share=1.0), given_), given_) < 1e-9


def test_sums_have_no_means() -> None:
    with pytest.raises(UserError, match="use operation 'concat'"):
        adopted(DoubleHash(share=0.3, operation="add"), trained())


@pytest.mark.parametrize(
    "method",
    [*METHODS, GroupReduce(ranks=RANKS), DynamicSparse(density=0.3)],
)
def test_rows_are_read_some_ids_at_a_time(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    lowering = method.lower(make_tables())
    ids = torch.arange(4990).flip(0)
    whole = rows_read(lowering, "user", ids)
    monkeypatch.setattr(reads, "_CHUNK", 700)
    sizes = []
    lowering.ids.register_forward_hook(lambda _m, given_, _out: sizes.append(given_[0].stride()))
    found = rows_read(lowering, "user", ids)
    assert sizes == [700] * 7 + [90]
    for (lookup, who, rows), (expected, *tensors) in zip(found, whole, strict=True):
        assert lookup == expected
        assert torch.equal(who, tensors[0])
        assert torch.equal(rows, tensors[1])
    none = rows_read(lowering, "user", ids[:0])
    assert [len(rows) for _, _, rows in none] == [0] * len(whole)


@given(st.booleans(), st.integers(0, 5))
def test_two_tables_of_a_product_or_sum_are_found_again(product: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = 1 + torch.rand(6, 3, generator=generator).double()
    right = 1 + torch.rand(5, 3, generator=generator).double()
    ids = torch.arange(30)
    first, second = ids // 5, ids % 5
    vectors = left[first] * right[second] if product else left[first] + right[second]
    found = two_factors(vectors, torch.ones(30).double(), first, second, product=product)
    again = found[0][first] * found[1][second] if product else found[0][first] + found[1][second]
    assert torch.allclose(again, vectors, atol=0.02)
