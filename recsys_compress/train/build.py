"""From a job to a model with sharded tables and its optimizers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy
from recsys_compress.compress.bags import LogicalTable
from recsys_compress.compress.collection import Placement
from recsys_compress.compress.hook import LiveTable
from recsys_compress.compress.policy import resolve
from recsys_compress.compress.size import SizeReport
from recsys_compress.compress.tensors import below
from recsys_compress.config import Job
from recsys_compress.data.schema import Schema
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.ranks import Ranks
from recsys_compress.train.optim import Optimizers
from recsys_compress.train.shard import full_tensors, parts, row_bounds, shard
from recsys_compress.train.topology import TableShard, table_shards

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

    def state(self) -> dict[str, Any]:
        """Returns the model's state dict, as it is divided among the processes; live."""
        return dict(self.model.state_dict())

    def weights(self) -> dict[str, Tensor]:
        """Returns the state dict with tables whole; see `full_tensors`."""
        return full_tensors(self.state())

    def table_weights(self) -> dict[str, Tensor]:
        """Returns the part of `weights` that is the embeddings', by names within them."""
        return full_tensors(below(EMBEDDINGS, self.state()))

    def dense_weights(self) -> dict[str, Tensor]:
        """Returns the rest of `weights`, by names within the model."""
        state = self.state().items()
        return full_tensors({n: w for n, w in state if not n.startswith(EMBEDDINGS)})

    def count_bytes(self, size: SizeReport) -> dict[str, float]:
        """Returns the bytes of the model with tables of a size."""
        dense = sum(weight.nbytes for weight in self.dense_weights().values())
        return {
            "tables": size.table_bytes,
            "full": size.full_bytes,
            "ratio": size.ratio,
            "optimizer": size.optimizer_bytes,
            "model": dense + size.table_bytes,
        }

    def shards(self) -> list[TableShard]:
        """Returns how the tables are divided among the processes; nothing where one has all."""
        if Ranks.current().size == 1:
            return []
        plans = self.model.plan.plan.values()
        plan = {n: p for part in plans for n, p in part.items()}  # type: ignore[attr-defined]
        return table_shards(self.embeddings, plan)

    def live(self, place: Placement) -> LiveTable:
        """Returns the live tensors of a physical table."""
        name = f"{EMBEDDINGS}{place.parameter}"
        weight = self.state()[name]
        bounds = row_bounds(weight)
        state = self.optimizers.state_of(name)
        rows = weight.size()[0]
        return LiveTable(
            weight=_rows(weight, place.rows),
            state={n: _rows(s, place.rows) for n, s in state.items() if _length(s) == rows},
            bounds=bounds and [_inside(place.rows, *bound) for bound in bounds],
        )


def _length(value: Any) -> int:
    return int(value.size()[0]) if value.size() else 0


def _inside(rows: slice, first: int, last: int) -> tuple[int, int]:
    """Returns which of `rows` lie in [first, last), counted from the first of `rows`."""
    begin = min(max(first, rows.start), rows.stop)
    return begin - rows.start, max(min(last, rows.stop), begin) - rows.start


def _rows(value: Any, rows: slice) -> Tensor:
    """Returns those of a tensor's rows that are here."""
    for part in parts(value):
        held = part.place[0]
        begin, end = _inside(slice(held.start, held.stop), rows.start, rows.stop)
        return part.tensor[begin:end]
    return torch.empty(0, *value.size()[1:], dtype=value.dtype)


def build(job: Job, schema: Schema, policy: Policy | None = None) -> Built:
    """Builds a job's model; call it inside a process group.

    Args:
        job: the job.
        schema: of its data.
        policy: how tables are stored; None for what the job says.

    Raises:
        UserError: the job does not suit the data or the machine.
    """
    if job.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': there is no CUDA device; use 'cpu'")
    # With an index: each process has a device of its own.
    device = torch.device("cpu")
    if job.train.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(job.train.seed)
    tables = logical_tables(schema, job.embedding.dim)
    policy = policy or resolve(job.embedding, tables)
    embeddings = lowered(job, schema, policy, device)
    dense_part: nn.Module = build_model(job.model, embeddings, len(schema.dense))
    place(dense_part, device)
    model = shard(
        dense_part,
        embeddings,
        device,
        job.sharding,
        seed=job.train.seed,
        batch_size=-(-job.train.batch_size // Ranks.current().size),
    )
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


def place(model: nn.Module, device: torch.device) -> None:
    """Moves a model's tensors to a device, but for those that are on the meta device: not made yet.

    The first values are drawn on the CPU, and so the same on any device.
    """
    moved = cast(Callable[..., nn.Module], model._apply)  # torch leaves it untyped
    moved(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


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
        LogicalTable(
            name=field.name,
            feature_names=[field.name],
            num_embeddings=field.num_embeddings,
            embedding_dim=dim,
            pooling=PoolingType.MEAN if field.pooling == "mean" else PoolingType.SUM,
            single_valued=not field.multi_valued,
        )
        for field in schema.categorical
    ]
