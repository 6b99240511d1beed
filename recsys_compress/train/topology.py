"""Which process holds which part of which fused table: plans of ours, or of TorchRec's planner."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from fbgemm_gpu.tbe.config.embedding_config import BoundsCheckMode
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Topology
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ModuleShardingPlan,
    ParameterSharding,
    ShardingType,
)

from recsys_compress.byte_sizes import parse_bytes
from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.lowering import FP32_BYTES, FUSED_DIM_MULTIPLE
from recsys_compress.compress.merge import MergedTable
from recsys_compress.config import ShardingConfig
from recsys_compress.errors import UserError
from recsys_compress.ranks import Ranks
from recsys_compress.train.memory import memory_bytes

GPUS_PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class TableShard:
    """A part of a table, and who holds it.

    Attributes:
        table: name of the merged table.
        kind: how the table is divided; "replicated" where each process has all of it.
        rank: the process; -1 for all.
        rows: of the part.
        columns: of the part.
        parameter_bytes: of its weights.
        optimizer_bytes: of its optimizer's state.
    """

    table: str
    kind: str
    rank: int
    rows: int
    columns: int
    parameter_bytes: int
    optimizer_bytes: int


def table_shards(
    embeddings: CompressedEmbeddingBagCollection, plan: Mapping[str, ParameterSharding]
) -> list[TableShard]:
    """Returns the parts of all tables, those of each table by rank.

    Args:
        embeddings: the tables.
        plan: of the fused ones.
    """
    found = []
    for table in embeddings.merged_tables():
        places = [(-1, (table.num_embeddings, table.stored_dim))]
        kind = "replicated"
        if table.options.fused:
            sharding = plan[table.name]
            kind = sharding.sharding_type
            spec = cast("EnumerableShardingSpec", sharding.sharding_spec)
            places = [(_rank(shard), tuple(shard.shard_sizes)) for shard in spec.shards]  # type: ignore[misc]
        found += [
            TableShard(
                table=table.name,
                kind=kind,
                rank=rank,
                rows=rows,
                columns=columns,
                parameter_bytes=rows * columns * FP32_BYTES,
                optimizer_bytes=table.options.state_bytes(rows, columns),
            )
            for rank, (rows, columns) in places
        ]
    return found


class AnySharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on CPU does not offer rows by itself though its kernels can."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns the ways to divide a table."""
        return [*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]


def sharder_for(device: torch.device) -> "ModuleSharder[nn.Module]":
    """Returns what makes sharded collections on a device."""
    kind = AnySharder if device.type == "cpu" else EmbeddingBagCollectionSharder
    # Our id transform has checked already; the kernel's check would only warn.
    sharder = kind(fused_params={"bounds_check_mode": BoundsCheckMode.NONE})
    return cast("ModuleSharder[nn.Module]", sharder)


def plan_tables(
    embeddings: CompressedEmbeddingBagCollection,
    device: torch.device,
    config: ShardingConfig,
    ranks: Ranks,
    batch_size: int,
) -> ModuleShardingPlan:
    """Returns the plan of a collection's fused tables, the same in all processes.

    Args:
        embeddings: its fused tables may be on the meta device.
        device: that they train on.
        config: how they are divided.
        ranks: the processes.
        batch_size: examples a step of one process.

    Raises:
        UserError: they cannot be divided so, or do not fit.
    """
    with ranks.together():
        plan = None
        if ranks.first:
            plan = plan_for(
                embeddings, device, config, world_size=ranks.size, batch_size=batch_size
            )
    return cast("ModuleShardingPlan", ranks.agree(plan))


def plan_for(
    embeddings: CompressedEmbeddingBagCollection,
    device: torch.device,
    config: ShardingConfig,
    *,
    world_size: int,
    batch_size: int,
) -> EmbeddingModuleShardingPlan:
    """Returns the plan for a number of processes; they need not be there.

    Args:
        embeddings: the tables.
        device: as for `plan_tables`.
        config: as for `plan_tables`.
        world_size: number of processes.
        batch_size: examples a step of one process.

    Raises:
        UserError: as for `plan_tables`.
    """
    if embeddings.fused is None:
        return EmbeddingModuleShardingPlan()
    tables = [table for table in embeddings.merged_tables() if table.options.fused]
    local_size = _local_size(config, device, world_size)
    if world_size > 1 and config.kind == "auto":
        return _planned(embeddings, tables, device, config, world_size, local_size, batch_size)
    makers: dict[str, ParameterShardingGenerator] = {}
    for number, table in enumerate(sorted(tables, key=_bytes, reverse=True)):
        makers[table.name] = table_wise(rank=number % world_size)
        if world_size == 1:
            continue
        if config.kind == "row_wise" and _has_rows_for(table, world_size):
            makers[table.name] = row_wise()
        elif config.kind == "column_wise":
            _check_columns(table, world_size)
            makers[table.name] = column_wise(ranks=list(range(world_size)))
    return construct_module_sharding_plan(
        cast("nn.Module", embeddings.fused),
        makers,
        sharder=sharder_for(device),
        world_size=world_size,
        local_size=local_size,
        device_type=device.type,
    )


