"""One global batch trained by one process and by two, stage by stage."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from benchmarks.case import Case, Figures, Shape, run_worker
from benchmarks.tables import CPU, Batches, build, policy, quiet_process_group
from recsys_compress.config import DataConfig, Job, ModelConfig, TrainConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.models import build_model
from recsys_compress.ranks import Ranks
from recsys_compress.train.build import Built
from recsys_compress.train.optim import Optimizers
from recsys_compress.train.step import Learner

READ, IDS, INPUT, LOOK_UP = "read", "id transform", "input exchange", "look-up, vector exchange"
FORWARD, BACKWARD = "dense forward", "backward, tables' update"
AVERAGE, OPTIMIZER = "gradient average", "dense optimizer"
STAGES = (READ, IDS, INPUT, LOOK_UP, FORWARD, BACKWARD, AVERAGE, OPTIMIZER)


def measure(case: Case) -> Figures:
    """Returns milliseconds of a step by stage, and samples/s of the global batch.

    Keys are a stage, for CPU time of all processes together, a stage and "/wall", for the mean of
    the processes, "cpu" (samples per second of that CPU time) and "wall".

    The case's name is the number of processes and of rows, like "2 x 1000000".
    """
    processes, _, rows = case.name.split()
    size = int(processes)
    if size > 1 and "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        return run_worker(case, launcher)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    with quiet_process_group():
        step = Step(dataclasses.replace(case.shape, rows=int(rows)), case.data, Ranks.current())
        for _ in range(case.shape.warmup + case.shape.steps):
            step()
        figures = step.figures()
    torch.set_num_threads(before)
    return figures


class Step:
    """A step of the trainer whose time is booked to stages.

    Rows are read, dense features and labels used; the ids of a batch are uniform over tables of
    the size wanted instead, and made beforehand.

    Args:
        shape: the workload; its batch is that of all processes.
        data: folder of the prepared dataset.
        ranks: the processes.
    """

    def __init__(self, shape: Shape, data: str, ranks: Ranks) -> None:
        self._shape = shape
        self._ranks = ranks
        dataset = PreparedDataset.open(data)
        reader = Reader(
            dataset,
            "train",
            batch_size=shape.batch,
            shuffle=True,
            rank=ranks.rank,
            world_size=ranks.size,
            buffer_rows=8 * shape.batch,
        )
        self._reader = iter(reader)
        local = dataclasses.replace(shape, batch=shape.batch // ranks.size)
        self._batches = Batches(local, zipf=0.0, seed=ranks.rank)
        torch.manual_seed(0)
        model = build(shape, "full", lambda e: build_model(ModelConfig(), e, shape.dense))
        embeddings = model.module.embeddings
        built = Built(
            job=Job(data=DataConfig(path=data)),
            policy=policy(shape, "full"),
            embeddings=embeddings,
            model=model,
            optimizers=Optimizers(model, embeddings, TrainConfig()),
            device=CPU,
        )
        phase = built.policy.phases()[0]
        self._learner = Learner(built, phase, ranks, iter(()))
        self._spent: dict[str, list[float]] = {}
        self._number = 0
        self._last = (0.0, 0.0)
        self._watch(embeddings)

    def __call__(self) -> None:
        """Takes a step."""
        self._last = _now()
        batch = next(self._reader)
        batch.sparse = self._batches.keyed(self._number)
        self._mark(READ)
        self._learner.step(batch, 0.0, 0.0, stop=False)
        self._mark(OPTIMIZER)
        self._number += 1

    def figures(self) -> Figures:
        """Returns medians of the steps after the warm-up; every process gets those of all."""
        skip = self._shape.warmup
        own = {}
        for key, spent in self._spent.items():
            by_step = [sum(part) for part in _chunks(spent, len(spent) // self._number)]
            own[key] = statistics.median(by_step[skip:])
        found = self._ranks.gather(own)
        figures = {
            key: sum(f[key] for f in found) / (len(found) if key.endswith("/wall") else 1)
            for key in own
        }
        cpu = sum(figures[stage] for stage in STAGES)
        wall = sum(figures[f"{stage}/wall"] for stage in STAGES)
        rate = self._shape.batch * 1e3
        return {**figures, "cpu": rate / cpu, "wall": rate / wall}

    def _watch(self, embeddings: Any) -> None:
        """Marks the ends of stages, which follow one another."""
        embeddings.ids.register_forward_pre_hook(lambda *_: self._mark(OPTIMIZER))  # zero_grad
        embeddings.ids.register_forward_hook(lambda *_: self._mark(IDS))
        sharded = next(
            m for m in embeddings.modules() if isinstance(m, ShardedEmbeddingBagCollection)
        )
        self._around(sharded, "compute_and_output_dist", before=INPUT)
        embeddings.register_forward_hook(lambda *_: self._mark(LOOK_UP))
        self._around(self._learner, "_loss", after=FORWARD)
        self._around(self._learner, "_averaged", before=BACKWARD, after=AVERAGE)

    def _around(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def marked(*given: Any, **named: Any) -> Any:
            if before:
                self._mark(before)
            found = inner(*given, **named)
            if after:
                self._mark(after)
            return found

        object.__setattr__(owner, name, marked)

    def _mark(self, stage: str) -> None:
        """Books the time since the last mark."""
        now = _now()
        for key, end, start in zip((stage, f"{stage}/wall"), now, self._last, strict=True):
            self._spent.setdefault(key, []).append((end - start) * 1e3)
        self._last = now


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _chunks(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
