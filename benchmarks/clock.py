"""Timing of steps."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.case import Figures, Shape


class Stages:
    """CPU milliseconds of the named stages of a step, by step."""

    def __init__(self) -> None:
        self._spent: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; it may come several times a step, in other steps too."""
        start = time.process_time()
        yield
        self.add(name, (time.process_time() - start) * 1e3)

    def add(self, name: str, milliseconds: float) -> None:
        """Books time to a stage."""
        self._spent.setdefault(name, []).append(milliseconds)

    def medians(self, skip: int) -> Figures:
        """Returns the median by stage, without the first `skip` times."""
        return {name: statistics.median(spent[skip:]) for name, spent in self._spent.items()}


def time_steps(step: Callable[[int], None], shape: Shape) -> tuple[float, float]:
    """Returns median CPU and wall milliseconds of `step(number)`."""
    cpu, wall = [], []
    for number in range(shape.warmup + shape.steps):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        step(number)
        cpu.append((time.process_time() - cpu_start) * 1e3)
        wall.append((time.perf_counter() - wall_start) * 1e3)
    return statistics.median(cpu[shape.warmup :]), statistics.median(wall[shape.warmup :])
