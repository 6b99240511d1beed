"""Differentiable neural input search: which dims each block of equally frequent ids keeps.

Source: Cheng et al., "Differentiable Neural Input Search for Recommender Systems",
arXiv 2006.04466.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.alpha import AlphaSearch
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.method import Kept, Method, Phase, Trained, Values, register
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.selection import Block, Scores, select
from recsys_compress.compress.slices import (
    Slice,
    frequency_blocks,
    placed,
    scaled,
    whole_or_blocks,
)
from recsys_compress.errors import UserError


@register("dnis")
@dataclass(frozen=True, kw_only=True)
class DNIS(Method):
    """Differentiable neural input search: frequent ids keep more dims, chosen by validation loss.

    A table is cut into blocks of neighbouring ids, which in prepared data are ids of like
    frequency. While it is searched, all dims are stored, and those of block l are multiplied by
    alpha_l in [0, 1]^D, which learns on validation batches. Then alpha is multiplied into the
    table, and the dims that are worth least for a byte are dropped, by one threshold for all blocks
    of all tables. What is left is trained on, and is all that is stored: a table for each block,
    as wide as the dims it keeps.
    """

    kept: dict[str, tuple[Block, ...]] | None = field(
        default=None,
        metadata={"help": "by table, its blocks and the dims each keeps; found by the search"},
    )
    num_blocks: int = field(default=4, metadata={"help": "most blocks of a table"})
    growth: float = field(
        default=3.0, metadata={"help": "how many times more ids a block has than the one before"}
    )
    dim_multiple: int = field(
        default=1,
        metadata={"help": "dims are dropped in groups of so many; of fused tables, of 4 at least"},
    )
    least_dims: int = field(
        default=0, metadata={"help": "dims that every block keeps, whatever they are worth"}
    )
    warmup_epochs: int | None = field(
        default=None, metadata={"help": "most epochs of full tables at first; None for the job's"}
    )
    search_epochs: int = field(
        default=1, metadata={"help": "most epochs of the search; 0 keeps dims evenly, unsearched"}
    )
    search_rate: float = field(
        default=0.1,
        metadata={"help": "learning rates of the tables in the search, as a share of the job's"},
    )
    alpha_lr: float = field(default=0.003, metadata={"help": "step size of alpha"})
    l1: float = field(default=1e-5, metadata={"help": "pressure on alpha towards zero"})
    inner_lr: float = field(
        default=0.0,
        metadata={"help": "learning rate of the unrolled training step; 0 for first order"},
    )
    fixed: bool = field(
        default=False,
        metadata={"help": "`kept` stays as it is, whatever dims of trained tables are worth"},
    )
    soft: bool = field(
        default=False, metadata={"help": "the form that is searched, of all dims; set by phases"}
    )

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_blocks", self.num_blocks, 1),
            ("growth", self.growth, 1.0),
            ("dim_multiple", self.dim_multiple, 1),
            ("least_dims", self.least_dims, 0),
            ("search_epochs", self.search_epochs, 0),
            ("search_rate", self.search_rate, 0.0),
            ("alpha_lr", self.alpha_lr, 0.0),
            ("l1", self.l1, 0.0),
            ("inner_lr", self.inner_lr, 0.0),
        ):
            if not least <= value < math.inf:
                raise UserError(
                    f"embedding.methods.dnis.{name} = {value}: must be {least} or more, and finite"
                )

    def phases(self) -> tuple[Phase, ...]:
        """Returns warm-up of full tables, the search, and training of what is kept."""
        if self.soft or not self.search_epochs:
            return (Phase(name="train", method=self),)
        soft = replace(self, kept=None, soft=True)
        return (
            Phase(name="warm-up", method=Full(), epochs=self.warmup_epochs),
            Phase(
                name="search",
                method=soft,
                epochs=self.search_epochs,
                rate=self.search_rate,
                freeze_model=True,
                search=True,
            ),
            Phase(name="retrain", method=self),
        )

    def in_one_stage(self, *, adopting: bool) -> "DNIS":
        """Returns the form that is not searched: it keeps dims evenly, or as trained tables say.

        From scratch, ids without any dims learn nothing, however little theirs were worth.
        """
        return replace(self, search_epochs=0, fixed=not adopting)

    def blocks(self, table: EmbeddingBagConfig) -> list[int]:
        """Returns the ids of each block; see `frequency_blocks`."""
        return frequency_blocks("dnis", table, self.num_blocks, self.growth)

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns a table and a look-up for each block that keeps any dims."""
        if not self.soft:
            return placed(self.slices(tables))
        dims = {int(table.embedding_dim) for table in tables}
        if len(dims) > 1:
            raise UserError(f"method 'dnis' searches tables of one width, not {sorted(dims)}")
        lowering = scaled(tables, {table.name: self.blocks(table) for table in tables})
        hook = AlphaSearch(lowering, alpha_lr=self.alpha_lr, l1=self.l1, inner_lr=self.inner_lr)
        return replace(lowering, hook=hook)

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "DNIS":
        """Keeps dims evenly: one more chunk of each block in turn, the frequent ids' first."""
        scores = {
            table.name: [
                Scores(ids=ids, dims=0.5 ** torch.arange(table.embedding_dim).double())
                for ids in self.blocks(table)
            ]
            for table in tables
        }
        return self._selected(scores, budget_bytes, options)

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple["DNIS", Values]:
        """Returns the method with the dims worth most for a byte, and their trained values.

        A dim of a block is worth the mean square of its column of the trained vectors, into which
        alpha is multiplied already. Without a budget, as many bytes are used as `kept` does; with
        `fixed`, its dims.
        """
        method = self
        if not self.soft and not (self.fixed and self.kept):
            if budget_bytes is None:
                kept = [block for table in tables for block in self._kept(table)]
                budget_bytes = sum(block.bytes(options) for block in kept)
            scores = {t.name: self._scores(t, trained.vectors(t.name)) for t in tables}
            method = self._selected(scores, budget_bytes, options)
        values: dict[str, Tensor] = {}
        for table in tables:
            vectors = trained.vectors(table.name)
            values |= {part.name: part.values(vectors) for part in method.slices([table])}
        return method, Values(tables=values)

    def slices(self, tables: Sequence[EmbeddingBagConfig]) -> list[Slice]:
        """Returns the blocks that keep any dims; of the form that is searched, what it stores.

        Raises:
            UserError: `kept` is not known, or does not suit the tables.
        """
        if self.soft:
            return whole_or_blocks(tables, {table.name: self.blocks(table) for table in tables})
        found = []
        for table in tables:
            first = 0
            for number, block in enumerate(self._kept(table)):
                if block.dims:
                    found.append(
                        Slice(
                            table=table,
                            number=number,
                            first=first,
                            ids=block.ids,
                            dims=block.dims,
                        )
                    )
                first += block.ids
        return found

    def kept_parts(self, tables: Sequence[EmbeddingBagConfig]) -> Kept | None:
        """Returns the mean number of dims that the ids of each block keep."""
        if self.kept is None:
            return None
        rows = {}
        for table in tables:
            blocks = self._kept(table)
            ids = torch.tensor([block.ids for block in blocks])
            dims = torch.tensor([float(len(block.dims)) for block in blocks])
            # A block on the threshold is stored as two, so means are taken over ids.
            by_block = torch.split(dims.repeat_interleave(ids), self.blocks(table))
            rows[table.name] = [float(block.mean()) for block in by_block]
        return Kept(
            rows=rows,
            most=max(int(table.embedding_dim) for table in tables),
            label="dims kept",
            columns="block, the most frequent ids first",
        )

    def _scores(self, table: EmbeddingBagConfig, vectors: Tensor) -> list[Scores]:
        parts = torch.split(vectors, self.blocks(table))
        return [Scores(ids=len(part), dims=part.square().mean(dim=0)) for part in parts]

    def _selected(
        self, scores: dict[str, list[Scores]], budget_bytes: int, options: TableOptions
    ) -> "DNIS":
        kept = select(
            "dnis",
            scores,
            budget_bytes,
            options,
            dim_multiple=self.dim_multiple,
            least_dims=self.least_dims,
        )
        return replace(self, kept=kept, soft=False)

    def _kept(self, table: EmbeddingBagConfig) -> Sequence[Block]:
        if self.kept is None:
            raise UserError("method 'dnis' needs embedding.budget or embedding.methods.dnis.kept")
        blocks = self.kept.get(table.name, ())
        _check(table, blocks)
        return blocks


def _check(table: EmbeddingBagConfig, blocks: Sequence[Block]) -> None:
    """Refuses blocks that do not suit a table."""
    key = f"embedding.methods.dnis.kept.{table.name}"
    if sum(block.ids for block in blocks) != table.num_embeddings:
        raise UserError(
            f"{key}: has blocks of {sum(block.ids for block in blocks):,} ids, but the table has "
            f"{table.num_embeddings:,}; leave it out and set embedding.budget"
        )
    if not any(block.dims for block in blocks):
        raise UserError(f"{key}: keeps no dims; each table has to keep some")
    for block in blocks:
        if list(block.dims) != sorted(set(block.dims) & set(range(table.embedding_dim))):
            raise UserError(
                f"{key}: dims {list(block.dims)} must rise and lie in [0, {table.embedding_dim})"
            )
