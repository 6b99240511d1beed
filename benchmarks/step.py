"""The whole training step of DCN-V2, stage by stage."""

import os
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.case import Case, Figures, Shape
from benchmarks.clock import Stages, time_steps
from benchmarks.tables import Batches, build, quiet_process_group
from recsys_compress.config import ModelConfig
from recsys_compress.models import build_model

BATCH, IDS, LOOK_UP = "batch to KJT", "ids", "look-up"
FORWARD, BACKWARD, TABLES = "dense forward", "dense backward", "tables backward"
OPTIMIZER = "dense optimizer"
STAGES = (BATCH, IDS, LOOK_UP, FORWARD, BACKWARD, TABLES, OPTIMIZER)


def measure(case: Case) -> Figures:
    """Returns CPU milliseconds by stage on one thread, and samples/s.

    Keys are the stages', "cpu" (of one thread), "wall" (of one) and "wall_all" (of all).
    """
    with quiet_process_group():
        step = TrainingStep(case.shape, case.name)
        torch.set_num_threads(1)
        cpu, wall = time_steps(step, case.shape)
        stages = step.stages.medians(case.shape.warmup)
        torch.set_num_threads(os.cpu_count() or 1)
        _, wall_all = time_steps(step, case.shape)
    samples = {"cpu": cpu, "wall": wall, "wall_all": wall_all}
    return stages | {key: case.shape.batch / spent * 1e3 for key, spent in samples.items()}


class TrainingStep:
    """A step of DCN-V2 that books its time to stages.

    Args:
        shape: the workload.
        name: "stock", or a method of ours.
    """

    def __init__(self, shape: Shape, name: str) -> None:
        torch.manual_seed(0)
        self.stages = Stages()
        self._batches = Batches(shape, zipf=0.0)
        self._dense = torch.randn(shape.batch, shape.dense)
        self._labels = (torch.rand(shape.batch) < 0.3).float()
        self._model = build(shape, name, lambda e: build_model(ModelConfig(), e, shape.dense))
        fused = set(self._model.fused_optimizer.params)
        rest = [p for n, p in self._model.named_parameters() if n not in fused]
        self._optimizer = torch.optim.AdamW(rest, fused=True)
        self._embedding = 0.0
        self._ids = 0.0
        self._vectors_done = 0.0
        self._watch(self._model.module)

    def __call__(self, number: int) -> None:
        """Takes a step on batch `number`."""
        stages = self.stages
        self._embedding = self._ids = 0.0
        with stages.stage(BATCH):
            features = self._batches.keyed(number)
        start = time.process_time()
        logits = self._model(self._dense, features)
        loss = binary_cross_entropy_with_logits(logits, self._labels)
        middle = time.process_time()
        loss.backward()
        end = time.process_time()
        with stages.stage(OPTIMIZER):
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        stages.add(IDS, self._ids * 1e3)
        stages.add(LOOK_UP, (self._embedding - self._ids) * 1e3)
        stages.add(FORWARD, (middle - start - self._embedding) * 1e3)
        stages.add(BACKWARD, (self._vectors_done - middle) * 1e3)
        stages.add(TABLES, (end - self._vectors_done) * 1e3)

    def _watch(self, model: Any) -> None:
        """Hooks clocks onto the embeddings, their id transform, and their vectors' gradient."""
        starts: dict[str, float] = {}

        def clock(module: nn.Module, attribute: str) -> None:
            def before(*_: object) -> None:
                starts[attribute] = time.process_time()

            def after(*_: object) -> None:
                setattr(self, attribute, time.process_time() - starts[attribute])

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)

        clock(model.embeddings, "_embedding")
        if hasattr(model.embeddings, "ids"):
            clock(model.embeddings.ids, "_ids")
        # The tables' backward is the last node of the graph: it begins when this gradient is there.
        model.features.register_forward_hook(
            lambda _module, _inputs, vectors: vectors.register_hook(self._mark) and None
        )

    def _mark(self, _gradient: Tensor) -> None:
        self._vectors_done = time.process_time()
