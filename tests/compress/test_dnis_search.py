"""The search of `dnis`: soft selection of dims, and steps of their factors."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.bags import LogicalTable
from recsys_compress.compress.hook import LiveTable, SearchStep
from recsys_compress.compress.methods.dnis import DNIS
from recsys_compress.errors import UserError
from tests.compress.dnis import dense_tables, make, pooled, set_alpha, soft
from tests.compress.tables import make_batch, make_tables


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])  # the genres have fewer blocks
@pytest.mark.parametrize("weighted", [False, True])
def test_soft_selection_scales_each_block(order: tuple[int, ...], *, weighted: bool) -> None:
    tables = [make_tables()[i] for i in order]
    method = soft()
    collection = make(method, tables, is_weighted=weighted)
    dense = dense_tables(method, collection)
    scale = iter(set_alpha(collection))
    for table in tables:
        for part in method.slices([table]):
            dense[table.name][part.first : part.first + part.ids] *= next(scale)
    assert next(scale, None) is None
    batch = make_batch(200, weighted=weighted)
    expected = pooled({t.name: dense[t.name] for t in tables}, batch)
    assert torch.allclose(collection(batch).values(), expected, atol=1e-6)


def test_gradients_of_the_soft_selection_are_those_of_the_dense_formula() -> None:
    tables = [make_tables()[i] for i in (2, 0, 1)]
    method = soft()
    collection = make(method, tables, optimizer="adam")
    alpha = set_alpha(collection)
    batch, weight = make_batch(300), torch.randn(300, 36)
    (collection(batch).values() * weight).square().sum().backward()
    dense = {n: t.requires_grad_() for n, t in dense_tables(method, collection).items()}
    factors = alpha.detach().clone().requires_grad_()
    ids = {t.name: torch.tensor(method.blocks(t)) for t in tables}
    blocks = torch.split(factors, [len(i) for i in ids.values()])
    product = {
        name: dense[name] * block.repeat_interleave(ids[name], dim=0)
        for name, block in zip(ids, blocks, strict=True)
    }
    (pooled(product, batch) * weight).square().sum().backward()
    assert torch.allclose(alpha.grad, factors.grad, rtol=1e-4, atol=1e-5)
    gradients = collection.values({n: p.grad for n, p in collection.named_parameters()})[0].tables
    for table in tables:
        for part in method.slices([table]):
            expected = part.values(dense[table.name].grad)
            assert torch.allclose(gradients[part.name], expected, atol=1e-5)


def single_valued(tables: list[EmbeddingBagConfig]) -> list[EmbeddingBagConfig]:
    """Returns the same tables, all but the genres known to be single-valued."""
    return [
        LogicalTable(**vars(table), single_valued=True) if table.name != "genre" else table
        for table in tables
    ]


def lookups(collection: CompressedEmbeddingBagCollection) -> int:
    return sum(len(table.lookups) for table in collection.merged_tables())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_look_up_of_a_single_id_does_what_one_for_each_block_does(
    order: tuple[int, ...], *, weighted: bool
) -> None:
    tables = [make_tables()[i] for i in order]
    general = make(soft(), tables, optimizer="adam", is_weighted=weighted)
    one = make(soft(), single_valued(tables), optimizer="adam", is_weighted=weighted)
    batch = make_batch(300, weighted=weighted)
    set_alpha(general)
    one.load_state_dict(general.state_dict())
    columns, results = sum(table.embedding_dim for table in tables), []
    weight = torch.randn(300, columns)
    for collection in (general, one):
        vectors = collection(batch).values()
        (vectors * weight).square().sum().backward()
        results.append((vectors.detach(), {n: p.grad for n, p in collection.named_parameters()}))
    (expected, by_block), (found, at_once) = results
    assert torch.equal(found, expected)
    assert by_block.keys() == at_once.keys()
    for name, gradient in by_block.items():
        assert gradient.any()
        assert torch.allclose(at_once[name], gradient, rtol=1e-4, atol=1e-5), name
    for table in tables:  # read with all bags of other features empty
        assert torch.equal(one.vectors(table.name), general.vectors(table.name))
    assert lookups(one) < lookups(general)


def test_several_ids_in_a_bag_that_is_said_to_have_one_are_refused() -> None:
    tables = [LogicalTable(**vars(table), single_valued=True) for table in make_tables()]
    with pytest.raises(ValueError, match="single-valued has several ids in a bag"):
        make(soft(), tables)(make_batch(10))


class Problem:
    """A collection that is searched, and losses that are quadratic in its vectors."""

    def __init__(self, method: DNIS, *, tables: list[EmbeddingBagConfig]) -> None:
        self.method = method
        self.tables = tables
        self.collection = make(method, tables, optimizer="adam").double()
        self.alpha = set_alpha(self.collection)
        (self.hook,) = self.collection.hooks()
        self.hook.bind(self.live)
        generator = torch.Generator().manual_seed(2)
        self.weights = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, 64, (2, 8), generator=generator)
        ids[1, :3] = 3  # repeated
        self.batches = [
            KeyedJaggedTensor(
                keys=["f"], values=i, lengths=torch.ones(8, dtype=torch.int64), stride=8
            )
            for i in ids
        ]

    def live(self, name: str) -> LiveTable:
        (values,) = self.collection.values(self.collection.state_dict())
        return LiveTable(weight=values.tables[name], state={})

    def loss_of(self, number: int, vectors: Tensor) -> Tensor:
        return (vectors * self.weights[number]).sum(dim=1).exp().mean()

    def step(self) -> SearchStep:
        def loss(number: int) -> Callable[[], Tensor]:
            return lambda: self.loss_of(number, self.collection(self.batches[number]).values())

        self.collection.frozen = True
        return SearchStep(
            train=self.batches[0],
            valid=self.batches[1],
            train_loss=loss(0),
            valid_loss=loss(1),
        )

    def dense(self) -> Tensor:
        (values,) = self.collection.values(self.collection.state_dict())
        return torch.cat([values.tables[p.name] for p in self.method.slices(self.tables)])

    def dense_loss(self, number: int, table: Tensor, alpha: Tensor) -> Tensor:
        blocks = torch.tensor(self.method.blocks(self.tables[0]))
        scale = alpha.repeat_interleave(blocks, dim=0)
        return self.loss_of(number, (table * scale)[self.batches[number].values()])

    def gradient(self, inner_lr: float) -> Tensor:
        """Returns DARTS' gradient of alpha by autograd through the dense formula."""
        table = self.dense().requires_grad_()
        alpha = self.alpha.detach().clone().requires_grad_()
        valid, by_table = torch.autograd.grad(self.dense_loss(1, table, alpha), [alpha, table])
        (train,) = torch.autograd.grad(self.dense_loss(0, table, alpha), table, create_graph=True)
        (mixed,) = torch.autograd.grad((train * by_table).sum(), alpha)
        assert mixed.abs().max() > 1e-6
        return valid - inner_lr * mixed


