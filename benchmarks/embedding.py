"""Look-up, backward and update of embedding tables alone."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.case import Case, Figures, Shape
from benchmarks.clock import time_steps
from benchmarks.tables import CPU, OPTIONS, Batches, build, quiet_process_group
from recsys_compress.compress import Policy, Rule
from recsys_compress.compress.hook import SearchStep
from recsys_compress.compress.methods.dynamic_sparse import DynamicSparse
from recsys_compress.compress.methods.full import Full
from recsys_compress.config import DataConfig, Job, TrainConfig
from recsys_compress.train.build import Built
from recsys_compress.train.optim import Optimizers

ZIPF = 1.1
# Steps from one drop and growth of blocks to the next, with a window of summed gradients before it.
CYCLES = {"dynamic_sparse": DynamicSparse().update_steps}
_PHASE_STEPS = 1000  # of which the steps measured are the first


def measure(case: Case) -> Figures:
    """Returns samples/s of CPU time on one thread, and of wall time on one and on all.

    Keys are like "uniform/cpu", "uniform/wall" and "zipf/wall_all".
    """
    shape, cores = case.shape, os.cpu_count() or 1
    figures: Figures = {}
    with quiet_process_group():
        make = {"torch": _torch_step, "stock": _sharded_step}.get(case.name, _our_step)
        step = make(shape, case.name)
        for distribution, zipf in (("uniform", 0.0), ("zipf", ZIPF)):
            batches = Batches(shape, zipf=zipf)
            for suffix, threads in (("", 1), ("_all", cores)):
                torch.set_num_threads(threads)
                cpu, wall = time_steps(
                    functools.partial(step, batches), shape, cycle=CYCLES.get(case.name)
                )
                figures[f"{distribution}/wall{suffix}"] = shape.batch / wall * 1e3
                if threads == 1:
                    figures[f"{distribution}/cpu{suffix}"] = shape.batch / cpu * 1e3
    return figures


def _sharded_step(shape: Shape, name: str) -> Callable[[Batches, int], None]:
    """Returns a step of TorchRec's own collection."""
    model = build(shape, name)
    gradient = _gradient(shape)

    def step(batches: Batches, number: int) -> None:
        model(batches.keyed(number)).backward(gradient)

    return step


def _our_step(shape: Shape, name: str) -> Callable[[Batches, int], None]:
    """Returns a step of ours, with all that the trainer does for the method.

    That is the dense optimizer of what combines look-ups, hooks, and in a phase that searches
    also the step that the hook takes on another batch.
    """
    model = build(shape, name)
    embeddings = model.module.embeddings
    built = Built(
        policy=Policy(default=Rule(method=Full())),
        embeddings=embeddings,
        model=model,
        optimizers=Optimizers(model, embeddings, TrainConfig()),
        device=CPU,
        job=Job(data=DataConfig(path="")),
    )
    embeddings.bind_hooks(built.live)
    gradient = _gradient(shape)
    searches = name.endswith("search")

    def loss(features: KeyedJaggedTensor) -> Tensor:
        return (model(features) * gradient).sum()

    def step(batches: Batches, number: int) -> None:
        built.optimizers.zero_grad()
        features = batches.keyed(number)
        model(features).backward(gradient)
        built.optimizers.step(tables_only=searches)
        for hook in embeddings.hooks():
            if searches:
                valid = batches.keyed(number + 1)
                embeddings.frozen = True
                hook.search(
                    SearchStep(
                        train=features,
                        valid=valid,
                        train_loss=functools.partial(loss, features),
                        valid_loss=functools.partial(loss, valid),
                    )
                )
                embeddings.frozen = False
            hook.on_step(min(1.0, number / _PHASE_STEPS))

    return step


def _torch_step(shape: Shape, _name: str) -> Callable[[Batches, int], None]:
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
