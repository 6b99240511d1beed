"""From a job to a model with sharded tables and its optimizers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy
from recsys_compress.compress.collection import Placement
from recsys_compress.compress.hook import LiveTable
from recsys_compress.compress.policy import resolve
from recsys_compress.config import Job
from recsys_compress.data.schema import Schema
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.train.optim import Optimizers
from recsys_compress.train.shard import full_tensors, shard

EMBEDDINGS = "embeddings."  # where every model keeps its tables


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a job trains.

    Attributes:
        job: the job.
        policy: fitted to the budget.
        embeddings: the tables.
        model: holds `embeddings`; (dense (B, N), KeyedJaggedTensor) -> (B,) logits.
        optimizers: of every parameter.
        device: that all of it is on.
    """

    job: Job
    policy: Policy
    embeddings: CompressedEmbeddingBagCollection
    model: DistributedModelParallel
    optimizers: Optimizers
    device: torch.device

    def weights(self) -> dict[str, Tensor]:
        """Returns the model's state dict, tables whole; the tensors are the live ones."""
        return full_tensors(self.model.state_dict())

    def table_weights(self) -> dict[str, Tensor]:
        """Returns the part of `weights` that is the embeddings', by names within them."""
        return {
            name.removeprefix(EMBEDDINGS): weight
            for name, weight in self.weights().items()
            if name.startswith(EMBEDDINGS)
        }

    def dense_weights(self) -> dict[str, Tensor]:
        """Returns the rest of `weights`, by names within the model."""
        return {n: w for n, w in self.weights().items() if not n.startswith(EMBEDDINGS)}

    def live(self, place: Placement) -> LiveTable:
        """Returns the live tensors of a physical table."""
        weight = self.table_weights()[place.parameter]
        state = self.optimizers.state_of(f"{EMBEDDINGS}{place.parameter}")
        return LiveTable(
            weight=weight[place.rows],
            state={n: s[place.rows] for n, s in state.items() if s.dim() and len(s) == len(weight)},
        )


def build(job: Job, schema: Schema, policy: Policy | None = None) -> Built:
    """Builds a job's model; call it inside a process group.

    Args:
        job: the job.
        schema: of its data.
        policy: how tables are stored; None for what the job says.

    Raises:
        UserError: the job does not suit the data or the machine.
    """
    device = torch.device(job.train.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': there is no CUDA device; use 'cpu'")
    torch.manual_seed(job.train.seed)
    tables = logical_tables(schema, job.embedding.dim)
    policy = policy or resolve(job.embedding, tables)
    embeddings = lowered(job, schema, policy, device)
    dense_part: nn.Module = build_model(job.model, embeddings, len(schema.dense))
    model = shard(dense_part, embeddings, device)
    built = Built(
        job=job,
        policy=policy,
        embeddings=embeddings,
        model=model,
        optimizers=Optimizers(model, embeddings, job.train),
        device=device,
    )
    embeddings.bind_hooks(built.live)
    return built


def lowered(
    job: Job, schema: Schema, policy: Policy, device: torch.device | None = None
) -> CompressedEmbeddingBagCollection:
    """Returns a job's tables under a policy.

    Args:
        job: the job.
        schema: of its data.
        policy: how tables are stored.
        device: of what is not sharded; None where only the bytes are of interest.
    """
    return CompressedEmbeddingBagCollection(
        tables=logical_tables(schema, job.embedding.dim),
        policy=policy,
        is_weighted=any(field.weighted for field in schema.categorical),
        device=device or torch.device("meta"),
        fused_device=torch.device("meta"),  # sharding makes them, once
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
