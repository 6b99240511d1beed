"""Dynamic sparse tables against dense ones under a mask."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.bitmap import Bitmap, bitmap_bytes, unpack
from recsys_compress.compress.growth import Gradients, Growing, Schedule, smallest
from recsys_compress.compress.hashing import constant_tensor
from recsys_compress.compress.hook import LiveTable
from recsys_compress.compress.method import Trained
from recsys_compress.compress.methods.dynamic_sparse import DynamicSparse
from recsys_compress.errors import UserError
from recsys_compress.train.shard import process_group
from tests.compress.elsewhere import DEVICE, Elsewhere
from tests.compress.masked import (
    IDS,
    Plain,
    Run,
    dense,
    index_of,
    loss,
    make,
    make_hook,
    mask_of,
    pool_of,
    pooled,
    single,
)
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables


@pytest.mark.parametrize("block", [1, 3, 4, 12])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_of", [make_batch, single])
def test_vectors_are_those_of_a_dense_table_under_a_mask(
    block: int, weighted: bool, batch_of: Callable[..., KeyedJaggedTensor]
) -> None:
    collection = make(DynamicSparse(density=0.3, block=block), is_weighted=weighted)
    batch = batch_of(50, weighted=weighted)
    table = dense(mask_of(index_of(collection), 12 // block), pool_of(collection))
    assert torch.allclose(collection(batch).values(), pooled(table, batch), atol=1e-6)


def test_a_feature_may_share_its_table() -> None:
    table = EmbeddingBagConfig(
        name="user", feature_names=["viewer", "author"], num_embeddings=50, embedding_dim=8
    )
    collection = CompressedEmbeddingBagCollection(
        tables=[table], policy=make_policy(DynamicSparse(density=0.5), min_rows=0)
    )
    ids = torch.tensor([1, 2, 1, 2])
    same = KeyedJaggedTensor(["viewer", "author"], ids, lengths=torch.ones(4, dtype=torch.int32))
    output = collection(same)
    assert torch.equal(output["viewer"], output["author"])
    assert output["viewer"].any()


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9, 1.0])
def test_blocks_are_exactly_so_many_and_spread_evenly(density: float) -> None:
    mask = mask_of(index_of(make(DynamicSparse(density=density))), 3)
    assert mask.sum() == round(density * 3 * IDS)
    shares = torch.stack([part.float().mean() for part in mask.split(2010)])
    assert (shares - density).abs().max() < 4.5 * math.sqrt(density * (1 - density) / 6030) + 1e-6


def test_the_seed_says_which_blocks() -> None:
    words = [index_of(make(DynamicSparse(density=0.1, seed=seed))).words for seed in (0, 0, 1)]
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])


def test_bytes_are_those_of_pool_mask_and_counts() -> None:
    report = make(DynamicSparse(num_blocks=500), "rowwise_adagrad").size_report()
    assert report.table_bytes == 500 * 16 + bitmap_bytes(3 * IDS)
    assert sum(report.auxiliary.values()) == bitmap_bytes(3 * IDS) == 95 * 40 + 16 * 15 - 240
    padded = make(DynamicSparse(num_blocks=500, block=1), "rowwise_adagrad").size_report()
    assert padded.table_bytes == 500 * 16 + bitmap_bytes(12 * IDS)


def test_ids_outside_their_table_are_refused() -> None:
    collection = make(DynamicSparse(density=0.1))
    batch = make_batch(8)
    for bad in (-1, 5000):
        batch.values()[0] = bad
        with pytest.raises(ValueError, match=rf"'user': id {bad} lies outside \[0, 5000\)"):
            collection(batch)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("redistribute", [True, False])
def test_training_equals_dense_weights_under_a_mask(optimizer: str, redistribute: bool) -> None:
    knobs = {"update_steps": 4, "window": 3, "stop": 0.8, "update_ratio": 0.4}
    method = DynamicSparse(density=0.2, redistribute=redistribute, **knobs)
    ends = [0, 3 * 5000, 3 * 8000, 3 * IDS]
    with process_group():
        run = Run(method, optimizer, steps=18)
        spans = [(0, 3 * IDS)] if redistribute else list(itertools.pairwise(ends))
        plain = Plain(mask_of(run.index, 3), run.live().weight, optimizer, spans)
        schedule = Schedule(every=4, window=3, stop=0.8, ratio=0.4)
        masks = [plain.mask.clone()]
        for number in range(18):
            batch = make_batch(256, seed=number)
            run.step(batch)
            plain.step(lambda w, b=batch: loss(pooled(w, b)), schedule, (number + 1) / 18)
            mask = mask_of(run.index, 3)
            assert torch.equal(mask, plain.mask)
            found = dense(mask, run.live().weight)
            assert torch.allclose(found, plain.weight.float(), atol=2e-5)
            masks.append(mask)
        for name, value in run.live().state.items():
            expected = plain.state[name == "exp_avg_sq"]
            if value.ndim:
                rows = value if value.ndim > 1 else value[:, None].expand(-1, 4)
                assert torch.allclose(dense(mask, rows), expected.float(), rtol=1e-3, atol=1e-7)
    changed = [n for n in range(18) if not torch.equal(masks[n], masks[n + 1])]
    assert changed == [3, 7, 11]  # at 16 of 18 steps they have stopped
    assert plain.mask.sum() == masks[0].sum() == round(0.2 * 3 * IDS)
    moved = (masks[-1].split([5000, 3000, 40])[2].sum() - masks[0][8000:].sum()).item()
    assert (moved > 0) == redistribute  # genres are seen most, and have the greatest gradients


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("stopped", [7, 8, 10])
def test_a_resumed_run_ends_as_one_never_stopped(optimizer: str, growth: str, stopped: int) -> None:
    method = DynamicSparse(density=0.2, update_steps=4, window=4, growth=growth)
    with process_group():
        whole, first, second = (Run(method, optimizer, steps=20) for _ in range(3))
        for number in range(13):
            whole.step(make_batch(64, seed=number))
        for number in range(stopped):
            first.step(make_batch(64, seed=number))
        if second.adam is not None:  # makes its state, which is then overwritten
            second.step(make_batch(64))
        saved = {name: value.clone() for name, value in first.tensors().items()}
        for name, value in second.tensors().items():
            if not name.startswith("hook/"):
                value.copy_(saved[name])
        second.hook.load_tensors(
            {n.removeprefix("hook/"): v for n, v in saved.items() if n.startswith("hook/")}
        )
        second.done = stopped
        for number in range(stopped, 13):
            second.step(make_batch(64, seed=number))
        expected, found = whole.tensors(), second.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_static_blocks_have_no_hook() -> None:
    assert make(DynamicSparse(density=0.1, growth="static")).hooks() == []


def positions(index: Bitmap) -> Tensor:
    return unpack(index.words).nonzero().flatten()


@given(data=st.data())
def test_blocks_keep_their_number_and_their_values(data: st.DataObject) -> None:
    """After every update a block's row is where its bit says, and a new one's is zero."""
    total = data.draw(st.integers(2, 400))
    count = data.draw(st.integers(1, total))
    cut = data.draw(st.integers(1, total - 1))
    ratio = data.draw(st.floats(0.01, 1.0))
    hook, index, pool, _ = make_hook(total, count, ratio=ratio, spans=[(0, cut), (cut, total)])
    state = torch.zeros(count)
    hook.bind(
        lambda _name: LiveTable(weight=pool, state={"sums": state, "step": torch.tensor(3.0)})
    )
    generator = torch.Generator().manual_seed(total)
    for update in range(5):
        before = positions(index)
        state.copy_(before + 1)
        values = pool.copy_(torch.randn(pool.shape, generator=generator)).clone()
        ids = torch.randint(total, (data.draw(st.integers(0, 60)),), generator=generator)
        rows = torch.randn(len(ids), 2, generator=generator)
        hook._gradients.parts.append((ids, rows))
        hook.on_step((update + 1) / 6)
        after = positions(index)
        assert len(after) == count
        assert (after < cut).sum() == (before < cut).sum()
        kept = torch.isin(after, before)
        assert torch.equal(state, torch.where(kept, after + 1, 0))
        assert torch.equal(pool[kept], values[torch.isin(before, after)])
        assert not pool[~kept].any()
        assert torch.isin(after[~kept], ids).all()
        assert torch.equal(index.rank(after), torch.arange(count))


def test_random_growth_is_uniform_and_seeded() -> None:
    counts = torch.zeros(60)
    hook, index, pool, _ = make_hook(60, 20, window=0, stop=0.5)
    start = positions(index)
    words = index.words.clone()
    hook.bind(lambda _name: LiveTable(weight=pool, state={}))
    hook._progress = 0.0
    for _ in range(1500):
        index.fill(words)
        pool.copy_(torch.arange(1.0, 21)[:, None])  # the first ten are dropped
        hook.on_step(1e-9)
        assert pool[:, 0].max() == 20
        counts[positions(index)] += 1
    assert (counts[start[10:]] == 1500).all()
    others = torch.cat([counts[start[:10]], counts[~torch.isin(torch.arange(60), start)]])
    deviation = (others - 1500 / 5) / (1500 * 0.2 * 0.8) ** 0.5
    assert len(others) == 50
    assert deviation.abs().max() < 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_gradients_are_summed_over_the_window(weighted: bool, pooling: PoolingType) -> None:
    """Three steps' sums against autograd's gradient of a dense table."""
    collection = make(
        DynamicSparse(density=0.3, update_steps=5, window=3), is_weighted=weighted, pooling=pooling
    )
    (hook,) = collection.hooks()
    assert isinstance(hook, Growing)
    table = dense(mask_of(index_of(collection), 3), pool_of(collection)).requires_grad_()
    for number in range(4):
        batch = make_batch(200, seed=number, weighted=weighted)
        loss(collection(batch).values()).backward()
        if number < 3:
            hook.on_step(0.1)
        vectors = pooled(table, batch)
        if pooling == PoolingType.MEAN:
            shares = torch.ones(200, 36)
            shares[:, 24:] = 1 / batch["genre"].lengths().clamp(min=1)[:, None]
            vectors = vectors * shares
        if number >= 2:
            loss(vectors).backward()
    ids, sums = hook._gradients.merge()
    assert torch.equal(ids, ids.unique())
    found = torch.zeros(IDS, 12).index_add(0, ids, sums)
    assert torch.allclose(found, table.grad, atol=1e-6)
    assert len(ids) < 2000  # nothing is as long as the tables


def test_merging_early_changes_no_sum() -> None:
    _, index, _, layout = make_hook(50, 5)
    gradients = Gradients(layout, index, 1000)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(50, 2)
    for _ in range(20):
        ids = torch.randint(50, (30,), generator=generator)
        rows = torch.randn(30, 2, generator=generator)
        expected.index_add_(0, ids, rows)
        features = KeyedJaggedTensor(["t"], ids, lengths=torch.ones(30, dtype=torch.int32))
        gradients.add(features, [rows])
        assert sum(len(i) for i, _ in gradients.parts) <= 150
    blocks, norms = gradients.norms()
    assert torch.equal(blocks, expected.any(1).nonzero().flatten())
    assert torch.allclose(norms, expected.norm(dim=1)[blocks], atol=1e-5)


def test_of_too_many_ids_those_of_greatest_sums_are_kept() -> None:
    _, index, _, layout = make_hook(50, 5)
    gradients = Gradients(layout, index, 10)
    sums = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    gradients.parts.append((torch.arange(50), sums))
    ids, found = gradients.merge()
    assert torch.equal(ids, sums.norm(dim=1).topk(10).indices.sort().values)
    assert torch.equal(found, sums[ids])


@pytest.mark.parametrize("window", [1, 0])
def test_blocks_move_alike_on_another_device(window: int) -> None:
    """The mask, the pool and gradients are there; a checkpoint comes back from the CPU."""
    words, pools = [], []
    for device in (torch.device("cpu"), DEVICE):
        with Elsewhere():
            hook, index, pool, _ = make_hook(500, 60, every=2, window=2 * window)
            index.words, index.counts = index.words.to(device), index.counts.to(device)
            live = LiveTable(weight=pool.to(device), state={"sums": torch.ones(60, device=device)})
            hook.bind(lambda _name, live=live: live)
            generator = torch.Generator().manual_seed(2)
            for number in range(6):
                ids = torch.randint(500, (80,), generator=generator).to(device)
                bags = KeyedJaggedTensor(
                    ["t"], ids, lengths=torch.ones(80, dtype=torch.int32, device=device)
                )
                rows = torch.randn(80, 2, generator=generator).to(device)
                hook._gradients.add(bags, [rows])
                saved = {name: value.cpu() for name, value in hook.tensors().items()}
                hook.load_tensors(saved)
                hook.on_step((number + 1) / 7)
            words.append(index.words.cpu())
            pools.append(live.weight.cpu())
    constant_tensor.cache_clear()  # none that is elsewhere may stay
    assert torch.equal(*words)
    assert torch.equal(*pools)
    assert not torch.equal(words[0], make_hook(500, 60)[1].words)


def test_the_ratio_falls_along_half_a_cosine() -> None:
    schedule = Schedule(every=1, window=1, ratio=0.5, stop=0.8)
    ratios = [schedule.ratio_at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    middle = (0.5 + 0.005) / 2
    expected = [0.5, middle + 0.2475 * 0.5**0.5, middle, middle - 0.2475 * 0.5**0.5, 0.005, 0.005]
    assert ratios == pytest.approx(expected)


@given(values=st.lists(st.integers(0, 5), min_size=1), data=st.data())
def test_smallest_takes_the_first_of_equals(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    chosen = smallest(torch.tensor(values).float(), count).nonzero().flatten().tolist()
    assert chosen == sorted(order[:count])


@pytest.mark.parametrize("budget", [None, 20_000])
def test_adopting_keeps_the_blocks_of_greatest_norm(budget: int | None) -> None:
    torch.manual_seed(0)
    trained = {name: torch.randn(rows, 12) for name, rows in ROWS.items()}
    before = DynamicSparse(num_blocks=700, growth="static")
    method, values = before.adopt(
        make_tables(), Trained(vectors=trained.__getitem__, moments=None), budget, TableOptions()
    )
    expected = 700 if budget is None else (20_000 - bitmap_bytes(3 * IDS)) // 16
    assert method == dataclasses.replace(before, num_blocks=expected)
    collection = make(method)
    collection.write([values], collection.state_dict())
    table = torch.cat(list(trained.values()))
    norms = table.view(-1, 4).norm(dim=1)
    kept = (norms >= norms.sort().values[-expected]).repeat_interleave(4).view(-1, 12)
    for batch in (make_batch(300), single(300)):
        assert torch.equal(collection(batch).values(), pooled(table * kept, batch))
    assert pool_of(collection).shape == (expected, 4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, r"needs embedding.budget or embedding.methods.dynamic_sparse.density"),
        ({"density": 0.0}, r"density = 0.0: must lie in \(0, 1\]"),
        ({"density": 0.1, "num_blocks": 5}, r"num_blocks or density, not both"),
        ({"num_blocks": 24_121}, r"num_blocks = 24121: must lie in \[1, 24120\]"),
        ({"density": 0.1, "block": 5}, r"embedding.dim = 12: .* use 10 or 15"),
        ({"density": 0.1, "block": 16}, r"embedding.dim = 12: .* use 16$"),
        ({"density": 0.1, "block": 0}, r"block = 0: must be at least 1"),
        ({"density": 0.1, "update_steps": 0}, r"update_steps = 0: must be at least 1"),
        ({"density": 0.1, "window": 0}, r"window = 0: must be at least 1"),
        ({"density": 0.1, "update_ratio": 1.5}, r"update_ratio = 1.5: must lie"),
        ({"density": 0.1, "stop": 0.0}, r"stop = 0.0: must lie"),
        ({"density": 0.1, "growth": "momentum"}, r"dynamic_sparse.growth = 'momentum'"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DynamicSparse(**knobs).lower(make_tables())


def test_tables_that_do_not_suit_are_refused() -> None:
    method = DynamicSparse(density=0.1, block=1)
    with pytest.raises(UserError, match="needs tables of one width, these have \\[8, 12\\]"):
        method.lower([*make_tables(8)[:1], *make_tables(12)[1:]])
    with pytest.raises(UserError, match=r"block = 1: makes 128 blocks .* use 2 or more"):
        method.lower(make_tables(128))
    tables = make_tables(8)
    tables[0].num_embeddings = 2**31
    with pytest.raises(UserError, match=r"'user': has 2,147,483,648 ids.*--encoding vocabulary"):
        method.fit(tables, 10**9, TableOptions())


def test_a_budget_below_the_least_names_the_limits() -> None:
    index, method = bitmap_bytes(3 * IDS), DynamicSparse()
    with pytest.raises(UserError, match=rf"from {index + 16:,} to {index + 3 * IDS * 16:,} bytes"):
        method.fit(make_tables(), index + 15, TableOptions())


def test_a_budget_of_more_than_all_blocks_stores_them_all() -> None:
    assert DynamicSparse().fit(make_tables(), 10**9, TableOptions()).num_blocks == 3 * IDS
