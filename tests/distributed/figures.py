"""What each process of a real training holds, saves and tells the others, in bytes."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_compress.config import Job, ShardingConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.dryrun import SavedBytes
from recsys_compress.train.shard import parts, process_group
from recsys_compress.train.trainer import Trainer
from tests.train.jobs import make_job

STEPS = 4  # before the first one at which dynamic_sparse moves blocks


def job_of(dataset: PreparedDataset, folder: Path, name: str, kind: str) -> Job:
    job = make_job(dataset, folder, name, batch_size=2000)
    return dataclasses.replace(job, sharding=ShardingConfig(kind=kind))  # type: ignore[arg-type]


def main(dataset: str, folder: str, cases: list[list[str]]) -> dict[str, Any]:
    """Returns by case the mean figures of a few steps, of this process."""
    opened = PreparedDataset.open(Path(dataset))
    found = {}
    with process_group() as ranks:
        for name, kind in cases:
            job = job_of(opened, Path(folder), name, kind)
            found[f"{name} {kind}"] = _measure(Trainer(job, ranks, [], None))
    return found


class Collectives(TorchDispatchMode):
    """Counts bytes given to and got from collectives, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            op = name.split(".")[1]
            if op == "allreduce_":
                sent = received = sum(map(_bytes, args[0]))
            else:
                received, sent = _bytes(args[0]), _bytes(args[1])
            # An all-to-all of floats is of pooled vectors: forward first, then backward.
            if op == "alltoall_base_":
                op += str(args[0].is_floating_point()) + str(torch._C._current_graph_task_id() >= 0)
            self.bytes[f"{op} sent"] += sent
            self.bytes[f"{op} received"] += received
        return func(*args, **(kwargs or {}))


OPERATORS = {
    "ids": ("alltoall_base_FalseFalse",),
    "vectors forward": ("_reduce_scatter_base_", "alltoall_base_TrueFalse"),
    "vectors backward": ("_allgather_base_", "alltoall_base_TrueTrue"),
    "gradients": ("allreduce_",),
}


def _measure(trainer: Trainer) -> dict[str, Any]:
    batches = iter(trainer.reader)
    built, learner = trainer.built, trainer.learner
    learner.step(next(batches), 0.0, 0.01, stop=False)  # optimizers make their state
    model = [p.tensor for value in built.state().values() for p in parts(value)]
    optimizers = built.optimizers
    state = {**optimizers.fused_tensors(), **optimizers.dense_tensors()}
    held = [p.tensor for value in state.values() for p in parts(value)]
    calls, saved = Collectives(), 0
    for _ in range(STEPS):
        counter = SavedBytes([*model, *held])
        with calls, counter:
            learner.step(next(batches), 0.01, 0.02, stop=False)
        saved += counter.total
    exchanges = {
        name: {
            way: sum(calls.bytes[f"{op} {way}"] for op in operators) / STEPS
            for way in ("sent", "received")
        }
        for name, operators in OPERATORS.items()
    }
    known = {f"{op} {way}" for ops in OPERATORS.values() for op in ops for way in _WAYS}
    assert set(calls.bytes) <= known, calls.bytes
    gradients = [p.grad for p in optimizers.dense_parameters if p.grad is not None]
    return {
        "parameters": sum(map(_bytes, model)),
        "optimizer": sum(map(_bytes, held)),
        "gradients": sum(map(_bytes, gradients)),
        "activations": saved / STEPS,
        "exchanges": exchanges,
    }


_WAYS = ("sent", "received")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
