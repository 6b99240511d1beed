"""A dry run as tables on standard output."""

from rich.console import Console

from recsys_compress.byte_sizes import format_bytes
from recsys_compress.track.tables import make_table, print_table
from recsys_compress.train.dryrun import DryRun, RankBytes
from recsys_compress.train.topology import TableShard

FEW_RANKS = 8  # shown one by one


def print_dry_run(found: DryRun) -> None:
    """Prints the plan, bytes by process, and what a step sends and receives.

    Of many processes it shows tables as a whole, and the fullest and the emptiest process.
    """
    count = len(found.ranks)
    few = count <= FEW_RANKS
    columns = ["table", "kind", "ranks", "rows", "columns", "bytes", "optimizer"]
    print_table(make_table(columns, _each(found) if few else _by_table(found)))
    shown = {str(rank.rank): rank for rank in found.ranks}
    if not few:
        shown = {
            f"fullest ({found.fullest.rank})": found.fullest,
            f"emptiest ({found.emptiest.rank})": found.emptiest,
        }
    columns = ["rank", "parameters", "optimizer", "gradients", "activations", "buffers", "all"]
    print_table(make_table(columns, [_memory(name, rank) for name, rank in shown.items()]))
    columns = ["bytes of a step, sent / received", *found.fullest.exchanges]
    print_table(make_table(columns, [_traffic(name, rank) for name, rank in shown.items()]))
    limit = "" if found.memory is None else f", {format_bytes(found.memory)} each"
    each = f"{found.batch_size:,} examples a step in each"
    Console(highlight=False, soft_wrap=True, markup=False).print(
        f"{count} processes on {found.device}{limit}; {each}"
    )


def _each(found: DryRun) -> list[list[str]]:
    return [_part(s, "all" if s.rank < 0 else str(s.rank)) for s in found.shards]


def _by_table(found: DryRun) -> list[list[str]]:
    """Returns a row for each table, with its largest part."""
    rows = []
    for name in dict.fromkeys(shard.table for shard in found.shards):
        parts = [shard for shard in found.shards if shard.table == name]
        largest = max(parts, key=lambda shard: shard.parameter_bytes)
        held = len({part.rank for part in parts if part.rows})
        ranks = f"{held}, largest part" if held > 1 else str(largest.rank)
        rows.append(_part(largest, "all" if largest.rank < 0 else ranks))
    return rows


def _part(shard: TableShard, ranks: str) -> list[str]:
    return [
        shard.table,
        shard.kind,
        ranks,
        f"{shard.rows:,}",
        f"{shard.columns:,}",
        format_bytes(shard.parameter_bytes),
        format_bytes(shard.optimizer_bytes),
    ]


def _memory(name: str, rank: RankBytes) -> list[str]:
    figures = (
        rank.parameters,
        rank.optimizer,
        rank.gradients,
        rank.activations,
        rank.buffers,
        rank.total,
    )
    return [name, *map(format_bytes, figures)]


def _traffic(name: str, rank: RankBytes) -> list[str]:
    found = rank.exchanges.values()
    return [name, *(f"{format_bytes(e.sent)} / {format_bytes(e.received)}" for e in found)]
