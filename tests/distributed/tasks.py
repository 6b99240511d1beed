"""Trainings, one after the other, as one of several processes."""

import dataclasses
from pathlib import Path
from typing import Any

from recsys_compress.config import load_job
from recsys_compress.ranks import Ranks
from recsys_compress.train import trainer
from recsys_compress.train.checkpoint import Saver
from recsys_compress.train.post import compress
from recsys_compress.train.shard import process_group
from tests.train.jobs import Recorder


def main(tasks: list[dict[str, Any]]) -> list[Any]:
    """Returns what came of each task: the name of a function below, as "do", and its arguments."""
    trainer.LOG_SECONDS = 0.0  # recorders hear of every step
    with process_group() as ranks:
        return [_DO[task.pop("do")](ranks, **task) for task in tasks]


def _train(
    _ranks: Ranks,
    job: str,
    settings: list[str],
    resume: str | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Trains a job, up to a step where the first process is asked to stop."""
    folder = None if resume is None else Path(resume)
    listeners = [] if stop_at is None else [Recorder(stop_at)]
    result = trainer.train(load_job(Path(job), settings), resume=folder, listeners=listeners)
    return {**dataclasses.asdict(result), "folder": str(result.folder)}


def _compress(_ranks: Ranks, run: str, method: str, settings: list[str]) -> dict[str, Any]:
    """Compresses a trained run and fine-tunes it."""
    job, start = compress(Path(run), method, "0.7x", settings)
    result = trainer.train(job, start=start)
    return {
        **dataclasses.asdict(result),
        "folder": str(result.folder),
        "ranks": dict(job.model.ranks),
        "methods": job.embedding.methods,
    }


def _rewrite(ranks: Ranks, run: str, out: str) -> int:
    """Reads a run's checkpoint and writes it again elsewhere; returns its step."""
    begun = trainer.Trainer(load_job(Path(run) / "job.toml"), ranks, [], Path(run))
    begun.saver = Saver(Path(out) / "checkpoints", ranks)
    begun._checkpoint()
    return begun.progress.step


_DO = {"train": _train, "compress": _compress, "rewrite": _rewrite}
