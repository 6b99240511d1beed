"""The solver against brute force, and at scale."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_compress.plan.solver import Options, cheapest, frontier, solve

OPTION = st.tuples(st.integers(0, 60), st.integers(0, 100))
PROBLEM = st.lists(st.lists(OPTION, min_size=1, max_size=6), min_size=1, max_size=5)


def items_of(problem: list[list[tuple[int, int]]]) -> list[Options]:
    return [
        Options(
            costs=np.array([cost for cost, _ in options], dtype=np.float64),
            losses=np.array([loss for _, loss in options], dtype=np.float64) / 7,
        )
        for options in problem
    ]


def brute_force(items: list[Options], budget: float) -> float | None:
    """Returns the least loss by trying everything."""
    found = [
        sum(item.losses[o] for item, o in zip(items, options, strict=True))
        for options in itertools.product(*(range(len(item.costs)) for item in items))
        if sum(item.costs[o] for item, o in zip(items, options, strict=True)) <= budget
    ]
    return min(found, default=None)


@given(PROBLEM, st.integers(0, 250))
@settings(max_examples=300, deadline=None)
def test_the_choice_is_the_best_there_is(problem: list[list[tuple[int, int]]], budget: int) -> None:
    items = items_of(problem)
    best, found = brute_force(items, budget), solve(items, budget)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.loss == pytest.approx(best)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.cost <= budget
    assert found.cost == sum(i.costs[o] for i, o in zip(items, found.options, strict=True))


@given(PROBLEM, st.integers(0, 80))
@settings(max_examples=150, deadline=None)
def test_the_cheapest_choice_of_a_loss(problem: list[list[tuple[int, int]]], most: int) -> None:
    items = items_of(problem)
    found = cheapest(items, most / 7)
    choices = itertools.product(*(range(len(item.costs)) for item in items))
    sums = [
        (
            sum(i.costs[o] for i, o in zip(items, c, strict=True)),
            sum(i.losses[o] for i, o in zip(items, c, strict=True)),
        )
        for c in choices
    ]
    best = min((cost for cost, loss in sums if loss <= most / 7 + 1e-9), default=None)
    assert (None if found is None else found.cost) == best


@given(PROBLEM, st.integers(0, 250))
@settings(max_examples=100, deadline=None)
def test_the_frontier_bounds_every_choice(
    problem: list[list[tuple[int, int]]], budget: int
) -> None:
    items = items_of(problem)
    best = brute_force(items, budget)
    bound = frontier(items).bound(np.array([float(budget)]))[0]
    assert bound <= (np.inf if best is None else best + 1e-9)


def test_ten_thousand_tables_take_seconds() -> None:
    generator = np.random.default_rng(0)
    items = []
    for _ in range(10_000):
        rows = int(10 ** generator.uniform(2, 6))
        costs = np.sort(rows * generator.choice(np.arange(1, 65), 20, replace=False)).astype(float)
        losses = generator.lognormal(-3, 2) * costs**-0.5 * generator.uniform(0.7, 1.3, 20)
        items.append(Options(costs=costs, losses=losses))
    budget = 0.2 * sum(item.costs[-1] for item in items)
    started = time.perf_counter()
    found = solve(items, budget)
    seconds = time.perf_counter() - started
    assert found is not None
    assert seconds < 10
    assert found.cost <= budget
    assert found.gap <= 1e-4 * found.loss
