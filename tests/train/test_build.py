"""Models on a device."""

from pathlib import Path

import torch
from torch import nn

from recsys_compress.compress.policy import resolve
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.models import build_model
from recsys_compress.train.build import logical_tables, lowered, place
from tests.train.jobs import make_job


def test_all_but_what_is_not_made_yet_goes_to_the_device(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    """On a device that holds nothing, as no other is here."""
    job = make_job(synthetic_dataset, tmp_path, "full")
    schema = synthetic_dataset.schema
    policy = resolve(job.embedding, logical_tables(schema, job.embedding.dim))
    embeddings = lowered(job, schema, policy, torch.device("cpu"))
    model: nn.Module = build_model(job.model, embeddings, len(schema.dense))
    before = {name: p.device.type for name, p in model.named_parameters()}
    assert set(before.values()) == {"cpu", "meta"}
    place(model, torch.device("cpu"))
    assert {name: p.device.type for name, p in model.named_parameters()} == before
    place(model, torch.device("meta"))
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
