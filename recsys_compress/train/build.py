"""From a job to a model with sharded tables and its optimizers."""

from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy
from recsys_compress.compress.policy import resolve
from recsys_compress.config import Job
from recsys_compress.data.schema import Schema
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.train.optim import Optimizers
from recsys_compress.train.shard import shard


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a job trains.

    Attributes:
        policy: fitted to the budget.
        embeddings: the tables.
        model: holds `embeddings`; (dense (B, N), KeyedJaggedTensor) -> (B,) logits.
        optimizers: of every parameter.
        device: that all of it is on.
    """

    policy: Policy
    embeddings: CompressedEmbeddingBagCollection
    model: DistributedModelParallel
    optimizers: Optimizers
    device: torch.device


def build(job: Job, schema: Schema) -> Built:
    """Builds a job's model; call it inside a process group.

    Raises:
        UserError: the job does not suit the data or the machine.
    """
    device = torch.device(job.train.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': there is no CUDA device; use 'cpu'")
    torch.manual_seed(job.train.seed)
    tables = logical_tables(schema, job.embedding.dim)
    policy = resolve(job.embedding, tables)
    embeddings = CompressedEmbeddingBagCollection(
        tables=tables,
        policy=policy,
        is_weighted=any(field.weighted for field in schema.categorical),
        device=device,
        fused_device=torch.device("meta"),  # sharding makes them, once
    )
    dense_part: nn.Module = build_model(job.model, embeddings, len(schema.dense))
    model = shard(dense_part, embeddings, device)
    return Built(
        policy=policy,
        embeddings=embeddings,
        model=model,
        optimizers=Optimizers(model, embeddings, job.train),
        device=device,
    )


def logical_tables(schema: Schema, dim: int) -> list[EmbeddingBagConfig]:
    """Returns one logical table of width `dim` for each categorical field."""
    return [
        EmbeddingBagConfig(
            name=field.name,
            feature_names=[field.name],
            num_embeddings=field.num_embeddings,
            embedding_dim=dim,
            pooling=PoolingType.MEAN if field.pooling == "mean" else PoolingType.SUM,
        )
        for field in schema.categorical
    ]
