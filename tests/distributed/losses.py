"""What each process of a sharded training does: many small jobs, one after the other."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from recsys_compress.config import ShardingConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.ranks import Ranks
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import Trainer
from tests.train.jobs import make_job


def main(dataset: str, folder: str, cases: list[list[Any]], steps: int) -> dict[str, Any]:
    """Returns for each case the losses of its first steps, and what was sharded how."""
    found = {}
    with process_group() as ranks:
        for label, name, kind, settings in cases:
            found[label] = _train(
                PreparedDataset.open(Path(dataset)),
                Path(folder),
                name,
                kind,
                settings,
                steps,
                ranks,
            )
    return found


def _train(
    dataset: PreparedDataset,
    folder: Path,
    name: str,
    kind: str,
    settings: dict[str, Any],
    steps: int,
    ranks: Ranks,
) -> dict[str, Any]:
    model_name = settings.pop("model", "dcnv2")
    job = make_job(dataset, folder, name, **settings)
    # Each process draws its own dropout.
    dcnv2 = dataclasses.replace(job.model.dcnv2, dropout=0.0)
    model = dataclasses.replace(job.model, name=model_name, dcnv2=dcnv2)
    job = dataclasses.replace(
        job,
        model=model,
        data=dataclasses.replace(job.data, streams=2),
        sharding=ShardingConfig(kind=kind),  # type: ignore[arg-type]
    )
    trainer = Trainer(job, ranks, [], None)
    losses: list[float] = []
    for number, batch in enumerate(trainer.reader):
        if number == steps:
            break
        done = number / steps
        loss, *_ = trainer.learner.step(batch, done, done + 1 / steps)
        losses.append(float(loss))
    modules = trainer.built.model.modules()
    sharded = [m for m in modules if isinstance(m, ShardedEmbeddingBagCollection)]
    plan = trainer.built.model.plan.plan
    kinds = sorted({p.sharding_type for part in plan.values() for p in part.values()})  # type: ignore[attr-defined]
    valid = trainer.evaluate("valid").compute()
    weights = trainer.built.weights()
    norm = float(
        torch.stack(
            [w.double().square().sum() for w in weights.values() if w.is_floating_point()]
        ).sum()
    )
    return {
        "losses": losses,
        "sharded": len(sharded),
        "kinds": kinds,
        "auc": valid["auc"],
        "norm": norm,
    }
