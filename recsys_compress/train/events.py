"""What a training run tells whoever listens: progress on a terminal, MLflow, tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recsys_compress.config import Job

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """A run that is about to take its first step.

    Attributes:
        job: the resolved job.
        folder: the run's own folder.
        run_id: 32 hexadecimal digits; the same after a resume.
        name: readable name, like "dcnv2-unified-10x-s0".
        total_steps: most training steps over all phases.
        first_step: steps already done by an earlier, interrupted process.
        bytes: see `RunResult.bytes`.
        size: the size report as plain data.
        shards: which process holds which part of which table, as plain data; nothing in one
            process alone.
        tags: library versions, dataset checksum, git commit.
    """

    job: Job
    folder: Path
    run_id: str
    name: str
    total_steps: int
    first_step: int
    bytes: dict[str, float]
    size: dict[str, Any]
    shards: list[dict[str, Any]]
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run; `to_json` is what `recsys-compress train --json` prints.

    Attributes:
        run_id: as in `RunStart`.
        folder: the run's own folder.
        valid: "auc", "logloss", "ne", "calibration", "ece" of the chosen checkpoint.
        test: the same on the test split, read once, after the choice.
        bytes: "tables" (all embedding parameters and auxiliary tensors), "full" (the uncompressed
            logical tables), "ratio" (full / tables), "optimizer" (table optimizer state), "model"
            (all parameters and buffers, tables included).
        samples_per_s: training examples per second, evaluation left out.
        peak_rss_bytes: peak resident memory of the process.
        seconds: wall-clock seconds from start to end, pauses of a run that was resumed left out.
        cpu_seconds: of all threads of its processes, which other work on the machine hardly
            changes.
        steps: training steps taken.
        best_step: step whose weights were kept.
        interrupted: whether the user stopped the run early.
        history: one entry per evaluation: "step", "epoch", "train_loss" and the validation figures.
        calibration: reliability curve on the test split: equal-mass bins with "predicted",
            "observed", "rows".
        kept: what methods that choose by part keep of each table; see `Method.kept_parts`.
        dataset: checksum of the data.
    """

    run_id: str
    folder: Path
    valid: Metrics
    test: Metrics
    bytes: dict[str, float]
    samples_per_s: float
    peak_rss_bytes: int
    seconds: float
    cpu_seconds: float
    steps: int
    best_step: int
    interrupted: bool = False
    history: list[Metrics] = field(default_factory=list)
    calibration: list[Metrics] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    dataset: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return {**self.__dict__, "folder": str(self.folder)}


class Listener(Protocol):
    """Hears of a run's course; rank 0 only. Metric names are those MLflow shows."""

    def started(self, run: RunStart) -> None:
        """The run begins (or goes on, after a resume)."""

    def metrics(self, step: int, values: Metrics) -> None:
        """Figures at a step: `train/loss`, `eval/auc`, `perf/samples_per_s`, ..."""

    def finished(self, result: RunResult) -> None:
        """The run ended well, or was interrupted by the user with a usable checkpoint."""

    def failed(self, error: BaseException) -> None:
        """The run ended with an error."""
