"""Low rank, from scratch and from trained tables."""

import dataclasses

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.method import Trained, Values
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.policy import Policy, full_bytes
from recsys_compress.compress.spectrum import Spectrum, layer_item
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


def make_trained(optimizer: str) -> tuple[CompressedEmbeddingBagCollection, Trained]:
    """Returns full tables with a few strong directions and a mean, and what methods see of them.

    Early ids are looked up most often. Items hardly differ.
    """
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(Full(), optimizer, min_rows=0)
    )
    tables = {
        name: table.uniform_(-1, 1) * 2.0 ** -torch.arange(12) @ torch.randn(12, 12) + 1
        for name, table in collection.values(collection.state_dict())[0].tables.items()
    }
    tables["item"] *= 0.01
    collection.write([Values(tables=tables)], collection.state_dict())

    def moments(name: str) -> Moments:
        vectors, found = collection.vectors(name), Moments.zeros(12)
        found.add(vectors, 1 / torch.arange(1, len(vectors) + 1))
        return found

    return collection, Trained(vectors=collection.vectors, moments=moments)


def adopt(policy: Policy, optimizer: str) -> tuple[Policy, CompressedEmbeddingBagCollection]:
    """Returns the fitted policy and its collection with the trained tables taken over."""
    collection, trained = make_trained(optimizer)
    before = make_policy(Full(), optimizer, min_rows=0)
    given = collection.values(collection.state_dict())
    policy, values = policy.adopt(make_tables(), before, given, trained)
    adopted = CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy)
    adopted.write(values, adopted.state_dict())
    return policy, adopted


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_full_rank_keeps_the_trained_vectors(optimizer: str) -> None:
    trained, _ = make_trained(optimizer)
    batch = make_batch(64)
    _, whole = adopt(make_policy(LowRank(rank=12), optimizer, min_rows=0), optimizer)
    assert torch.equal(whole(batch).values(), trained(batch).values())
    # Tables as wide as the rank are left whole, so the decoder is tried at the last one below.
    _, nearly = adopt(make_policy(LowRank(rank=11), optimizer, min_rows=0), optimizer)
    assert nearly.output.combines["0"] is not None
    error = (nearly(batch).values() - trained(batch).values()).square().mean()
    assert error < 1e-5 * trained(batch).values().square().mean()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])  # padded, and not
@pytest.mark.parametrize("rank", [{"user": 2, "item": 3, "genre": 2}, 5])
def test_vectors_are_projected_on_the_components(
    rank: int | dict[str, int], optimizer: str
) -> None:
    method = LowRank(rank=rank)
    _, adopted = adopt(make_policy(method, optimizer, min_rows=0), optimizer)
    trained, view = make_trained(optimizer)
    for name, k in method.ranks(make_tables()).items():
        spectrum, vectors = Spectrum.of(view.moments(name)), trained.vectors(name).double()
        basis = spectrum.basis(k)
        expected = (vectors - spectrum.mean) @ basis @ basis.t() + spectrum.mean
        assert torch.allclose(adopted.vectors(name).double(), expected, atol=1e-5)


def test_frequent_ids_keep_more_of_their_vectors() -> None:
    _, adopted = adopt(make_policy(LowRank(rank=4), "adam", min_rows=0), "adam")
    trained, _ = make_trained("adam")
    vectors = trained.vectors("item").double()
    plain = Moments.zeros(12)
    plain.add(vectors)
    spectrum = Spectrum.of(plain)
    basis = spectrum.basis(4)
    unweighted = (vectors - spectrum.mean) @ basis @ basis.t() + spectrum.mean
    weights = 1 / torch.arange(1, len(vectors) + 1)
    ours = (adopted.vectors("item") - vectors).square().sum(dim=1) @ weights.double()
    theirs = (unweighted - vectors).square().sum(dim=1) @ weights.double()
    assert ours < theirs


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_budget_sets_the_ranks_by_the_spectra(share: float) -> None:
    budget = int(full_bytes(make_tables()) * share)
    policy = make_policy(LowRank(), "adam", min_rows=0)
    policy = dataclasses.replace(
        policy, default=dataclasses.replace(policy.default, budget_bytes=budget)
    )
    fitted, adopted = adopt(policy, "adam")
    used = adopted.size_report().table_bytes
    assert 0.9 * budget <= used <= budget
    assert isinstance(fitted.default.method, LowRank)
    ranks = fitted.default.method.ranks(make_tables())
    assert ranks["user"] > 2 * ranks["item"]


def test_a_budget_is_shared_with_the_models_layers() -> None:
    _, view = make_trained("adam")
    torch.manual_seed(0)
    layers = {"deep.0": nn.Linear(36, 256), "deep.2": nn.Linear(256, 2)}
    outputs = {
        "deep.0": torch.randn(500, 8) @ torch.randn(8, 256),
        "deep.2": torch.randn(500, 2),
    }
    items = []
    for name, layer in layers.items():
        moments = Moments.zeros(layer.out_features)
        moments.add(outputs[name])
        items.append(layer_item(name, layer, Spectrum.of(moments)))
    tables = make_tables()
    full = full_bytes(tables) + sum(item.sizes[-1] for item in items)
    options = TableOptions(optimizer="adam")
    view = dataclasses.replace(view, layers=tuple(items))
    method, values = LowRank().adopt(tables, view, int(0.8 * full), options)
    assert values.layers == {"deep.0": 8}  # has eight directions; "deep.2" is best left whole
    again, given = method.adopt(tables, view, int(0.8 * full), options)
    assert again == method
    assert given.layers == {}  # ranks that are given leave nothing to choose
    with pytest.raises(UserError, match="out of reach for 'low_rank'"):
        LowRank().adopt(tables, view, 1000, options)


def test_without_rank_and_budget_trained_tables_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs embedding\.budget or"):
        adopt(make_policy(LowRank(), "adam", min_rows=0), "adam")


def test_adopted_tables_are_trained_on() -> None:
    _, adopted = adopt(make_policy(LowRank(rank=3), "adam", min_rows=0), "adam")
    optimizer = torch.optim.Adam(adopted.parameters(), lr=1e-3)
    batch = make_batch(64)
    before = adopted(batch).values().square().sum()
    before.backward()
    optimizer.step()
    assert adopted(batch).values().square().sum() < before
