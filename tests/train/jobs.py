"""Small jobs on generated data, and a listener that remembers; for the tests of training."""

import os
import signal
from pathlib import Path

import torch

from recsys_compress.config import (
    DataConfig,
    DCNv2Config,
    EmbeddingConfig,
    Job,
    ModelConfig,
    TrainConfig,
)
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.checkpoint import load_newest
from recsys_compress.train.events import Metrics, RunResult, RunStart

EMBEDDINGS = {
    "full": EmbeddingConfig(dim=8, learning_rate=0.1),
    "adagrad": EmbeddingConfig(dim=6, learning_rate=0.1, optimizer="adagrad"),
    "sgd": EmbeddingConfig(dim=8, learning_rate=5.0, optimizer="sgd"),
    "unified": EmbeddingConfig(dim=8, method="unified", budget="0.2x", learning_rate=0.1),
    "unified-adam": EmbeddingConfig(
        dim=6,
        method="unified",
        budget="0.2x",
        optimizer="adam",
        learning_rate=0.01,
        l2=1e-4,
        methods={"unified": {"num_probes": 3}},
    ),
    "hash": EmbeddingConfig(dim=8, method="hash", budget="0.2x", learning_rate=0.1),
    "double_hash": EmbeddingConfig(dim=8, method="double_hash", budget="0.2x", learning_rate=0.1),
    "dnis": EmbeddingConfig(  # from scratch; its phases are tested on their own
        dim=8,
        method="dnis",
        budget="0.6x",
        learning_rate=0.1,
        methods={"dnis": {"search_epochs": 0}},
    ),
    "quotient_remainder": EmbeddingConfig(
        dim=8, method="quotient_remainder", budget="0.2x", learning_rate=0.1
    ),
    "mixed_dim": EmbeddingConfig(
        dim=8,
        method="mixed_dim",
        learning_rate=0.1,
        methods={"mixed_dim": {"alpha": 0.0, "base_dim": 4}},
    ),
    "low_rank-adam": EmbeddingConfig(
        dim=6, method="low_rank", budget="0.4x", optimizer="adam", learning_rate=0.01
    ),
    "group_reduce": EmbeddingConfig(dim=8, method="group_reduce", budget="0.5x", learning_rate=0.1),
    "dynamic_sparse": EmbeddingConfig(
        dim=8,
        method="dynamic_sparse",
        budget="0.5x",
        learning_rate=0.1,
        methods={"dynamic_sparse": {"update_steps": 7, "window": 3}},
    ),
    "dynamic_sparse-adam": EmbeddingConfig(
        dim=6,
        method="dynamic_sparse",
        budget="0.5x",
        optimizer="adam",
        learning_rate=0.01,
        methods={"dynamic_sparse": {"block": 2, "update_steps": 7, "window": 3}},
    ),
}


class Recorder:
    """Remembers what a run told, and may act on it."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.start: RunStart | None = None
        self.values: dict[str, list[float]] = {}
        self.result: RunResult | None = None
        self.error: BaseException | None = None

    def started(self, run: RunStart) -> None:
        self.start = run

    def metrics(self, step: int, values: Metrics) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        if self.stop_at is not None and step >= self.stop_at:
            self.stop_at = None  # a second signal would not wait for the checkpoint
            os.kill(os.getpid(), signal.SIGINT)

    def finished(self, result: RunResult) -> None:
        self.result = result

    def failed(self, error: BaseException) -> None:
        self.error = error


def make_job(
    dataset: PreparedDataset, folder: Path, embedding: str = "unified", **settings: object
) -> Job:
    return Job(
        data=DataConfig(path=str(dataset.path), buffer_rows=4000),
        model=ModelConfig(dcnv2=DCNv2Config(cross_layers=1, hidden=(16,), dropout=0.1)),
        embedding=EMBEDDINGS[embedding],
        train=TrainConfig(
            **{
                "epochs": 2,
                "batch_size": 500,
                "learning_rate": 0.01,
                "output": str(folder),
                **settings,
            }
        ),
    )


def assert_same_end(resumed: RunResult, whole: RunResult) -> None:
    """Checks that a resumed run has the figures and, to the bit, the tensors of a whole one."""
    assert resumed.test == whole.test
    assert [h["auc"] for h in resumed.history] == [h["auc"] for h in whole.history]
    expected = load_newest(whole.folder / "checkpoints").read()
    found = load_newest(resumed.folder / "checkpoints").read()
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
