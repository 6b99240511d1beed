"""Training of DCN-V2: speed, memory, and what is kept of the model."""

import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.case import Case, Figures
from benchmarks.clock import time_steps
from benchmarks.peers.contestant import Sizes, load, open_contestant, random_batches, size
from recsys_compress.train.memory import peak_rss_bytes

_SPARE = 1 << 30  # bytes of the machine's memory that a case leaves alone


def measure(case: Case) -> Figures:
    """Returns figures of training on one thread, batches being in memory already.

    "cpu" and "wall": samples/s. "rss": peak resident bytes, of which "before" are the libraries'.
    "optimizer": CPU milliseconds of a step in optimizers outside the backward pass; "step": of
    all. "artifact": bytes of what is saved.
    """
    torch.set_num_threads(1)
    shape = case.shape
    load(case.name)
    before = peak_rss_bytes()
    batches = random_batches(shape)
    with (
        _within_memory(),
        open_contestant(case.name, Sizes.of(shape)) as own,
        tempfile.TemporaryDirectory() as out,
    ):
        spent = _watch(own.optimizers)
        cpu, wall = time_steps(lambda number: own.step(batches[number % len(batches)]), shape)
        rss = peak_rss_bytes()
        own.save(Path(out) / "model")
        artifact = size(Path(out) / "model")
    # A step's optimizers come one after the other.
    count = len(spent) // (shape.warmup + shape.steps)
    steps = [sum(spent[i : i + count]) for i in range(shape.warmup * count, len(spent), count)]
    return {
        "cpu": shape.batch / cpu * 1e3,
        "wall": shape.batch / wall * 1e3,
        "rss": rss,
        "before": before,
        "artifact": artifact,
        "step": cpu,
        "optimizer": statistics.median(steps),
    }


def _watch(optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """Returns a list that grows by the CPU milliseconds of each optimizer's steps."""
    spent: list[float] = []
    starts: list[float] = []

    def before(*_: object) -> None:
        starts.append(time.process_time())

    def after(*_: object) -> None:
        spent.append((time.process_time() - starts.pop()) * 1e3)

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
    return spent


def available_bytes() -> int:
    """Returns the memory that the machine can give away now."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]) * 1024


@contextmanager
def _within_memory() -> Iterator[None]:
    """Makes this process fail rather than the machine run out of memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + available_bytes() - _SPARE
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
