"""Kept dims of `dnis`: where they lie, which are kept, and what is refused."""

import math

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.method import Trained
from recsys_compress.compress.methods.dnis import DNIS
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.policy import full_bytes
from recsys_compress.compress.selection import Block, Scores, select
from recsys_compress.errors import UserError
from tests.compress.dnis import dense_tables, make, pooled, set_alpha, soft
from tests.compress.tables import make_batch, make_policy, make_tables

FUSED = TableOptions()
ADAM = TableOptions(optimizer="adam")


def trained(collection: CompressedEmbeddingBagCollection) -> Trained:
    def no_moments(table: str) -> Moments:
        raise AssertionError(table)

    return Trained(vectors=collection.vectors, moments=no_moments)


def uneven() -> DNIS:
    """Keeps other dims in each block, and none in one."""
    return DNIS(
        kept={
            "user": (
                Block(ids=10, dims=tuple(range(12))),
                Block(ids=1000, dims=(0, 3, 7, 11)),
                Block(ids=2000, dims=()),
                Block(ids=1990, dims=(1, 2, 3, 4, 5, 6, 8, 9)),
            ),
            "item": (Block(ids=2999, dims=(2, 5)), Block(ids=1, dims=(0, 1, 2, 3))),
            "genre": (Block(ids=20, dims=(0, 1, 2)), Block(ids=20, dims=(2, 3, 4))),
        }
    )


def test_blocks_grow_geometrically_and_hold_all_ids() -> None:
    user, item, genre = make_tables()
    method = DNIS(num_blocks=4, growth=3.0)
    assert method.blocks(user) == [125, 375, 1125, 3375]
    assert method.blocks(item) == [75, 225, 675, 2025]
    assert method.blocks(genre) == [40]  # a quarter of 40 would be a first block below 16 ids
    assert DNIS(num_blocks=2, growth=1.0).blocks(genre) == [20, 20]
    assert DNIS(num_blocks=3, growth=1.0).blocks(item) == [1000, 1000, 1000]
    # No more than leave the first block some ids, however many are allowed.
    assert DNIS(num_blocks=1000).blocks(user) == DNIS(num_blocks=6).blocks(user)
    assert len(DNIS(num_blocks=10**9, growth=1.0).blocks(user)) == 5000 // 16
    assert DNIS(growth=1e200).blocks(user) == [5000]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("weighted", [False, True])
