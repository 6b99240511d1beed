import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.methods.quotient_remainder import QuotientRemainder
from recsys_compress.compress.policy import Policy, Rule, full_bytes
from recsys_compress.errors import UserError
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables

MODULI = {"user": 500, "item": 300}  # of share 0.1
OPERATIONS = {
    "mult": torch.mul,
    "add": torch.add,
    "concat": lambda first, second: torch.cat([first, second], dim=1),
}


def make(operation: str, *, min_rows: int = 100, is_weighted: bool = False):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(
        tables=make_tables(),
        policy=make_policy(
            QuotientRemainder(share=0.1, operation=operation), "adam", min_rows=min_rows
        ),
        is_weighted=is_weighted,
    )


def parts(collection: CompressedEmbeddingBagCollection) -> dict[str, torch.Tensor]:
    """The weights, cut into user's Q and R, then item's."""
    weight = collection.state_dict()[collection.size_report().physical[0].name]
    sizes = [10, 500, 10, 300]
    assert len(weight) == sum(sizes)
    return dict(zip(("user q", "user r", "item q", "item r"), weight.split(sizes), strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_are_made_of_quotient_and_remainder(operation: str) -> None:
    collection = make(operation)
    weights, batch = parts(collection), make_batch(64)
    output = collection(batch)
    for feature, modulus in MODULI.items():
        ids = batch[feature].values()
        quotients = weights[f"{feature} q"][ids // modulus]
        remainders = weights[f"{feature} r"][ids % modulus]
        assert torch.equal(output[feature], OPERATIONS[operation](quotients, remainders))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_two_ids_share_both_rows(operation: str) -> None:
    lowering = QuotientRemainder(share=0.1, operation=operation).lower(make_tables()[:1])
    ids = torch.arange(ROWS["user"])
    batch = KeyedJaggedTensor(
        keys=["user"], values=ids, lengths=torch.ones(len(ids), dtype=torch.int32)
    )
    rows = lowering.ids(batch).values().view(2, -1)
    assert rows.amin(dim=1).tolist() == [0, 0]
    assert (rows.amax(dim=1) + 1).tolist() == [t.num_embeddings for t in lowering.tables]
    assert len(torch.unique(rows, dim=1).T) == ROWS["user"]


def test_a_product_is_weighted_once() -> None:
    collection = make("mult", is_weighted=True)
    weights, batch = parts(collection), make_batch(32, weighted=True)
    ids = batch["user"].values()
    expected = weights["user q"][ids // 500] * weights["user r"][ids % 500]
    scale = batch["user"].weights()[:, None]
    assert torch.allclose(collection(batch)["user"], expected * scale, rtol=1e-6, atol=0)


def test_products_refuse_bags_of_several_ids() -> None:
    batch = make_batch(64)
    with pytest.raises(UserError, match=r"feature 'genre': a bag has several ids.*use operation"):
        make("mult", min_rows=0)(batch)
    make("add", min_rows=0)(batch)
    make("mult", min_rows=100)(batch)  # genre is left full


def test_tables_that_would_not_shrink_stay_as_they_are() -> None:
    small = EmbeddingBagConfig(
        name="small", feature_names=["small"], num_embeddings=4, embedding_dim=12
    )
    method = QuotientRemainder(share=0.1)
    lowering = method.lower([small, *make_tables()])
    assert method.modulus(small) is None
    assert [t.name for t in lowering.tables][:3] == ["small", "user#q", "user#r"]
    assert lowering.features == ["user", "item", "genre", "small"]
    ids = torch.tensor([0, 3, 2, 4999, 7, 2999, 1, 39])
    batch = KeyedJaggedTensor(
        keys=lowering.features,
        values=torch.tensor([7, 4999, 8, 2999, 1, 39, 0, 3]),
        lengths=torch.ones(8, dtype=torch.int32),
    )
    collection = CompressedEmbeddingBagCollection(
        tables=[small, *make_tables()], policy=make_policy(method, "adam", min_rows=0)
    )
    whole = collection.state_dict()[collection.size_report().physical[0].name]
    assert torch.equal(collection(batch)["small"], whole[ids[:2]])
    everything = QuotientRemainder(share=1.0).lower(make_tables())
    assert everything.combine is None
    assert [t.num_embeddings for t in everything.tables] == list(ROWS.values())


def test_the_least_size_has_the_root_of_the_ids() -> None:
    tables = make_tables()
    with pytest.raises(UserError, match=r"it can take from 12,720 to 385,920 bytes"):
        QuotientRemainder().fit(tables, 1000, make_policy(QuotientRemainder()).default.options)
    assert 48 * ((71 + 71) + (55 + 55) + (7 + 6)) == 12_720


def test_halves_cannot_fill_a_budget_above_half() -> None:
    tables = make_tables(16)
    method = QuotientRemainder(operation="concat")
    options = make_policy(method).default.options
    assert method.fit(tables, full_bytes(tables) // 2, options).share == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="out of reach"):
        method.fit(tables, full_bytes(tables) * 3 // 4, options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (QuotientRemainder(), "needs embedding.budget or embedding.methods.quotient_remainder"),
        (QuotientRemainder(share=0.0), r"share = 0.0: must lie in \(0, 1\]"),
    ],
)
def test_wrong_knobs_are_one_clear_error(method: QuotientRemainder, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.lower(make_tables())


def test_wrong_operations_and_widths_are_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"operation = 'multi': did you mean 'mult'"):
        QuotientRemainder(operation="multi")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"embedding\.dim = 5: .* needs an even one"):
        QuotientRemainder(share=0.1, operation="concat").lower(make_tables(dim=5))


def test_ids_that_only_the_last_quotient_has_room_for_are_refused() -> None:
    tables = [
        EmbeddingBagConfig(name="a", feature_names=["a"], num_embeddings=103, embedding_dim=8)
    ]
    rule = Rule(method=QuotientRemainder(share=0.1))
    collection = CompressedEmbeddingBagCollection(tables=tables, policy=Policy(default=rule))
    bags = KeyedJaggedTensor(
        keys=["a"], values=torch.tensor([102, 103]), lengths=torch.tensor([1, 1])
    )
    with pytest.raises(ValueError, match=r"'a': id 103 lies outside \[0, 103\)"):
        collection(bags)


def test_tables_that_would_be_stored_under_one_name_are_refused() -> None:
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[field], num_embeddings=rows, embedding_dim=8)
        for name, field, rows in (("a", "f", 1000), ("a#q", "g", 2))
    ]
    rule = Rule(method=QuotientRemainder(share=0.1))
    with pytest.raises(UserError, match="two would be stored as 'a#q'; rename one of them"):
        CompressedEmbeddingBagCollection(tables=tables, policy=Policy(default=rule, min_rows=0))
