"""Look-up, backward and update of embedding tables alone."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Figures, Shape
from benchmarks.clock import time_steps
from benchmarks.tables import OPTIONS, Batches, build, quiet_process_group

ZIPF = 1.1


def measure(case: Case) -> Figures:
    """Returns samples/s of CPU time on one thread, and of wall time on one and on all.

    Keys are like "uniform/cpu", "uniform/wall" and "zipf/wall_all".
    """
    shape, cores = case.shape, os.cpu_count() or 1
    figures: Figures = {}
    with quiet_process_group():
        step = _torch_step(shape) if case.name == "torch" else _sharded_step(shape, case.name)
        for distribution, zipf in (("uniform", 0.0), ("zipf", ZIPF)):
            batches = Batches(shape, zipf=zipf)
            for suffix, threads in (("", 1), ("_all", cores)):
                torch.set_num_threads(threads)
                cpu, wall = time_steps(functools.partial(step, batches), shape)
                figures[f"{distribution}/wall{suffix}"] = shape.batch / wall * 1e3
                if threads == 1:
                    figures[f"{distribution}/cpu{suffix}"] = shape.batch / cpu * 1e3
    return figures


def _sharded_step(shape: Shape, name: str) -> Callable[[Batches, int], None]:
    model = build(shape, name)
    gradient = _gradient(shape)

    def step(batches: Batches, number: int) -> None:
        model(batches.keyed(number)).backward(gradient)

    return step


def _torch_step(shape: Shape) -> Callable[[Batches, int], None]:
    """Returns a step of plain torch: `nn.EmbeddingBag(sparse=True)` and Adagrad for each table."""
    bags = nn.ModuleList(
        nn.EmbeddingBag(shape.rows_per_table, shape.dim, mode="sum", sparse=True)
        for _ in range(shape.features)
    )
    optimizer = torch.optim.Adagrad(
        bags.parameters(), lr=OPTIONS.learning_rate, eps=OPTIONS.epsilon
    )
    offsets = torch.arange(shape.batch)
    gradient = _gradient(shape)

    def step(batches: Batches, number: int) -> None:
        optimizer.zero_grad()
        ids = batches.flat(number).view(shape.features, shape.batch)
        vectors = [bag(own, offsets) for bag, own in zip(bags, ids, strict=True)]
        torch.cat(vectors, dim=1).backward(gradient)
        optimizer.step()

    return step


def _gradient(shape: Shape) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape.batch, shape.features * shape.dim) * 1e-3
