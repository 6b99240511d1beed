"""The demonstration: full tables against Unified Embedding on generated data."""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.config import (
    DataConfig,
    EmbeddingConfig,
    Job,
    TrackingConfig,
    TrainConfig,
)
from recsys_compress.data.dataset import MANIFEST, PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.source import Source
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError
from recsys_compress.track.plots import QualityPoint, quality_vs_bytes
from recsys_compress.track.progress import ProgressListener
from recsys_compress.track.run import tracked_train
from recsys_compress.track.tables import make_table, print_table
from recsys_compress.train.events import RunResult

BUDGETS = ("0.2x", "0.1x", "0.03x", "0.01x")

_JOB = Job(
    data=DataConfig(path=""),
    embedding=EmbeddingConfig(learning_rate=0.1, epsilon=1e-3),
    train=TrainConfig(epochs=2, evals_per_epoch=2, schedule="linear"),
    tracking=TrackingConfig(experiment="recsys-compress-demo"),
)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demonstration found.

    Attributes:
        best_auc: test AUC of a model that knows the true odds.
        runs: full tables, then Unified Embedding by falling budget.
        plot: PNG of quality against bytes.
    """

    best_auc: float
    runs: tuple[RunResult, ...]
    plot: Path

    def to_json(self) -> dict[str, Any]:
        """Returns the whole as plain data."""
        runs = [
            {"method": method, **result.to_json()}
            for method, result in zip(_methods(self.runs), self.runs, strict=True)
        ]
        return {"best_auc": self.best_auc, "runs": runs, "plot": str(self.plot)}


def demo(out: Path, *, source: Source | None = None, budgets: Sequence[str] = BUDGETS) -> Demo:
    """Trains DCN-V2 with full tables and with Unified Embedding at several budgets.

    Args:
        out: folder for data, runs and plot; data that lies there already is used again.
        source: generator of the data, by default the embedded one.
        budgets: shares of the full tables' bytes.

    Raises:
        UserError: `out` cannot be written, or holds something else.
        KeyboardInterrupt: the user stopped a run.
    """
    dataset = _dataset(source or Synthetic(), out / "data")
    runs = tuple(_train(dataset, out, budget) for budget in (None, *budgets))
    best_auc = dataset.best.auc if dataset.best else math.nan
    full, *unified = (
        QualityPoint(method=method, bytes=run.bytes["tables"], auc=run.test["auc"])
        for method, run in zip(_methods(runs), runs, strict=True)
    )
    plot = quality_vs_bytes(unified, out / "quality_vs_bytes.png", full=full, best_auc=best_auc)
    return Demo(best_auc=best_auc, runs=runs, plot=plot)


def print_demo(found: Demo) -> None:
    """Prints a table of the runs, the best possible AUC and the path of the plot."""
    rows = [
        [
            method,
            format_bytes(run.bytes["tables"]),
            f"{run.bytes['ratio']:.1f}x",
            f"{run.test['auc']:.4f}",
            f"{run.test['logloss']:.4f}",
            f"{run.samples_per_s:,.0f}",
        ]
        for method, run in zip(_methods(found.runs), found.runs, strict=True)
    ]
    print_table(make_table(["method", "bytes", "ratio", "AUC", "logloss", "samples/s"], rows))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"best possible AUC on this data: {found.best_auc:.4f}")
    console.print(f"plot: {found.plot}")


def _methods(runs: Sequence[RunResult]) -> list[str]:
    return ["full", *["unified"] * (len(runs) - 1)]


def _train(dataset: PreparedDataset, out: Path, budget: str | None) -> RunResult:
    job = dataclasses.replace(
        _JOB,
        data=DataConfig(path=str(dataset.path)),
        embedding=dataclasses.replace(
            _JOB.embedding, method="unified" if budget else "full", budget=budget
        ),
        train=dataclasses.replace(_JOB.train, output=str(out / "runs")),
    )
    result = tracked_train(job, listeners=[ProgressListener()])
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _dataset(source: Source, path: Path) -> PreparedDataset:
    """Returns the data that lies at `path`, or prepares it where it is missing or different."""
    if (path / MANIFEST).exists():
        found = PreparedDataset.open(path)
        found.verify()
        if found.manifest.source != source.name:
            raise UserError(f"{path}: holds other data ({found.manifest.source}); name a new --out")
        if _holds(found, source):
            return found
        shutil.rmtree(path)
    return prepare(source, path, progress=True)


def _holds(dataset: PreparedDataset, source: Source) -> bool:
    """Returns whether the dataset was prepared from this source with these options."""
    expected = json.loads(json.dumps(dataclasses.asdict(source), default=str))
    manifest = dataset.manifest
    return manifest.source == source.name and expected.items() <= manifest.options.items()
