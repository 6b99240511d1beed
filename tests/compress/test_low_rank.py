import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.errors import UserError
from tests.compress.tables import make_batch, make_policy, make_tables


def make(rank: int | dict[str, int], *, is_weighted: bool = False):
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(),
        policy=make_policy(LowRank(rank=rank), "adam", min_rows=0),
        is_weighted=is_weighted,
    )
    with torch.no_grad():
        for name, parameter in collection.named_parameters():
            if ".means." in name:
                parameter.uniform_(-1, 1)
    return collection


@pytest.mark.parametrize("is_weighted", [False, True])
def test_vectors_are_decoded_codes_and_a_mean_for_each_id(is_weighted: bool) -> None:
    collection = make({"user": 2, "item": 2, "genre": 3}, is_weighted=is_weighted)
    state = collection.state_dict()
    users, items = state["dense.adam_d2.embedding_bags.adam_d2.weight"].split([5000, 3000])
    genres = state["dense.adam_d3.embedding_bags.adam_d3.weight"]
    decoders = [*state["output.combines.0.projections.2x12"]]
    decoders += [*state["output.combines.0.projections.3x12"]]
    means = [*state["output.combines.0.means.2x12"], *state["output.combines.0.means.3x12"]]
    batch = make_batch(32, weighted=is_weighted)
    output = collection(batch)
    for feature, codes, decoder, mean in zip(
        ("user", "item", "genre"), (users, items, genres), decoders, means, strict=True
    ):
        bags = batch[feature]
        vectors = codes[bags.values()] @ decoder + mean
        if is_weighted:
            vectors = vectors * bags.weights()[:, None]
        expected = [bag.sum(0) for bag in vectors.split(bags.lengths().tolist())]
        assert torch.allclose(output[feature], torch.stack(expected), atol=1e-5)


def test_weights_in_the_batch_of_an_unweighted_collection_are_ignored() -> None:
    collection = make(2)
    plain = collection(make_batch(16)).values()
    assert torch.equal(collection(make_batch(16, weighted=True)).values(), plain)


def test_two_features_of_a_table_share_code_and_decoder() -> None:
    tables = [
        EmbeddingBagConfig(name=n, feature_names=f, num_embeddings=50, embedding_dim=8)
        for n, f in (("user", ["viewer", "author"]), ("page", ["page"]))
    ]
    collection = CompressedEmbeddingBagCollection(
        tables=tables, policy=make_policy(LowRank(rank=2), min_rows=0)
    )
    batch = KeyedJaggedTensor(
        keys=["viewer", "author", "page"],
        values=torch.tensor([1, 2, 1, 2, 1, 2]),
        lengths=torch.ones(6, dtype=torch.int32),
    )
    output = collection(batch)
    assert torch.equal(output["viewer"], output["author"])
    assert not torch.equal(output["viewer"], output["page"])


def test_ranks_by_name_and_tables_left_alone() -> None:
    tables = make_tables()
    assert LowRank(rank={"user": 6, "item": 3}).ranks(tables) == {"user": 6, "item": 3, "genre": 3}
    tables[2].num_embeddings = 5  # 3 * (5 + 12) + 12 > 5 * 12
    assert LowRank(rank=3).ranks(tables)["genre"] == 12
    assert LowRank(rank=12).lower(tables).combine is None


def test_fit_raises_ranks_together_and_uses_no_padding() -> None:
    tables = make_tables(dim=32)
    for optimizer, multiple in (("rowwise_adagrad", 4), ("adam", 1)):
        options = TableOptions(optimizer=optimizer)
        ranks = LowRank().fit(tables, 400_000, options).ranks(tables)
        assert ranks["genre"] >= ranks["item"] >= ranks["user"] > 0
        assert all(rank % multiple == 0 for rank in ranks.values())
        assert ranks["item"] - ranks["user"] <= 4


def test_a_table_is_held_back_where_even_ranks_leave_a_gap() -> None:
    tables = make_tables(dim=32)[:2]
    fitted = LowRank().fit(tables, 440_000, TableOptions())
    # Of rank 12 and 16 they take 438,016 bytes; of rank 12 both, 389,376 and of 16 both, 518,528.
    assert fitted.ranks(tables) == {"user": 12, "item": 16}
    fitted = LowRank().fit(tables, 500_000, TableOptions())
    assert fitted.ranks(tables) == {"user": 12, "item": 20}


def test_a_gap_between_sizes_names_both_ends() -> None:
    tables = make_tables()[:1]
    with pytest.raises(UserError, match="the nearest are 80,240 and 160,432 bytes"):
        LowRank().fit(tables, 150_000, TableOptions())
    assert LowRank().fit(tables, 160_432, TableOptions()).rank == {"user": 8}


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (None, "needs embedding.budget or embedding.methods.low_rank.rank"),
        (0, r"0 for 'user' must lie in \[1, 12\]"),
        (13, r"13 for 'user' must lie in \[1, 12\]"),
        ({"usr": 2}, "no table 'usr' is factorized; did you mean 'user'"),
        ({}, "names no table"),
    ],
)
def test_wrong_knobs_are_one_clear_error(rank: int | dict[str, int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowRank(rank=rank).lower(make_tables())