def problem(*, single_valued: bool = False, **knobs: float) -> Problem:
    table = LogicalTable(
        name="f",
        feature_names=["f"],
        num_embeddings=64,
        embedding_dim=4,
        single_valued=single_valued,
    )
    return Problem(DNIS(soft=True, num_blocks=2, growth=2.0, **knobs), tables=[table])


@pytest.mark.parametrize("inner_lr", [0.0, 30.0])
@pytest.mark.parametrize("single", [False, True])
def test_a_search_step_of_first_and_second_order(inner_lr: float, *, single: bool) -> None:
    found = problem(single_valued=single, alpha_lr=0.3, l1=1e-3, inner_lr=inner_lr)
    before, tables = found.alpha.detach().clone(), found.dense().clone()
    gradient = found.gradient(inner_lr) + 1e-3
    if inner_lr:
        first = found.gradient(0.0) + 1e-3
        assert (gradient - first).abs().max() > 0.1 * first.abs().max()
    found.hook.search(found.step())
    gradient = gradient / (gradient.abs().mean(dim=1, keepdim=True) + 1e-8)
    expected = (before - 0.3 * gradient).clamp(0, 1)
    assert torch.allclose(found.alpha, expected, atol=1e-5)
    assert (expected == 0).any()  # clamped
    assert torch.equal(found.dense(), tables)  # restored to the bit
    assert not found.alpha.requires_grad
    assert found.alpha.grad is None


def test_a_block_without_examples_stays_as_it_is() -> None:
    found = problem(l1=0.1)
    first = found.method.blocks(found.tables[0])[0]
    found.batches[1] = KeyedJaggedTensor(
        keys=["f"],
        values=first + torch.arange(8),
        lengths=torch.ones(8, dtype=torch.int64),
        stride=8,
    )
    before = found.alpha.detach().clone()
    found.hook.search(found.step())
    assert torch.equal(found.alpha[0], before[0])
    assert (found.alpha[1] != before[1]).all()


def test_tables_are_restored_when_a_loss_fails() -> None:
    found = problem(inner_lr=1.0)
    tables, step = found.dense().clone(), found.step()

    def fails() -> Tensor:
        assert not torch.equal(found.dense(), tables)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        found.hook.search(dataclasses.replace(step, train_loss=fails))
    assert torch.equal(found.dense(), tables)


def test_a_search_over_tables_of_two_widths_is_refused() -> None:
    tables = make_tables()
    tables[0].embedding_dim = 8
    with pytest.raises(UserError, match=r"searches tables of one width, not \[8, 12\]"):
        soft().lower(tables)
