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


def time_steps(
    step: Callable[[int], None], shape: Shape, *, cycle: int | None = None
) -> tuple[float, float]:
    """Returns CPU and wall milliseconds of `step(number)`.

    Args:
        step: takes a step.
        shape: how many steps count, of which the median is taken, and how many come before.
        cycle: steps after which rare work comes round; so many count instead, and their mean.
    """
    cpu, wall = [], []
    for number in range(shape.warmup + (cycle or shape.steps)):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        step(number)
        cpu.append((time.process_time() - cpu_start) * 1e3)
        wall.append((time.perf_counter() - wall_start) * 1e3)
    middle = statistics.mean if cycle else statistics.median
    return middle(cpu[shape.warmup :]), middle(wall[shape.warmup :])
