"""Low rank: each row is a short code, decoded by a matrix of its table.

Source: the form of Guo et al.'s atomic feature mimicking (KDD 2024), here trained from scratch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.combine import projected
from recsys_compress.compress.lowering import FP32_BYTES, Lowering, TableOptions
from recsys_compress.compress.method import CLOSE, Method, out_of_reach, register, unreachable
from recsys_compress.errors import UserError, nearest


@register("low_rank")
@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Low-rank tables trained from scratch: e(id) = C[id] U^T + mu, with C n x k and U D x k.

    A table has its own codes C, decoder U and mean mu. The sum over a bag of L ids is the sum of
    their codes, decoded, plus L times mu. A table is factorized only where this makes it smaller:
    k * (n + D) + D values are fewer than n * D.
    """

    rank: int | dict[str, int] | None = field(
        default=None, metadata={"help": "rank k of all tables; or by name, others take the least"}
    )

    def ranks(self, tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
        """Returns the rank of each table; D for one that stays as it is.

        Raises:
            UserError: no rank was given and no budget fitted, a name is unknown, or a rank is not
                in [1, D].
        """
        if self.rank is None:
            raise UserError(
                "method 'low_rank' needs embedding.budget or embedding.methods.low_rank.rank"
            )
        names = [table.name for table in tables]
        given = dict.fromkeys(names, self.rank) if isinstance(self.rank, int) else self.rank
        for name in given:
            if name not in names:
                raise UserError(
                    f"embedding.methods.low_rank.rank: no table {name!r} is factorized; "
                    f"{nearest(name, names)}"
                )
        if not given:
            raise UserError("embedding.methods.low_rank.rank: names no table; name one")
        ranks = {}
        for table in tables:
            rank, dim = given.get(table.name, min(given.values())), int(table.embedding_dim)
            if not 1 <= rank <= dim:
                raise UserError(
                    f"embedding.methods.low_rank.rank: {rank} for {table.name!r} must lie in "
                    f"[1, {dim}]"
                )
            ranks[table.name] = rank if _saves(table, rank) else dim
        return ranks

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the codes and their decoders."""
        return projected(tables, self.ranks(tables), mean=True)

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "LowRank":
        """Finds the greatest ranks that fit.

        All tables begin at the least rank. The next step up always goes to the table of least rank,
        to the largest of several, so that ranks rise together until the budget is used up; a table
        whose next step does not fit any more is done.
        """
        name = "low_rank"
        steps = {table.name: _steps(table, options) for table in tables}
        level = dict.fromkeys(steps, 0)
        used = sum(s[0][1] for s in steps.values())
        full = sum(s[-1][1] for s in steps.values())
        if used > budget_bytes:
            raise out_of_reach(name, budget_bytes, used, full)
        queue = [t.name for t in sorted(tables, key=lambda t: -t.num_embeddings)]
        above = full
        while queue := [n for n in queue if level[n] + 1 < len(steps[n])]:
            table = min(queue, key=lambda n: steps[n][level[n]][0])  # the first of several
            larger = used + steps[table][level[table] + 1][1] - steps[table][level[table]][1]
            if larger > budget_bytes:
                queue.remove(table)
                above = min(above, larger)
            else:
                used = larger
                level[table] += 1
        if used < min(CLOSE * budget_bytes, full):
            raise unreachable(name, budget_bytes, used, above)
        return replace(self, rank={n: steps[n][level[n]][0] for n in steps})


def _saves(table: EmbeddingBagConfig, rank: int) -> bool:
    ids, dim = int(table.num_embeddings), int(table.embedding_dim)
    return rank * (ids + dim) + dim < ids * dim


def _steps(table: EmbeddingBagConfig, options: TableOptions) -> list[tuple[int, int]]:
    """Returns (rank, bytes) of the ranks worth having: no padding in a code, smaller than full."""
    ids, dim = int(table.num_embeddings), int(table.embedding_dim)
    steps = [
        (rank, ids * options.row_bytes(rank) + (rank + 1) * dim * FP32_BYTES)
        for rank in range(1, dim)
        if options.stored_dim(rank) == rank and _saves(table, rank)
    ]
    return [*steps, (dim, ids * options.row_bytes(dim))]
