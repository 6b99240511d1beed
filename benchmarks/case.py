"""What is measured: cases, each of which runs in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

Figures = dict[str, float]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The workload's size.

    Attributes:
        features: categorical features F, one table each.
        rows: rows of all tables together.
        dim: width D.
        batch: examples B of a step.
        dense: dense features.
        warmup: steps before measuring.
        steps: steps measured.
        examples: rows of the prepared datasets.
    """

    features: int = 26
    rows: int = 10_000_000
    dim: int = 16
    batch: int = 8192
    dense: int = 13
    warmup: int = 3
    steps: int = 12
    examples: int = 500_000

    @property
    def rows_per_table(self) -> int:
        """Rows of one table."""
        return self.rows // self.features


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        group: module of this package whose `measure` runs it.
        name: short name, unique in the group.
        tuned: whether the process starts with the settings of `recsys_compress.runtime`.
        shape: the workload.
        data: folder of prepared data, where the case needs some.
        seed: of first values, where it matters.
    """

    group: str
    name: str
    tuned: bool
    shape: Shape
    data: str = ""
    seed: int = 0

    def dump(self) -> str:
        """Returns the case as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> "Case":
        """Returns the case that `dump` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "shape": Shape(**raw["shape"])})


def run(case: Case, *, root: Path = ROOT, python: str = sys.executable) -> Figures:
    """Measures a case in a fresh process.

    Args:
        case: the case.
        root: the checkout whose code runs.
        python: the interpreter.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    return run_worker(case, [], root=root, python=python)


def run_worker(
    case: Case, launcher: list[str], *, root: Path = ROOT, python: str = sys.executable
) -> Figures:
    """Measures a case in fresh processes that `python LAUNCHER` starts; see `run`."""
    # OpenMP that spins would measure the neighbours: no process here does.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [python, *launcher, "-m", "benchmarks.worker", case.dump()],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{case.group}/{case.name} failed:\n{done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures
