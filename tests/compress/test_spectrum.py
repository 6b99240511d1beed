"""Principal components against numpy's, and the choice of ranks against trying all of them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recsys_compress.compress.moments import Moments
from recsys_compress.compress.spectrum import Item, Spectrum, choose_ranks, layer_item
from recsys_compress.errors import UserError
from recsys_compress.models.factorized import FactorizedLinear


def outputs(rows: int = 500, dim: int = 6) -> torch.Tensor:
    """Returns correlated vectors with a mean."""
    torch.manual_seed(0)
    return torch.randn(rows, dim) @ torch.randn(dim, dim) + torch.arange(dim)


def spectrum_of(vectors: torch.Tensor) -> Spectrum:
    moments = Moments.zeros(vectors.shape[1])
    for chunk in vectors.split(64):
        moments.add(chunk)
    return Spectrum.of(moments)


def test_components_are_numpys() -> None:
    vectors = outputs()
    spectrum = spectrum_of(vectors)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(spectrum.mean, vectors.double().numpy().mean(axis=0))
    np.testing.assert_allclose(spectrum.eigenvalues, singular**2 / len(vectors), rtol=1e-9)
    overlap = np.abs(np.sum(spectrum.eigenvectors.numpy() * right.T, axis=0))
    np.testing.assert_allclose(overlap, 1, rtol=1e-9)


@pytest.mark.parametrize("rank", range(7))
def test_what_is_lost_is_the_squared_error(rank: int) -> None:
    vectors = outputs().double()
    spectrum = spectrum_of(vectors)
    basis = spectrum.basis(rank)
    centred = vectors - spectrum.mean
    error = (centred - centred @ basis @ basis.t()).square().sum(dim=1).mean()
    assert float(spectrum.lost()[rank]) == pytest.approx(float(error), abs=1e-9)


def test_outputs_that_never_differ_lose_nothing() -> None:
    for spectrum in (Spectrum.of(Moments.zeros(3)), spectrum_of(torch.full((99, 3), 0.1))):
        assert spectrum.lost().tolist() == [0, 0, 0, 0]
        item = Item.of("t", [(1, 10), (3, 20)], spectrum.lost_share())
        assert item.losses == (0, 0)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_sizes_are_those_of_its_parameters(bias: bool, activation: bool) -> None:
    layer = nn.Linear(10, 6, bias=bias)
    item = layer_item("deep.0", layer, spectrum_of(outputs()), activation=activation)
    assert item.ranks[-1] == 6
    assert len(item.ranks) > 2
    assert item.sizes[-1] == sum(p.nbytes for p in layer.parameters())
    for rank, size in zip(item.ranks[:-1], item.sizes, strict=False):
        product = FactorizedLinear(10, 6, rank, nn.ReLU() if activation else None)
        assert size == sum(p.nbytes for p in product.parameters())
    assert list(item.sizes) == sorted(set(item.sizes))
    assert item.losses[0] < 1  # the share of its own variance
    assert item.losses[-1] == 0


def make(name: str, *steps: tuple[int, int, float]) -> Item:
    ranks, sizes, losses = zip(*steps, strict=True)
    return Item(name=name, ranks=ranks, sizes=sizes, losses=losses)


STEEP = make("steep", (1, 10, 1.0), (2, 20, 0.2), (3, 30, 0.0))
FLAT = make("flat", (1, 10, 0.9), (2, 20, 0.6), (3, 30, 0.3))


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [(20, [1, 1]), (29, [1, 1]), (30, [2, 1]), (40, [2, 2]), (50, [2, 3]), (60, [3, 3])],
)
def test_bytes_go_where_they_save_most(budget: int, ranks: list[int]) -> None:
    assert choose_ranks("low_rank", [STEEP, FLAT], budget) == ranks
    assert choose_ranks("low_rank", [FLAT, STEEP], budget) == ranks[::-1]


def test_one_large_raise_may_beat_several_small_ones() -> None:
    # By loss per byte `small` would come first, and leave no room for `large`.
    small = make("small", (1, 10, 0.5), (2, 20, 0.3))
    large = make("large", (1, 10, 0.5), (2, 40, 0.0))
    assert choose_ranks("low_rank", [small, large], 50) == [1, 2]


@st.composite
def _items(draw: st.DrawFn) -> list[Item]:
    items = []
    for i in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        sizes = np.cumsum(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
        falls = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        losses = np.cumsum(falls[::-1])[::-1] / 10
        steps = zip(range(1, count + 1), sizes.tolist(), losses.tolist(), strict=True)
        items.append(make(f"t{i}", *steps))
    return items


@given(items=_items(), budget=st.integers(1, 400))
def test_no_other_choice_within_the_budget_loses_less(items: list[Item], budget: int) -> None:
    def totals(levels: tuple[int, ...]) -> tuple[int, float]:
        chosen = list(zip(items, levels, strict=True))
        return sum(i.sizes[n] for i, n in chosen), sum(i.losses[n] for i, n in chosen)

    every = map(totals, itertools.product(*(range(len(item.ranks)) for item in items)))
    within = [loss for size, loss in every if size <= budget]
    if not within:
        with pytest.raises(UserError, match="out of reach for 'low_rank'"):
            choose_ranks("low_rank", items, budget)
        return
    size, loss = totals(tuple(rank - 1 for rank in choose_ranks("low_rank", items, budget)))
    assert size <= budget
    assert loss == pytest.approx(min(within))


def test_budgets_of_many_bytes_are_met_closely() -> None:
    spectra = [spectrum_of(outputs(dim=dim) ** 2) for dim in (32, 64, 128)]
    items = [
        layer_item(f"deep.{i}", nn.Linear(100 * (i + 1), len(s.mean)), s)
        for i, s in enumerate(spectra)
    ]
    whole = sum(item.sizes[-1] for item in items)
    for share in (0.1, 0.3, 0.6, 0.9, 0.999):
        budget = int(share * whole)
        ranks = choose_ranks("low_rank", items, budget)
        used = sum(i.sizes[i.ranks.index(rank)] for i, rank in zip(items, ranks, strict=True))
        assert 0.96 * budget <= used <= budget
    assert choose_ranks("low_rank", items, whole) == [32, 64, 128]


def test_no_items_need_no_bytes() -> None:
    assert choose_ranks("low_rank", [], 0) == []