def _planned(
    embeddings: CompressedEmbeddingBagCollection,
    tables: list[MergedTable],
    device: torch.device,
    config: ShardingConfig,
    world_size: int,
    local_size: int,
    batch_size: int,
) -> EmbeddingModuleShardingPlan:
    """Returns the plan that TorchRec's planner finds best.

    Dense tables are replicated by us, and so `data_parallel`, whose tables no fused optimizer
    trains, is never its choice.
    """

    def kinds(table: MergedTable) -> list[str]:
        found = [ShardingType.TABLE_WISE.value]
        if _has_rows_for(table, world_size):
            found.append(ShardingType.ROW_WISE.value)
        if table.options.optimizer != "rowwise_adagrad":
            found.append(ShardingType.COLUMN_WISE.value)
        return found

    constraints = {
        table.name: ParameterConstraints(
            sharding_types=kinds(table),
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        )
        for table in tables
    }
    planner = EmbeddingShardingPlanner(
        topology=topology(config, device, world_size, local_size),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    module = nn.Module()
    module.fused = cast("nn.Module", embeddings.fused)
    try:
        plan = planner.plan(module, [sharder_for(device)])
    except PlannerError as error:
        raise UserError(
            f"sharding: the tables do not fit {world_size} processes ({str(error).splitlines()[0]})"
            "; compress more, or give more processes or memory"
        ) from error
    return cast("EmbeddingModuleShardingPlan", plan.plan["fused"])


def _has_rows_for(table: MergedTable, world_size: int) -> bool:
    """Whether each process gets a row where rows are divided; FBGEMM's kernels need one.

    TorchRec gives ceil(R / W) rows to each as long as there are some.
    """
    return -(-table.num_embeddings // world_size) * (world_size - 1) < table.num_embeddings


def topology(
    config: ShardingConfig, device: torch.device, world_size: int, local_size: int
) -> Topology:
    """Returns the cluster that a job describes."""
    host = _size(config.host_memory or memory_bytes())
    return Topology(
        world_size=world_size,
        compute_device=device.type,
        hbm_cap=_size(config.device_memory) if device.type == "cuda" else 0,
        ddr_cap=host // local_size,
        local_world_size=local_size,
        # TorchRec counts in bytes per millisecond.
        intra_host_bw=_size(config.intra_host_bandwidth) / 1000,
        inter_host_bw=_size(config.inter_host_bandwidth) / 1000,
    )


def rank_memory(config: ShardingConfig, device: torch.device, world_size: int) -> int:
    """Returns the bytes that a process has for its tables: of its GPU, or its part of the host."""
    storage = (
        topology(config, device, world_size, _local_size(config, device, world_size))
        .devices[0]
        .storage
    )
    return int(storage.hbm if device.type == "cuda" else storage.ddr)


def _local_size(config: ShardingConfig, device: torch.device, world_size: int) -> int:
    """Returns the processes of a host: as the job says, as they were started, or as is usual."""
    usual = GPUS_PER_HOST if device.type == "cuda" else world_size
    # Without a world, the variable is only what TorchRec is given to keep it from warning.
    started = os.environ if "WORLD_SIZE" in os.environ else {}
    local_size = config.ranks_per_host or int(started.get("LOCAL_WORLD_SIZE", usual))
    return min(local_size, world_size)


def _rank(shard: ShardMetadata) -> int:
    return int(shard.placement.rank())  # type: ignore[union-attr,arg-type]


def _size(given: str | int) -> int:
    return parse_bytes(given) if isinstance(given, str) else given


def _bytes(table: MergedTable) -> int:
    return table.size().parameter_bytes + table.size().optimizer_bytes


def _check_columns(table: MergedTable, world_size: int) -> None:
    where = f"sharding.kind = 'column_wise': table {table.name!r} (of {', '.join(table.members)})"
    if table.options.optimizer == "rowwise_adagrad":
        raise UserError(
            f"{where} trains with 'rowwise_adagrad', which would keep one sum for each part of a "
            "row and so be another optimizer; use optimizer 'adagrad' or 'sgd', or 'row_wise'"
        )
    if table.stored_dim % (world_size * FUSED_DIM_MULTIPLE):
        raise UserError(
            f"{where} is {table.stored_dim} wide, which {world_size} processes cannot share in "
            f"multiples of {FUSED_DIM_MULTIPLE}; use 'row_wise' or 'table_wise'"
        )
