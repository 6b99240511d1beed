"""The same tables in three hands: stock TorchRec, plain torch, and ours."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.case import Shape
from benchmarks.ids import random_ids
from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Method,
    Policy,
    Rule,
    TableOptions,
    method_class,
)
from recsys_compress.compress.bags import LogicalTable
from recsys_compress.compress.lowering import FP32_BYTES
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.methods.mixed_dim import MixedDim
from recsys_compress.train.shard import process_group, shard

OPTIONS = TableOptions(learning_rate=0.02)
SHARE = 0.1  # of the full tables' bytes, for methods that compress
# Rows of 4 values are the narrowest that the fused kernel has, a quarter of width 16.
NARROW: dict[str, Method] = {
    "low_rank": LowRank(rank=4),
    "mixed_dim": MixedDim(alpha=0.0, base_dim=4),
}
CPU = torch.device("cpu")


def names(shape: Shape) -> list[str]:
    """Returns the features, which are also the tables."""
    return [f"feature_{index}" for index in range(shape.features)]


def configs(shape: Shape) -> list[EmbeddingBagConfig]:
    """Returns the logical tables."""
    return [
        LogicalTable(
            name=name,
            feature_names=[name],
            num_embeddings=shape.rows_per_table,
            embedding_dim=shape.dim,
            single_valued=True,
        )
        for name in names(shape)
    ]


class Holder(nn.Module):
    """A model that is nothing but its embeddings."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.scale = nn.Parameter(torch.ones(()))  # an optimizer wants a parameter

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Returns the (B, F x D) vectors."""
        values: Tensor = self.embeddings(features).values()
        return values


@contextlib.contextmanager
def quiet_process_group() -> Iterator[None]:
    """Holds a world of one, without the warnings of libraries."""
    with warnings.catch_warnings(), process_group():
        warnings.simplefilter("ignore")
        yield


def stock(shape: Shape) -> EmbeddingBagCollection:
    """Returns TorchRec's own collection, a table for each feature."""
    return EmbeddingBagCollection(tables=configs(shape), device=torch.device("meta"))


def shard_stock(model: nn.Module, embeddings: EmbeddingBagCollection) -> DistributedModelParallel:
    """Shards `model.embeddings` table-wise with fused row-wise Adagrad, all else at its default."""
    settings = {"lr": OPTIONS.learning_rate, "eps": OPTIONS.epsilon}
    _apply_optimizer_in_backward(RowWiseAdagrad, embeddings.parameters(), settings)
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        embeddings,
        {table.name: table_wise(rank=0) for table in embeddings.embedding_bag_configs()},
        sharder=sharder,
        world_size=1,
        local_size=1,
        device_type="cpu",
    )
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=CPU,
        plan=ShardingPlan(plan={"embeddings": plan}),
        sharders=[sharder],
        init_data_parallel=False,
    )


def policy(shape: Shape, name: str) -> Policy:
    """Returns the policy that gives every table the method `name`, at `SHARE` of the bytes.

    "full" keeps all bytes, methods of narrow rows take the narrowest there are (`NARROW`), and
    "dnis search" is the phase of `dnis` that searches.
    """
    base = name.split()[0]
    method = NARROW.get(base) or method_class(base)()
    unfitted = Policy(default=Rule(method=method, options=OPTIONS), min_rows=0)
    if base in NARROW:
        return unfitted
    share = 1.0 if name == "full" else SHARE
    fitted = unfitted.fit(configs(shape), int(shape.rows * shape.dim * FP32_BYTES * share))
    phases = {phase.name: phase.policy for phase in fitted.phases()}
    return phases["search"] if name.endswith("search") else fitted


def ours(shape: Shape, name: str) -> CompressedEmbeddingBagCollection:
    """Returns our collection under `policy`."""
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(
        tables=configs(shape), policy=policy(shape, name), fused_device=torch.device("meta")
    )


def build(
    shape: Shape, name: str, wrap: Callable[[Any], nn.Module] = Holder
) -> DistributedModelParallel:
    """Returns `wrap(embeddings)`, sharded.

    Args:
        shape: the workload.
        name: "stock", or a method of ours.
        wrap: makes a model that keeps the embeddings as its `embeddings`.
    """
    if name == "stock":
        collection = stock(shape)
        return shard_stock(wrap(collection), collection)
    embeddings = ours(shape, name)
    return shard(wrap(embeddings), embeddings, CPU)


class Batches:
    """Batches of random ids, made beforehand, one id in each bag.

    Args:
        shape: the workload.
        zipf: exponent of the ids' frequencies; 0 for uniform.
        count: distinct batches.
        seed: of the ids.
    """

    def __init__(self, shape: Shape, *, zipf: float, count: int = 8, seed: int = 0) -> None:
        self._ids = random_ids(shape, zipf=zipf, count=count, seed=seed)
        self._names = names(shape)
        self._shape = shape
        self._lengths = torch.ones(shape.features * shape.batch, dtype=torch.int64)

    def flat(self, number: int) -> Tensor:
        """Returns (F x B,) ids, features outermost."""
        return self._ids[number % len(self._ids)]

    def keyed(self, number: int) -> KeyedJaggedTensor:
        """Returns the same ids as a `KeyedJaggedTensor`."""
        return KeyedJaggedTensor(
            keys=self._names,
            values=self.flat(number),
            lengths=self._lengths,
            stride=self._shape.batch,
            length_per_key=[self._shape.batch] * self._shape.features,
        )
