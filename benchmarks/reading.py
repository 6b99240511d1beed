"""Reading a prepared dataset against training on it."""

import itertools
import os
import time

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.case import Case, Figures
from benchmarks.clock import time_steps
from benchmarks.tables import quiet_process_group
from recsys_compress.config import DataConfig, Job, TrainConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.train.build import build


def measure(case: Case) -> Figures:
    """Returns rows/s of CPU time and of wall time, "cpu" and "wall" (all threads)."""
    dataset = PreparedDataset.open(case.data)
    reader = Reader(dataset, "train", batch_size=case.shape.batch, shuffle=True)
    return _reading(reader) if case.name == "reader" else _training(case, dataset, reader)


def _reading(reader: Reader) -> Figures:
    for _ in reader.epoch(0):
        pass
    cpu, wall, rows = time.process_time(), time.perf_counter(), 0
    for epoch in (1, 2):
        rows += sum(len(batch) for batch in reader.epoch(epoch))
    return {
        "cpu": rows / (time.process_time() - cpu),
        "wall": rows / (time.perf_counter() - wall),
    }


def _training(case: Case, dataset: PreparedDataset, reader: Reader) -> Figures:
    """Trains on batches that are in memory already."""
    shape = case.shape
    batches = list(itertools.islice(reader.epoch(0), 8))
    job = Job(data=DataConfig(path=case.data), train=TrainConfig(batch_size=shape.batch))
    with quiet_process_group():
        built = build(job, dataset.schema)

        def step(number: int) -> None:
            batch = batches[number % len(batches)]
            built.optimizers.zero_grad()
            logits = built.model(batch.dense, batch.sparse)
            binary_cross_entropy_with_logits(logits, batch.labels).backward()
            built.optimizers.step()

        torch.set_num_threads(1)
        cpu, _ = time_steps(step, shape)
        torch.set_num_threads(os.cpu_count() or 1)
        _, wall = time_steps(step, shape)
    return {"cpu": shape.batch / cpu * 1e3, "wall": shape.batch / wall * 1e3}
