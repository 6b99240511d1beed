"""Block-wise low rank, from scratch and from trained tables."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.bags import Bags
from recsys_compress.compress.block_decoder import BlockDecoder
from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.method import Trained
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.group_reduce import GroupReduce
from recsys_compress.compress.moments import Moments
from recsys_compress.errors import UserError
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables

ADAM = TableOptions(optimizer="adam")
RANKS = {"user": (12, 6, 3, 0), "item": (5, 3, 2, 1), "genre": (4,)}


def make(
    method: GroupReduce | Full,
    tables: list[EmbeddingBagConfig] | None = None,
    *,
    is_weighted: bool = False,
) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=tables or make_tables(),
        policy=make_policy(method, "adam", min_rows=0),
        is_weighted=is_weighted,
    )
    with torch.no_grad():
        for name, parameter in collection.named_parameters():
            if name.endswith(".means"):
                parameter.uniform_(-1, 1)
    return collection


def trained(seed: int = 0) -> tuple[Trained, dict[str, Curvature]]:
    """Returns full tables whose rare ids are looked up less, and whose dims matter unevenly."""
    collection = make(Full())
    generator = torch.Generator().manual_seed(seed)
    curvatures = {}
    for name, rows in ROWS.items():
        factors = torch.randn(12, 12, generator=generator, dtype=torch.float64)
        matrix = factors @ torch.diag(0.6 ** torch.arange(12).double()) @ factors.t()
        weights = torch.arange(1, rows + 1).double() ** -1.5
        curvatures[name] = Curvature(weights=weights / weights.sum(), matrices=matrix[None])

    def no_moments(table: str) -> Moments:
        raise AssertionError(table)

    return Trained(
        vectors=collection.vectors,
        moments=no_moments,
        weights=lambda name: 1e5 * curvatures[name].weights,
        curvature=curvatures.__getitem__,
    ), curvatures


def by_hand(method: GroupReduce, collection: CompressedEmbeddingBagCollection) -> dict[str, Tensor]:
    """Returns the (n, D) vectors of all ids from codes, decoders and means, block by block."""
    (values,) = collection.values(collection.state_dict())
    projections, means = values.combine["projections"], list(values.combine["means"])
    found = {}
    for table in make_tables():
        blocks = []
        assert method.ranks is not None
        for number, rank in enumerate(method.ranks[table.name]):
            ids = method.blocks(table)[number]
            codes = values.tables.get(f"{table.name}#{number}", torch.zeros(ids, 0))
            if rank == 12:
                blocks.append(codes)
                continue
            decoder, projections = projections[:rank], projections[rank:]
            blocks.append(codes @ decoder + means.pop(0))
        found[table.name] = torch.cat(blocks)
    assert not len(projections)
    assert not means
    return found


def adopted(method: GroupReduce, given: Trained, budget: int | None) -> dict[str, Tensor]:
    """Returns the vectors that trained tables have under a method that takes them over."""
    method, values = method.adopt(make_tables(), given, budget, ADAM)
    collection = make(method)
    collection.write([values], collection.state_dict())
    return {name: collection.vectors(name) for name in ROWS}


@pytest.mark.parametrize("is_weighted", [False, True])
def test_vectors_are_decoded_codes_and_the_mean_of_the_ids_block(is_weighted: bool) -> None:
    method = GroupReduce(ranks=RANKS)
    collection = make(method, is_weighted=is_weighted)
    vectors = by_hand(method, collection)
    batch = make_batch(512, weighted=is_weighted)
    output = collection(batch)
    for feature in ROWS:
        bags = batch[feature]
        each = vectors[feature][bags.values()]
        if is_weighted:
            each = each * bags.weights()[:, None]
        expected = [bag.sum(0) for bag in each.split(bags.lengths().tolist())]
        assert torch.allclose(output[feature], torch.stack(expected), atol=1e-5)


def test_bags_may_reach_over_blocks() -> None:
    tables = make_tables()
    method = GroupReduce(ranks={**RANKS, "genre": (4,)})
    collection = make(method)
    ids = torch.tensor([0, 124, 125, 4999, 4999, 17])
    batch = KeyedJaggedTensor(
        keys=[table.name for table in tables], values=ids, lengths=torch.tensor([6, 0, 0])
    )
    expected = by_hand(method, collection)["user"][ids].sum(0)
    assert torch.allclose(collection(batch)["user"][0], expected, atol=1e-5)


def test_gradients_are_those_of_the_plain_formula() -> None:
    tables = make_tables()
    blocks = {t.name: GroupReduce(ranks=RANKS)._ranked(t) for t in tables}
    reads = [("user", 2), ("item", 0), ("genre", 0), ("user", 0), ("item", 3), ("item", 1)]
    reads += [("user", 1), ("item", 2)]
    decoder = BlockDecoder(tables, blocks, reads).double()
    batch = make_batch(1100)  # more than are decoded at a time
    widths = [blocks[name][number].rank for name, number in reads]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1100, sum(widths), generator=generator, dtype=torch.float64)
    weight = torch.randn(1100, 36, generator=generator, dtype=torch.float64)

    def plain(columns: Tensor) -> Tensor:
        codes = dict(zip(reads, columns.split(widths, dim=1), strict=True))
        projections, means, found = decoder.projections, list(decoder.means), []
        assert projections is not None
        for name in ROWS:
            ends = torch.tensor([block.ids for block in blocks[name]]).cumsum(0)
            own = batch[name]
            bags = torch.arange(1100).repeat_interleave(own.lengths().long())
            block_of = torch.searchsorted(ends, own.values(), right=True)
            vector = torch.zeros(1100, 12, dtype=torch.float64)
            for number, block in enumerate(blocks[name]):
                if block.rank == 12:
                    vector = vector + codes[name, number]
                    continue
                count = torch.bincount(bags[block_of == number], minlength=1100)
                vector = vector + count[:, None] * means.pop(0)
                if block.rank:
                    vector = vector + codes[name, number] @ projections[: block.rank]
                    projections = projections[block.rank :]
            found.append(vector)
        return torch.cat(found, dim=1)

    def gradients(decode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = vectors.clone().requires_grad_()
        output = decode(leaf)
        inputs = [leaf, *decoder.parameters()]
        return [output, *torch.autograd.grad((output * weight).sum(), inputs)]

    bags = Bags(features=batch, names=list(ROWS), is_weighted=False)
    for mine, expected in zip(gradients(lambda v: decoder(v, bags)), gradients(plain), strict=True):
        assert torch.allclose(mine, expected, atol=1e-9)


def test_two_features_of_a_table_share_codes_and_decoders() -> None:
    tables = [
        EmbeddingBagConfig(name=n, feature_names=f, num_embeddings=200, embedding_dim=8)
        for n, f in (("user", ["viewer", "author"]), ("page", ["page"]))
    ]
    collection = make(GroupReduce(ranks={"user": (3, 1), "page": (2, 8)}, num_blocks=2), tables)
    batch = KeyedJaggedTensor(
        keys=["viewer", "author", "page"],
        values=torch.tensor([1, 190, 1, 190, 1, 190]),
        lengths=torch.ones(6, dtype=torch.int32),
    )
    output = collection(batch)
    assert torch.equal(output["viewer"], output["author"])
    assert not torch.equal(output["viewer"], output["page"])


def test_whole_blocks_need_no_decoder() -> None:
    ranks = {"user": (12,) * 4, "item": (12,) * 4, "genre": (12,)}
    collection = make(GroupReduce(ranks=ranks))
    (values,) = collection.values(collection.state_dict())
    assert not values.combine
    batch = make_batch(8)
    rows = torch.cat([values.tables[f"user#{number}"] for number in range(4)])
    assert torch.equal(collection(batch)["user"], rows[batch["user"].values()])


def test_fit_gives_frequent_ids_more_and_uses_no_padding() -> None:
    tables = make_tables(dim=32)
    for optimizer, multiple in (("rowwise_adagrad", 4), ("adam", 1)):
        method = GroupReduce().fit(tables, 300_000, TableOptions(optimizer=optimizer))
        assert method.ranks is not None
        for ranks in method.ranks.values():
            assert list(ranks) == sorted(ranks, reverse=True)
            assert ranks[0] > 0
            assert all(rank % multiple == 0 for rank in ranks)


def test_a_least_rank_is_kept_by_every_block_or_out_of_reach() -> None:
    tables, given = make_tables(), trained()[0]
    assert any(
        0 in own
        for own in (GroupReduce().adopt(tables, given, 60_000, ADAM)[0].ranks or {}).values()
    )
    for weigh_by in ("logloss", "frequency"):
        wide = GroupReduce(least_rank=2, weigh_by=weigh_by)
        for method in (wide.fit(tables, 80_000, ADAM), wide.adopt(tables, given, 80_000, ADAM)[0]):
            assert method.ranks is not None
            assert all(rank >= 2 for own in method.ranks.values() for rank in own)
        with pytest.raises(UserError, match="out of reach"):
            wide.adopt(tables, given, 60_000, ADAM)


def test_a_gap_between_sizes_names_both_ends() -> None:
    # One block: rank 4 takes 40 * 16 + 5 * 48 bytes, rank 8 takes 40 * 32 + 9 * 48.
    with pytest.raises(UserError, match="the nearest are 880 and 1,712 bytes"):
        GroupReduce().fit(make_tables()[2:], 1_000, TableOptions())


def test_what_is_lost_is_what_was_predicted_and_no_other_ranks_lose_less() -> None:
    given, curvatures = trained()
    full = {name: given.vectors(name).double() for name in ROWS}

    def rise(ranks: dict[str, tuple[int, ...]]) -> float:
        new = adopted(GroupReduce(ranks=ranks), given, None)
        return sum(curvatures[n].rise(new[n].double() - full[n])[0] for n in ROWS)

    budget = 120_000
    method, _ = GroupReduce().adopt(make_tables(), given, budget, ADAM)
    assert method.ranks is not None
    least = rise(method.ranks)
    assert 0 < least < rise(GroupReduce().fit(make_tables(), budget, ADAM).ranks or {})
    # A component given by one block to another one of as many ids or more, of the same table.
    for table, ranks in method.ranks.items():
        for taker in range(len(ranks)):
            for giver in range(taker + 1, len(ranks)):
                moved = list(ranks)
                moved[giver], moved[taker] = moved[giver] - 1, moved[taker] + 1
                if min(moved) >= 0 and max(moved) <= 12:
                    assert rise({**method.ranks, table: tuple(moved)}) >= least * (1 - 1e-3)


def test_components_by_the_logloss_lose_less_of_it_than_by_frequency() -> None:
    given, curvatures = trained()
    ranks = {"user": (4, 3, 2, 1), "item": (4, 3, 2, 1), "genre": (3,)}
    rises = {}
    for weigh_by in ("logloss", "frequency"):
        new = adopted(GroupReduce(ranks=ranks, weigh_by=weigh_by), given, None)
        rises[weigh_by] = sum(
            curvatures[n].rise(new[n].double() - given.vectors(n).double())[0] for n in ROWS
        )
    assert rises["logloss"] < 0.7 * rises["frequency"]


def test_published_ranks_follow_the_mean_frequency_of_blocks() -> None:
    given, _ = trained()
    budget = 120_000
    method, _ = GroupReduce(weigh_by="frequency").adopt(make_tables(), given, budget, ADAM)
    used = make(method).size_report().table_bytes
    assert 0.5 * budget < used <= budget
    assert method.ranks is not None
    assert given.weights is not None
    pairs = []
    for table in make_tables():
        means = [own.mean() for own in given.weights(table.name).split(method.blocks(table))]
        pairs += [
            (float(mean), rank)
            for mean, rank in zip(means, method.ranks[table.name], strict=True)
            if 1 < rank < 8  # what is clipped is no share
        ]
    factors = [rank / mean for mean, rank in pairs]
    assert max(factors) < 2.1 * min(factors)  # ranks are whole numbers


def test_tables_are_taken_over_as_they_are_where_the_budget_holds_them() -> None:
    given, _ = trained()
    found = adopted(GroupReduce(), given, 10**9)
    assert all(torch.equal(found[name], given.vectors(name)) for name in ROWS)


def test_blocks_that_are_never_looked_up_lose_nothing() -> None:
    given, curvatures = trained()
    for name, curvature in curvatures.items():
        weights = curvature.weights.clone()
        weights[len(weights) // 4 :] = 0
        curvatures[name] = dataclasses.replace(curvature, weights=weights)
    method, _ = GroupReduce().adopt(make_tables(), given, 60_000, ADAM)
    assert method.ranks is not None
    assert method.ranks["user"][3] == method.ranks["item"][3] == 0


def test_a_table_that_no_logit_reads_is_taken_over_all_the_same() -> None:
    given, curvatures = trained()
    unread = dataclasses.replace(
        curvatures["item"],
        weights=torch.zeros(ROWS["item"]).double(),
        matrices=torch.zeros(1, 12, 12).double(),
    )
    curvatures["item"] = unread
    found = adopted(GroupReduce(), given, 100_000)
    assert all(torch.isfinite(vectors).all() for vectors in found.values())


def test_without_a_curvature_all_dims_count_alike() -> None:
    given, _ = trained()
    bare = dataclasses.replace(given, curvature=None, weights=None)
    found = adopted(GroupReduce(), bare, 200_000)
    assert all(torch.isfinite(vectors).all() for vectors in found.values())
    frequent = found["user"][:125] - given.vectors("user")[:125]
    assert frequent.norm() < given.vectors("user")[:125].norm()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GroupReduce(), "needs embedding.budget or embedding.methods.group_reduce.ranks"),
        (GroupReduce(ranks={}), r"ranks.user: has 0 ranks, but the table has 4 blocks"),
        (GroupReduce(ranks={**RANKS, "item": (0, 0, 0, 0)}), "ranks.item: has no rank above 0"),
        (GroupReduce(ranks={**RANKS, "genre": (13,)}), r"ranks.genre: 13 must lie in \[0, 12\]"),
    ],
)
def test_ranks_that_do_not_suit_are_refused(method: GroupReduce, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.lower(make_tables())


def test_knobs_out_of_range_and_tables_of_two_widths_are_refused() -> None:
    with pytest.raises(UserError, match="num_blocks = 0: must be 1 or more"):
        GroupReduce(num_blocks=0)
    for growth in (0.5, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"growth = {growth}: must be 1 or more, and finite"):
            GroupReduce(growth=growth)
    with pytest.raises(UserError, match="least_rank = -1: must be 0 or more"):
        GroupReduce(least_rank=-1)
    with pytest.raises(UserError, match=r"weigh_by = 'frequenzy'.*frequency"):
        GroupReduce(weigh_by="frequenzy")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"of one width, not \[8, 12\]"):
        GroupReduce(ranks=RANKS).lower([*make_tables()[:2], *make_tables(8)[2:]])


@pytest.mark.parametrize("rank", [1, 12])
def test_roots_of_a_curvature_undo_each_other(rank: int) -> None:
    factors = torch.randn(12, rank, generator=torch.Generator().manual_seed(0)).double()
    matrix = factors @ factors.t()
    curvature = Curvature(weights=torch.ones(1), matrices=matrix[None])
    root, inverse = curvature.roots()
    assert torch.allclose(root @ inverse, torch.eye(12).double(), atol=1e-9)
    assert float(torch.linalg.eigvalsh(root @ root - matrix).min()) > -1e-9
    assert float((root @ root - matrix).norm()) <= 12 * 1e-3 * float(matrix.norm())
