"""What processes that share tables tell each other in a step, in bytes, by what is looked up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.lowering import FP32_BYTES
from recsys_compress.compress.merge import MergedTable
from recsys_compress.train.step import STEP_FIGURES
from recsys_compress.train.topology import TableShard

IDS, FORWARD, BACKWARD, GRADIENTS = "ids", "vectors forward", "vectors backward", "gradients"

_INDEX_BYTES = 8  # ids and lengths travel, and are saved, as int64
# What FBGEMM keeps for each look-up besides: its dim, range of rows and place in the output, each
# both as int32 and as int64.
_LOOKUP_BYTES = 36


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that one process gives to collectives in a step, and those that it gets.

    What it sends to itself is among them.
    """

    sent: int
    received: int


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """Look-ups of one sharded table.

    Attributes:
        lookups: number K of look-ups.
        ids: of an example, on average.
        dim: width D.
        by_rows: whether its rows are divided.
        parts: by rank, the share of the ids that it looks up and the columns that it holds.
    """

    lookups: int
    ids: float
    dim: int
    by_rows: bool
    parts: Mapping[int, tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What processes tell each other about look-ups, and what they save of what they hear."""

    tables: Sequence[TableTraffic]
    world_size: int
    id_bytes: int  # with the weight, where there is one
    splits: int  # numbers that announce one exchange of ids to one process

    @staticmethod
    def of(
        embeddings: CompressedEmbeddingBagCollection,
        shards: Sequence[TableShard],
        lookups: KeyedJaggedTensor,
        world_size: int,
    ) -> "Traffic":
        """Returns that of look-ups like those of a sample."""
        weighted = lookups.weights_or_none() is not None
        tables, first = [], 0
        for table in embeddings.merged_tables():
            last = first + _ids_of(table, lookups)
            rows = lookups.values()[first:last]
            first = last
            if not table.options.fused:
                continue
            own = [s for s in shards if s.table == table.name]
            by_rows = own[0].kind == "row_wise"
            ends = np.cumsum([s.rows for s in own])
            counts = np.bincount(
                np.searchsorted(ends, rows.numpy(), side="right"), minlength=len(own)
            )
            shares = counts / max(len(rows), 1) if by_rows else np.ones(len(own))
            parts: dict[int, tuple[float, int]] = {}
            for shard, share in zip(own, shares, strict=True):
                columns = shard.columns + parts.get(shard.rank, (0.0, 0))[1]
                parts[shard.rank] = (float(share), columns)
            tables.append(
                TableTraffic(
                    lookups=len(table.lookups),
                    ids=len(rows) / lookups.stride(),
                    dim=table.stored_dim,
                    by_rows=by_rows,
                    parts=parts,
                )
            )
        return Traffic(
            tables=tables,
            world_size=world_size,
            id_bytes=_INDEX_BYTES + (FP32_BYTES if weighted else 0),
            splits=4 if weighted else 3,
        )

    def exchanges(self, rank: int, batch_size: int, gradients: int) -> dict[str, Exchange]:
        """Returns what a process sends and receives in a step of `batch_size` examples."""
        if self.world_size == 1:
            return dict.fromkeys((IDS, FORWARD, BACKWARD, GRADIENTS), Exchange(sent=0, received=0))
        everyone = self.world_size * batch_size
        kinds = {(t.by_rows, len(t.parts) > 1) for t in self.tables}
        splits = len(kinds) * self.splits * self.world_size * _INDEX_BYTES
        asked = heard = float(splits)
        given = got = 0  # of pooled vectors
        for table in self.tables:
            own = table.parts.get(rank)
            # Ids go to the process that has their row, but lengths to all that share a table.
            copies = len(table.parts)
            ids_sent = table.ids * (1 if table.by_rows else copies) * self.id_bytes
            asked += batch_size * (ids_sent + copies * table.lookups * _INDEX_BYTES)
            got += batch_size * table.lookups * table.dim * FP32_BYTES
            if own is not None:
                ids = table.ids * own[0] * self.id_bytes
                heard += everyone * (ids + table.lookups * _INDEX_BYTES)
                given += everyone * table.lookups * own[1] * FP32_BYTES
        averaged = gradients + STEP_FIGURES * FP32_BYTES
        return {
            IDS: Exchange(sent=round(asked), received=round(heard)),
            FORWARD: Exchange(sent=given, received=got),
            BACKWARD: Exchange(sent=got, received=given),
            GRADIENTS: Exchange(sent=averaged, received=averaged),
        }

    def saved(self, rank: int, batch_size: int) -> int:
        """Returns the bytes that a process's kernels save: ids, offsets and a few per look-up."""
        everyone, total = self.world_size * batch_size, 0.0
        for table in self.tables:
            if rank in table.parts:
                ids = everyone * table.ids * table.parts[rank][0] * self.id_bytes
                total += ids + table.lookups * (everyone * _INDEX_BYTES + _LOOKUP_BYTES)
        return round(total)


def _ids_of(table: MergedTable, lookups: KeyedJaggedTensor) -> int:
    by_key = dict(zip(lookups.keys(), lookups.length_per_key(), strict=True))
    return sum(by_key[name] for name in table.lookups)
