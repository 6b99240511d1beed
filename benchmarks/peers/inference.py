"""Inference of DCN-V2: many rows at once, and single requests of a few."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Figures
from benchmarks.clock import time_steps
from benchmarks.peers.contestant import Rows, Sizes, open_contestant, random_batches, size

REQUEST_ROWS = (1, 64)
REQUESTS = 200
_WARMUP = 20


def measure(case: Case) -> Figures:
    """Returns figures of a served model on one thread.

    "cpu" and "wall": samples/s of whole batches. "p50/N" and "p99/N": wall milliseconds of a
    request of N rows, "cpu/N" its median CPU time. "artifact": bytes of what was loaded, for ours.
    "look-up": CPU milliseconds of a batch in the embeddings, of the "batch" in all, for ours.
    """
    torch.set_num_threads(1)
    shape = case.shape
    batches = random_batches(shape)
    storage = case.name.partition(" ")[2] or "fp32"
    with open_contestant(case.name, Sizes.of(shape)) as own, tempfile.TemporaryDirectory() as out:
        path = Path(out) / "model"
        scores = own.served(path, storage)
        figures: Figures = {"artifact": size(path)} if path.exists() else {}
        cpu, wall = time_steps(lambda number: scores(batches[number % len(batches)]), shape)
        figures |= {"cpu": shape.batch / cpu * 1e3, "wall": shape.batch / wall * 1e3, "batch": cpu}
        figures |= _look_up(own, batches)
        for count in REQUEST_ROWS:
            figures |= _requests(scores, batches, count)
    return figures


def _requests(scores: Callable[[Rows], Any], batches: list[Rows], count: int) -> Figures:
    """Times requests of `count` rows, each of rows of its own."""
    cpu, wall = [], []
    for number in range(_WARMUP + REQUESTS):
        whole = batches[number % len(batches)]
        first = number * count % (len(whole) - count)
        rows = whole.part(first, first + count)
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        scores(rows)
        cpu.append((time.process_time() - cpu_start) * 1e3)
        wall.append((time.perf_counter() - wall_start) * 1e3)
    percentiles = statistics.quantiles(wall[_WARMUP:], n=100)
    return {
        f"p50/{count}": percentiles[49],
        f"p99/{count}": percentiles[98],
        f"cpu/{count}": statistics.median(cpu[_WARMUP:]),
    }


def _look_up(own: Any, batches: list[Rows]) -> Figures:
    """Times the embeddings alone, where the contestant serves an artifact."""
    look_up = getattr(own, "look_up", None)
    if look_up is None:
        return {}
    spent = []
    with torch.inference_mode():
        for number in range(12):
            start = time.process_time()
            look_up(batches[number % len(batches)])
            spent.append((time.process_time() - start) * 1e3)
    return {"look-up": statistics.median(spent[3:])}
