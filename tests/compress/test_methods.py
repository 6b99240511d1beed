"""What is particular to a method."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.hashing import constant_tensor, mix, per_value, repeat, salt, to_range
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.group_reduce import GroupReduce
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.unified import Unified, _even_share
from recsys_compress.compress.storage import StoragePlan, quantize
from recsys_compress.errors import UserError
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables

INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)
MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The finaliser in plain arithmetic, on unsigned numbers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@given(values=st.lists(INT64, min_size=1), size=st.integers(min_value=1, max_value=2**31))
def test_hash_agrees_with_plain_arithmetic(values: list[int], size: int) -> None:
    hashes = mix(torch.tensor(values, dtype=torch.int64))
    expected = [splitmix64(value & MASK) for value in values]
    assert [h & MASK for h in hashes.tolist()] == expected
    assert to_range(hashes, size).tolist() == [(h >> 32) * size >> 32 for h in expected]


def test_salts_are_stable_and_differ() -> None:
    salts = {salt(f, k, s) for f in ("user", "item") for k in range(4) for s in range(4)}
    assert len(salts) == 32
    assert salt("user", 0, 0) == 348027853936337472


def test_per_value_repeats_by_length() -> None:
    repeated = per_value([7, 8, 9], [2, 0, 3], torch.device("cpu"))
    assert repeated.tolist() == [7, 7, 9, 9, 9]


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [2, 0, 1, 1], [1, 0, 2, 1]])
@pytest.mark.parametrize("weighted", [False, True])
def test_repeat_is_torchrecs_permutation(lengths: list[int], weighted: bool) -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.arange(sum(lengths)),
        lengths=torch.tensor(lengths),
        weights=torch.rand(sum(lengths)) if weighted else None,
    )
    found, expected = repeat(batch, [1, 0, 0]), batch.permute([1, 0, 0])
    assert found.keys() == expected.keys()
    assert found.length_per_key() == expected.length_per_key()
    assert torch.equal(found.values(), expected.values())
    assert torch.equal(found.lengths(), expected.lengths())


def test_full_rows_are_the_ids_own() -> None:
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=make_policy(Full()))
    (weight,) = collection.state_dict().values()
    batch = make_batch(16)
    items = weight[ROWS["user"] + batch["item"].values()]
    assert torch.equal(collection(batch)["item"], items)


def test_hash_rows_are_remainders() -> None:
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(Hash(share=0.01), min_rows=0)
    )
    (weight,) = collection.state_dict().values()
    batch = make_batch(16)
    assert torch.equal(collection(batch)["user"], weight[batch["user"].values() % 50])
    assert torch.equal(collection(batch)["item"], weight[50 + batch["item"].values() % 30])


def test_unified_concatenates_rows_of_one_table() -> None:
    method = Unified(num_embeddings=500, num_probes=3, seed=4)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(method, "adam", min_rows=0)
    )
    (weight,) = collection.state_dict().values()
    assert weight.shape == (500, 4)
    batch = make_batch(16)
    ids = batch["item"].values().tolist()
    for probe in range(3):
        rows = [(splitmix64(i + salt("item", probe, 4) & MASK) >> 32) * 500 >> 32 for i in ids]
        part = collection(batch)["item"][:, 4 * probe : 4 * probe + 4]
        assert torch.equal(part, weight[rows])


def test_unified_probes_of_a_value_are_independent_and_uniform() -> None:
    method = Unified(num_embeddings=64, num_probes=2)
    lowering = method.lower(make_tables())
    ids = torch.arange(60_000)
    batch = KeyedJaggedTensor(
        keys=list(ROWS), values=ids.repeat(3), lengths=torch.ones(180_000, dtype=torch.int32)
    )
    rows = lowering.ids(batch).values().view(6, 60_000)
    for row in rows:
        counts = np.bincount(row.numpy(), minlength=64)
        chi_squared = ((counts - 60_000 / 64) ** 2 / (60_000 / 64)).sum()
        assert chi_squared < 63 + 6 * np.sqrt(2 * 63)
    for i in range(6):
        for j in range(i):
            agree = (rows[i] == rows[j]).float().mean().item()
            assert agree == pytest.approx(1 / 64, abs=0.005)


def test_unified_takes_ids_far_beyond_any_table() -> None:
    tables = make_tables()
    tables[0].num_embeddings = 2**62
    collection = CompressedEmbeddingBagCollection(
        tables=tables, policy=make_policy(Unified(num_embeddings=100, num_probes=2))
    )
    with pytest.raises(UserError, match="needs ids numbered by frequency"):
        Unified(num_embeddings=100, head_share=0.5).lower(tables)
    batch = make_batch(4)
    values = batch.values().clone()
    values[:4] = torch.tensor([2**62 - 1, 10**18, 5, 0])
    huge = KeyedJaggedTensor(keys=batch.keys(), values=values, lengths=batch.lengths(), stride=4)
    assert collection(huge)["user"].shape == (4, 12)


def test_unified_deals_probes_to_several_tables() -> None:
    method = Unified(num_embeddings=900, num_probes=3, num_tables=3)
    lowering = method.lower(make_tables())
    assert [table.num_embeddings for table in lowering.tables] == [300] * 3
    assert [lookup.table[-1] for lookup in lowering.lookups] == list("012120201")


def test_unified_probes_by_name_make_narrower_vectors() -> None:
    method = Unified(num_embeddings=900, num_probes={"user": 3, "item": 2})
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=make_policy(method))
    assert collection(make_batch(8)).length_per_key() == [12, 8, 12]


def test_unified_rows_of_a_given_width() -> None:
    method = Unified(num_embeddings=900, num_probes=2, probe_dim=3)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(method, "adam")
    )
    assert collection(make_batch(8)).length_per_key() == [6, 6, 12]


@given(share=st.floats(min_value=0.0, max_value=0.99), tables=st.integers(1, 3))
def test_unified_heads_have_rows_of_their_own(share: float, tables: int) -> None:
    method = Unified(num_embeddings=3000, num_probes=2, num_tables=tables, head_share=share)
    lowering = method.lower(make_tables())
    ids = torch.cat([torch.arange(rows) for rows in ROWS.values()])
    lengths = torch.zeros(3, 5000, dtype=torch.int32)
    for feature, rows in enumerate(ROWS.values()):
        lengths[feature, :rows] = 1
    batch = KeyedJaggedTensor(keys=list(ROWS), values=ids, lengths=lengths.view(-1), stride=5000)
    found = lowering.ids(batch).to_dict()
    per_table = 3000 // tables
    seen: dict[str, list[int]] = {}
    for lookup in lowering.lookups:
        rows = found[lookup.name].values()
        assert int(rows.min()) >= 0
        assert int(rows.max()) < per_table
        seen.setdefault(lookup.table, []).extend(rows.tolist())
    for rows in seen.values():
        alone = sum(count == 1 for count in np.bincount(rows, minlength=per_table))
        # As many rows are dealt as the share allows, but for the remainder of an even share.
        assert alone >= int(per_table * share) - 6


def test_unified_even_shares() -> None:
    assert [_even_share(t, [2, 5, 9]) for t in (0, 5, 6, 12, 15, 16, 99)] == [0, 1, 2, 5, 8, 9, 9]


def test_unified_lookups_go_to_the_largest_tables() -> None:
    tables = make_tables()
    assert Unified(num_probes=3, lookups=5).probes(tables) == {"user": 2, "item": 2, "genre": 1}
    assert Unified(num_probes=3, lookups=99).probes(tables) == dict.fromkeys(ROWS, 3)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Unified(), "needs embedding.budget"),
        (Hash(), "needs embedding.budget"),
        (Hash(share=2.0), r"share = 2.0: must lie in \(0, 1\]"),
        (Unified(num_embeddings=10, num_probes=5), "12: is no multiple of 5 probes; use 10 or 15"),
        (Unified(num_embeddings=10, head_share=1.0), r"head_share = 1.0: must lie in \[0, 1\)"),
        (Unified(num_embeddings=10, probe_dim=0), "probe_dim = 0: below 1"),
        (Unified(num_embeddings=10, num_probes=0), "0 for 'user' is below 1"),
        (Unified(num_embeddings=10, num_probes={"usr": 1}), "did you mean 'user'"),
        (Unified(num_embeddings=10, lookups=2), "3 tables need one each"),
        (Unified(num_embeddings=1, num_tables=2), "1 rows cannot fill 2 tables"),
    ],
)
def test_wrong_knobs_are_one_clear_error(method: Unified | Hash, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompressedEmbeddingBagCollection(
            tables=make_tables(), policy=make_policy(method, min_rows=0)
        )


def test_unified_without_a_table_or_a_probe_is_refused() -> None:
    with pytest.raises(UserError, match=r"unified\.num_tables = 0: must be 1 or more"):
        Unified(num_tables=0)
    with pytest.raises(UserError, match=r"unified\.num_probes = \{\}: names no table"):
        Unified(num_probes={})


def test_constants_made_while_predicting_serve_training_too() -> None:
    method = GroupReduce(ranks={"user": (12, 6, 3, 0), "item": (5, 3, 2, 1), "genre": (4,)})
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(method, min_rows=0)
    )
    constant_tensor.cache_clear()
    with torch.inference_mode():
        quantize(collection, StoragePlan(types="fp32"))(make_batch(8))
    collection(make_batch(8)).values().sum().backward()
    assert not constant_tensor((1, 2), torch.device("cpu")).is_inference()