def test_kept_dims_are_placed_and_others_are_zero(optimizer: str, *, weighted: bool) -> None:
    method = uneven()
    collection = make(method, optimizer=optimizer, is_weighted=weighted)
    batch = make_batch(200, weighted=weighted)  # bags of genres lie across both blocks
    expected = pooled(dense_tables(method, collection), batch)
    assert torch.allclose(collection(batch).values(), expected, atol=1e-6)
    assert not collection.vectors("user")[1010:3010].any()
    assert collection.vectors("user")[3010:, [1, 9]].any(dim=0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_one_id_in_each_bag_gives_the_same_as_any_bags(*, weighted: bool) -> None:
    collection = make(uneven(), is_weighted=weighted)
    batch = make_batch(64, weighted=weighted)
    ids = torch.cat([batch["user"].values(), batch["item"].values(), torch.arange(64) % 40])
    weights = torch.rand(192) if weighted else None
    single = KeyedJaggedTensor(
        keys=batch.keys(),
        values=ids,
        weights=weights,
        lengths=torch.ones(192, dtype=torch.int64),
        stride=64,
    )
    lengths = torch.ones(3, 65, dtype=torch.int64)
    lengths[:, 64] = 0  # an empty bag more takes the way of any bags
    general = KeyedJaggedTensor(
        keys=batch.keys(), values=ids, weights=weights, lengths=lengths.view(-1), stride=65
    )
    found = collection(general).values()
    assert torch.equal(collection(single).values(), found[:64])
    assert found[:64].any()
    assert not found[64].any()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_bytes_are_those_of_the_kept_dims(optimizer: str) -> None:
    method = uneven()
    collection = make(method, optimizer=optimizer)
    pad = 4 if optimizer == "rowwise_adagrad" else 1
    widths = {0: [12, 4, 8], 1: [2, 4], 2: [3, 3]}
    rows = {0: [10, 1000, 1990], 1: [2999, 1], 2: [20, 20]}
    expected = sum(
        4 * n * -(-w // pad) * pad for t in rows for n, w in zip(rows[t], widths[t], strict=True)
    )
    assert collection.size_report().table_bytes == expected


def test_gradients_of_placed_columns_are_those_of_the_dense_formula() -> None:
    method = uneven()
    collection = make(method, optimizer="adam")
    batch = make_batch(300)
    weight = torch.randn(300, 36)
    (collection(batch).values() * weight).square().sum().backward()
    dense = {n: t.requires_grad_() for n, t in dense_tables(method, collection).items()}
    (pooled(dense, batch) * weight).square().sum().backward()
    gradients = collection.values({n: p.grad for n, p in collection.named_parameters()})[0].tables
    for table in make_tables():
        for part in method.slices([table]):
            expected = part.values(dense[table.name].grad)
            assert torch.allclose(gradients[part.name], expected, atol=1e-5)


def test_phases_warm_up_search_and_retrain() -> None:
    method = DNIS(kept=uneven().kept, warmup_epochs=3, search_epochs=1)
    warm_up, search, retrain = method.phases()
    assert warm_up.method == Full()
    assert warm_up.epochs == 3
    assert search.method == DNIS(soft=True, warmup_epochs=3, search_epochs=1)
    assert search.freeze_model
    assert search.search
    assert retrain.method is method
    assert [p.method for p in DNIS(search_epochs=0).phases()] == [DNIS(search_epochs=0)]


def test_the_search_begins_with_the_trained_tables() -> None:
    batch = make_batch(200)
    before = CompressedEmbeddingBagCollection(
        tables=make_tables(), policy=make_policy(Full(), min_rows=0)
    )
    method, values = soft().adopt(make_tables(), trained(before), None, FUSED)
    after = make(method)
    after.write([values], after.state_dict())
    assert torch.allclose(after(batch).values(), before(batch).values(), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_the_merge_keeps_the_function_where_the_budget_holds_all(optimizer: str) -> None:
    batch = make_batch(200)
    before = make(soft(), optimizer=optimizer)
    set_alpha(before)
    method, values = DNIS().adopt(
        make_tables(), trained(before), full_bytes(make_tables()), TableOptions(optimizer=optimizer)
    )
    after = make(method, optimizer=optimizer)
    after.write([values], after.state_dict())
    assert torch.allclose(after(batch).values(), before(batch).values(), atol=1e-6)
    assert all(len(blocks) == 1 for blocks in method.kept.values())  # equal neighbours are joined


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_selection_meets_the_budget_and_keeps_trained_values(
    optimizer: str, share: float
) -> None:
    before = make(soft(), optimizer=optimizer)
    set_alpha(before)
    budget = int(full_bytes(make_tables()) * share)
    method, values = DNIS(num_blocks=3, growth=2.0).adopt(
        make_tables(), trained(before), budget, TableOptions(optimizer=optimizer)
    )
    after = make(method, optimizer=optimizer)
    after.write([values], after.state_dict())
    assert 0.95 * budget <= after.size_report().table_bytes <= budget
    for table in make_tables():
        old, new = before.vectors(table.name), after.vectors(table.name)
        assert torch.equal(new[new != 0], old[new != 0])
        assert new.any()


def test_without_a_budget_the_bytes_stay_what_they_were() -> None:
    before = make(soft())
    start = DNIS().fit(make_tables(), 100_000, FUSED)
    method, _ = start.adopt(make_tables(), trained(before), None, FUSED)
    sizes = [make(m).size_report().table_bytes for m in (start, method)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert method.kept != start.kept


@pytest.mark.parametrize("budget", [None, 100_000])
def test_from_scratch_dims_stay_as_they_were_fitted(budget: int | None) -> None:
    before = make(soft())
    start = DNIS().in_one_stage(adopting=False).fit(make_tables(), 100_000, FUSED)
    method, values = start.adopt(make_tables(), trained(before), budget, FUSED)
    assert method == start
    assert len(method.phases()) == 1
    after = make(method)
    after.write([values], after.state_dict())
    for table in make_tables():
        old, new = before.vectors(table.name), after.vectors(table.name)
        assert torch.equal(new[new != 0], old[new != 0])
        assert new.any()


def test_the_selection_by_hand() -> None:
    def worth(*dims: float) -> Tensor:
        return torch.tensor(dims)

    scores = {
        "a": [
            Scores(ids=10, dims=worth(0.0, 9.0, 0.0, 1.0)),
            Scores(ids=20, dims=worth(2.0, 0.5, 0.5, 3.0)),
        ],
        "b": [Scores(ids=5, dims=worth(0.1, 0.2, 0.3, 0.4))],
    }

    def kept(budget: int, least: int = 0) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
        found = select("dnis", scores, budget, ADAM, dim_multiple=2, least_dims=least)
        return {name: [(b.ids, b.dims) for b in blocks] for name, blocks in found.items()}

    # Chunks by worth: a0 (1, 3), which must stay; b0 (2, 3), likewise; a1 (0, 3) 5; a1 (1, 2) 1;
    # b0 (0, 1) 0.3; a0 (0, 2) 0. One dim of one id takes 4 bytes.
    assert kept(120) == {"a": [(10, (1, 3)), (20, ())], "b": [(5, (2, 3))]}
    assert kept(120 + 80) == {
        "a": [(10, (1, 3)), (10, (0, 3)), (10, ())],
        "b": [(5, (2, 3))],
    }
    assert kept(120 + 160 + 160) == {"a": [(10, (1, 3)), (20, (0, 1, 2, 3))], "b": [(5, (2, 3))]}
    assert kept(120 + 160 + 160 + 40 + 80) == {"a": [(30, (0, 1, 2, 3))], "b": [(5, (0, 1, 2, 3))]}
    with pytest.raises(UserError, match="it can take from 120 to 560 bytes"):
        kept(119)
    # Every block keeps a dim or more, and so a chunk of two.
    assert kept(120 + 160, 1) == {"a": [(10, (1, 3)), (20, (0, 3))], "b": [(5, (2, 3))]}
    with pytest.raises(UserError, match="it can take from 280 to 560 bytes"):
        kept(279, 2)


def test_equal_worth_is_cut_to_an_equal_share() -> None:
    scores = {name: [Scores(ids=n, dims=torch.ones(8))] for name, n in (("a", 100), ("b", 200))}
    found = select("dnis", scores, 300 * 16 + 300 * 4, FUSED, dim_multiple=4)
    whole, part = tuple(range(8)), (0, 1, 2, 3)
    assert found["a"] == (Block(ids=25, dims=whole), Block(ids=75, dims=part))
    assert found["b"] == (Block(ids=50, dims=whole), Block(ids=150, dims=part))


def test_padding_decides_the_size_of_a_chunk() -> None:
    scores = {"a": [Scores(ids=10, dims=torch.arange(6.0))]}
    fused = select("dnis", scores, 10 * 16, FUSED, dim_multiple=1)
    dense = select("dnis", scores, 10 * 12, ADAM, dim_multiple=1)
    assert fused["a"] == (Block(ids=10, dims=(2, 3, 4, 5)),)
    assert dense["a"] == (Block(ids=10, dims=(3, 4, 5)),)


def test_kept_dims_are_reported_by_block() -> None:
    tables = make_tables()[:1]
    kept = {"user": (Block(ids=1500, dims=(0, 1, 2, 3)), Block(ids=3500, dims=()))}
    method = DNIS(kept=kept, num_blocks=2, growth=4.0)
    found = method.kept_parts(tables)
    assert found.rows == {"user": [4.0, 4.0 * 500 / 4000]}
    assert found.most == 12
    assert DNIS(soft=True).kept_parts(tables) is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DNIS(), "needs embedding.budget or embedding.methods.dnis.kept"),
        (DNIS(kept={}), r"kept.user: has blocks of 0 ids, but the table has 5,000"),
        (
            DNIS(kept={"user": (Block(ids=5000, dims=()),)}),
            "kept.user: keeps no dims; each table has to keep some",
        ),
        (
            DNIS(kept={"user": (Block(ids=5000, dims=(3, 1)),)}),
            r"kept.user: dims \[3, 1\] must rise and lie in \[0, 12\)",
        ),
        (
            DNIS(kept={"user": (Block(ids=5000, dims=(3, 12)),)}),
            r"kept.user: dims \[3, 12\] must rise and lie in \[0, 12\)",
        ),
    ],
)
def test_wrong_blocks_are_one_clear_error(method: DNIS, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.lower(make_tables())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_blocks": 0}, "dnis.num_blocks = 0: must be 1 or more"),
        ({"growth": 0.5}, "dnis.growth = 0.5: must be 1.0 or more"),
        ({"growth": math.nan}, "dnis.growth = nan: must be 1.0 or more, and finite"),
        ({"growth": math.inf}, "dnis.growth = inf: must be 1.0 or more, and finite"),
        ({"alpha_lr": -0.1}, "dnis.alpha_lr = -0.1: must be 0.0 or more"),
    ],
)
def test_knobs_out_of_range_are_one_clear_error(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DNIS(**knobs)


def test_hashed_ids_are_refused() -> None:
    tables = make_tables()
    tables[0].num_embeddings = 2**40
    with pytest.raises(UserError, match=r"table 'user'.* prepared with --encoding vocabulary"):
        DNIS().fit(tables, 100_000, FUSED)
