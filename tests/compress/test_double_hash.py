import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.hashing import mix, salt, to_range
from recsys_compress.compress.methods.double_hash import DoubleHash
from recsys_compress.errors import UserError
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables


@pytest.mark.parametrize("operation", ["concat", "add"])
def test_vectors_are_made_of_two_hashed_rows(operation: str) -> None:
    method = DoubleHash(share=0.1, operation=operation, seed=3)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(method, "adam")
    )
    weight = collection.state_dict()[collection.size_report().physical[0].name]
    rows = {"concat": [1000, 600], "add": [500, 300]}[operation]
    assert weight.shape == (sum(rows), 6 if operation == "concat" else 12)
    batch = make_batch(64)
    for feature, size, table in zip(("user", "item"), rows, weight.split(rows), strict=True):
        first, second = (
            table[to_range(mix(batch[feature].values() + salt(feature, probe, 3)), size)]
            for probe in range(2)
        )
        expected = torch.cat([first, second], 1) if operation == "concat" else first + second
        assert torch.equal(collection(batch)[feature], expected)


def test_few_ids_share_both_rows() -> None:
    lowering = DoubleHash(share=0.2, operation="add").lower(make_tables()[:1])
    ids = torch.arange(ROWS["user"])
    batch = KeyedJaggedTensor(
        keys=["user"], values=ids, lengths=torch.ones(len(ids), dtype=torch.int32)
    )
    rows = lowering.ids(batch).values().view(2, -1)
    assert rows.max() < 1000
    # Of 12.5 M pairs of ids, 1 in a million is expected to agree twice; by one hash 12,500 would.
    assert len(torch.unique(rows, dim=1).T) > ROWS["user"] - 40
    assert len(rows[0].unique()) < 1000


def test_wrong_knobs_are_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"needs embedding\.budget or .*\.double_hash\."):
        DoubleHash().lower(make_tables())
    with pytest.raises(UserError, match=r"share = 1.5: must lie in \(0, 1\]"):
        DoubleHash(share=1.5).lower(make_tables())
    with pytest.raises(UserError, match="operation = 'conct': did you mean 'concat'"):
        DoubleHash(operation="conct")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'double_hash' with operation 'concat' needs an even one"):
        DoubleHash(share=0.1).lower(make_tables(dim=7))
