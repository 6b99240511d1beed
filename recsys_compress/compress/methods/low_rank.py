"""Low rank: each row is a short code, decoded by a matrix of its table.

Source: Guo et al., "Unified Low-rank Compression Framework for Click-through Rate Prediction", KDD
2024, which takes trained tables over; the same form can be trained from scratch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.budget import CLOSE, out_of_reach, unreachable
from recsys_compress.compress.combine import projected
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.method import Method, Trained, Values, register
from recsys_compress.compress.spectrum import Item, Spectrum, choose_ranks, rank_steps, saves
from recsys_compress.errors import UserError, nearest


@register("low_rank")
@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Low-rank tables, e(id) = C[id] U^T + mu, with C n x k and U D x k, from scratch or trained.

    A table has its own codes C, decoder U and mean mu. The sum over a bag of L ids is the sum of
    their codes, decoded, plus L times mu. A table is factorized only where this makes it smaller:
    k * (n + D) + D values are fewer than n * D.
    """

    whole_model: ClassVar[bool] = True

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
            ranks[table.name] = rank if saves(int(table.num_embeddings), dim, rank) else dim
        return ranks

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the codes and their decoders."""
        return projected(tables, self.ranks(tables), mean=True)

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "LowRank":
        """Finds the greatest ranks that fit.

        All tables begin at the least rank. The next step up always goes to the table of least rank,
        to the largest of several, so that ranks rise together until the budget is used up. If the
        steps are so coarse that this leaves more than 5 % unused, one table is held back so that
        the others can use it, the one that leaves the least rank as great as possible.
        """
        ordered = sorted(tables, key=lambda table: -table.num_embeddings)
        steps = {table.name: _steps(table, options) for table in ordered}
        least = sum(table[0][1] for table in steps.values())
        full = sum(table[-1][1] for table in steps.values())
        if least > budget_bytes:
            raise out_of_reach("low_rank", budget_bytes, least, full)
        floor = min(CLOSE * budget_bytes, full)
        ranks, used, above = _rise(steps, budget_bytes)
        if used < floor:
            held = [
                _rise(steps | {name: table[:count]}, budget_bytes)
                for name, table in steps.items()
                for count in range(1, len(table))
            ]
            for found, taken, _ in held:
                if _worth(found, taken, floor) > _worth(ranks, used, floor):
                    ranks, used = found, taken
        if used < floor:
            raise unreachable("low_rank", budget_bytes, used, above)
        return replace(self, rank=ranks)

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple["LowRank", Values]:
        """Factorizes trained tables by the principal components of what is looked up.

        Of its vectors E a table keeps the codes C = (E - mu) U_k, with the decoder U_k^T and the
        mean mu. Without `rank`, the ranks of tables and `trained.layers` are chosen together.
        """
        spectra = {t.name: Spectrum.of(trained.moments(t.name)) for t in tables}
        method, layers = self, {}
        if self.rank is None and budget_bytes is not None:
            lost = trained.losses or _share_of_variance(spectra)
            items = [Item.of(t.name, _steps(t, options), lost(t.name)) for t in tables]
            ranks = choose_ranks("low_rank", [*items, *trained.layers], budget_bytes)
            method = replace(self, rank=dict(zip(spectra, ranks, strict=False)))
            layers = {
                layer.name: rank
                for layer, rank in zip(trained.layers, ranks[len(items) :], strict=True)
                if rank < layer.ranks[-1]
            }
        return method, replace(_mimic(method.lower(tables), trained, spectra), layers=layers)


def _share_of_variance(spectra: Mapping[str, Spectrum]) -> Callable[[str], Tensor]:
    """Returns what tables lose at each rank, as long as nothing has measured what it does.

    The vectors of all tables stand side by side in the model's input, so the unit is one: the mean
    variance of a table's vectors.
    """
    unit = sum(float(spectrum.eigenvalues.sum()) for spectrum in spectra.values()) / len(spectra)
    return lambda name: spectra[name].lost_share(unit)


def _mimic(lowering: Lowering, trained: Trained, spectra: Mapping[str, Spectrum]) -> Values:
    """Returns the codes, decoders and means of trained tables, in `Projections`' layout."""
    codes: dict[str, Tensor] = {}
    combine: dict[str, list[Tensor]] = {}
    for table in lowering.tables:
        spectrum, rank = spectra[table.name], table.embedding_dim
        vectors, dim = trained.vectors(table.name), len(spectrum.mean)
        codes[table.name] = vectors
        if rank < dim:
            basis = spectrum.basis(rank)
            codes[table.name] = ((vectors.double() - spectrum.mean) @ basis).float()
            for name, value in (("projections", basis.t()), ("means", spectrum.mean)):
                combine.setdefault(f"{name}.{rank}x{dim}", []).append(value.float())
    return Values(tables=codes, combine={name: torch.stack(v) for name, v in combine.items()})


def _steps(table: EmbeddingBagConfig, options: TableOptions) -> list[tuple[int, int]]:
    return rank_steps(int(table.num_embeddings), int(table.embedding_dim), options)


def _worth(ranks: Mapping[str, int], used: int, floor: float) -> tuple[float, int, int]:
    return min(used, floor), min(ranks.values()), used


def _rise(
    steps: Mapping[str, Sequence[tuple[int, int]]], budget_bytes: int
) -> tuple[dict[str, int], int, int]:
    """Raises ranks together, table by table, while they fit.

    Args:
        steps: ranks and bytes of each table, rising; at the first ones all fit.
        budget_bytes: the budget.

    Returns:
        The ranks, their bytes, and the bytes of the smallest step that did not fit.
    """
    level = dict.fromkeys(steps, 0)
    used = sum(table[0][1] for table in steps.values())
    above = sum(table[-1][1] for table in steps.values())
    rising = list(steps)
    while rising := [name for name in rising if level[name] + 1 < len(steps[name])]:
        name = min(rising, key=lambda n: steps[n][level[n]][0])  # the first of several
        larger = used + steps[name][level[name] + 1][1] - steps[name][level[name]][1]
        if larger > budget_bytes:
            rising.remove(name)
            above = min(above, larger)
        else:
            used = larger
            level[name] += 1
    return {name: steps[name][level[name]][0] for name in steps}, used, above
