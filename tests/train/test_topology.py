"""Plans of who holds which part of which table; no process but this one is needed."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.policy import Policy, Rule, resolve
from recsys_compress.config import EmbeddingConfig, ShardingConfig
from recsys_compress.errors import UserError
from recsys_compress.train.topology import TableShard, plan_for, rank_memory, table_shards

CPU, META = torch.device("cpu"), torch.device("meta")


def shards(
    config: EmbeddingConfig, world_size: int, device: torch.device = CPU, **sharding: object
) -> list[TableShard]:
    tables = [
        EmbeddingBagConfig(
            name=name, feature_names=[name], num_embeddings=rows, embedding_dim=config.dim
        )
        for name, rows in (("user", 100_000), ("item", 2_000_000))
    ]
    embeddings = CompressedEmbeddingBagCollection(
        tables=tables, policy=resolve(config, tables), device=META, fused_device=META
    )
    plan = plan_for(
        embeddings,
        device,
        ShardingConfig(**sharding),  # type: ignore[arg-type]
        world_size=world_size,
        batch_size=1024,
    )
    return table_shards(embeddings, plan)


@pytest.mark.parametrize("kind", ["auto", "row_wise", "table_wise"])
@pytest.mark.parametrize("world_size", [1, 2, 16])
def test_parts_add_up_to_the_table(kind: str, world_size: int) -> None:
    found = shards(EmbeddingConfig(dim=16), world_size, kind=kind)
    assert sum(part.parameter_bytes for part in found) == 2_100_000 * 16 * 4
    assert sum(part.optimizer_bytes for part in found) == 2_100_000 * 4
    assert {part.rank for part in found} <= set(range(world_size))
    if kind == "row_wise" and world_size > 1:
        assert len(found) == world_size


@pytest.mark.parametrize("kind", ["auto", "row_wise"])
@pytest.mark.parametrize(("rows", "world_size"), [(1, 2), (5, 4), (9, 8), (17, 16)])
def test_no_process_has_a_part_without_rows(kind: str, rows: int, world_size: int) -> None:
    """FBGEMM's kernels write where they must not for one that has none."""
    tables = [
        EmbeddingBagConfig(name="a", feature_names=["a"], num_embeddings=rows, embedding_dim=8)
    ]
    embeddings = CompressedEmbeddingBagCollection(
        tables=tables, policy=Policy(default=Rule(method=Full())), device=META, fused_device=META
    )
    config = ShardingConfig(kind=kind)  # type: ignore[arg-type]
    plan = plan_for(embeddings, CPU, config, world_size=world_size, batch_size=1024)
    (found,) = table_shards(embeddings, plan)
    assert (found.kind, found.rows) == ("table_wise", rows)


def test_tables_of_dense_adam_are_replicated() -> None:
    config = EmbeddingConfig(dim=6, optimizer="adam", method="unified", budget="0.01x")
    assert [(part.kind, part.rank) for part in shards(config, 2)] == [("replicated", -1)]


@pytest.mark.parametrize(
    ("config", "world_size", "sharding", "message"),
    [
        (
            EmbeddingConfig(dim=16),
            2,
            {"kind": "column_wise"},
            "keep one sum for each part of a row",
        ),
        (
            EmbeddingConfig(dim=16, optimizer="sgd"),
            8,
            {"kind": "column_wise"},
            "is 16 wide, which 8 processes cannot share in multiples of 4",
        ),
        (EmbeddingConfig(dim=16), 2, {"host_memory": "60MB"}, "do not fit 2 processes"),
    ],
)
def test_what_cannot_be_divided_is_one_clear_error(
    config: EmbeddingConfig, world_size: int, sharding: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shards(config, world_size, **sharding)


def test_a_cluster_of_gpus_needs_none_here() -> None:
    found = shards(EmbeddingConfig(dim=16), 256, torch.device("cuda"), ranks_per_host=8)
    assert sum(part.parameter_bytes for part in found) == 2_100_000 * 16 * 4


def test_processes_of_a_plan_share_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ShardingConfig(host_memory="8GB")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # what TorchRec is told so that it does not warn
    assert rank_memory(config, torch.device("cpu"), 4) == 2_000_000_000
    monkeypatch.setenv("WORLD_SIZE", "4")  # one process on each of four hosts
    assert rank_memory(config, torch.device("cpu"), 4) == 8_000_000_000
