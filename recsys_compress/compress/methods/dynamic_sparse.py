"""Dynamic sparse learning: only the blocks that are not zero exist, and training moves them.

Source: Wang et al., "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation", WSDM
2024. Blocks, one pool for all tables, and gradients summed over a window are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.bitmap import Bitmap, bitmap_bytes, draw, pack
from recsys_compress.compress.blocks import MAX_WIDTH, BlockIds, Layout
from recsys_compress.compress.budget import CLOSE, check_choice, out_of_reach, unreachable
from recsys_compress.compress.growth import Growing, GrowthKind, Schedule, smallest
from recsys_compress.compress.hashing import salt
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.merge import MAX_ROWS
from recsys_compress.compress.method import Method, Trained, Values, register
from recsys_compress.errors import UserError

NAME = "dynamic_sparse"
POOL = "blocks"
_FEW_IDS = 1 << 17


@register(NAME)
@dataclass(frozen=True, kw_only=True)
class DynamicSparse(Method):
    """Dynamic sparse learning: a constant number of non-zero blocks that training moves about.

    The vector of an id is D / b blocks of b values, of which some are stored and the others zero:
    of all tables together exactly P, from the first step on. They lie in one pool E in R^{P x b}
    in the order of their ids; a bit mask says which are there, and the rank of a block's bit, the
    number of ones before it, is its row. Every `update_steps` steps the ceil(r P) blocks of least
    norm are dropped and as many grown, where the gradient, summed over the last `window` steps, is
    greatest; r falls from `update_ratio` to 0.005 along half a cosine.
    """

    num_blocks: int | None = field(
        default=None, metadata={"help": "stored blocks P of all tables together"}
    )
    density: float | None = field(
        default=None,
        metadata={"help": "share of all blocks that is stored, instead of their number"},
    )
    block: int = field(default=4, metadata={"help": "values b of a block; 1 is the paper's"})
    growth: GrowthKind = field(
        default="gradient",
        metadata={"help": "gradient, random, or static: the random first blocks stay"},
    )
    update_steps: int = field(
        default=100, metadata={"help": "steps from one drop and growth to the next"}
    )
    update_ratio: float = field(
        default=0.5, metadata={"help": "share of the blocks dropped at first; falls to 0.005"}
    )
    window: int = field(
        default=8, metadata={"help": "steps before an update whose gradients are summed"}
    )
    stop: float = field(
        default=0.8, metadata={"help": "share of training after which blocks stay where they are"}
    )
    redistribute: bool = field(
        default=True, metadata={"help": "whether blocks may move from one table to another"}
    )
    seed: int = field(default=0, metadata={"help": "of the first blocks and of random growth"})

    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the pool, the mask with random blocks, and what moves them."""
        layout = self._layout(tables)
        count = self._count(layout)
        index = Bitmap(layout.total)
        generator = torch.Generator().manual_seed(salt("start", 0, self.seed))
        index.fill(draw(index.words, 0, layout.total, count, generator))
        ids = BlockIds(layout, index)
        pool = PhysicalTable(
            name=POOL,
            num_embeddings=count,
            embedding_dim=self.block,
            members=tuple(table.name for table in tables),
        )
        return Lowering(
            tables=(pool,),
            lookups=tuple(
                Lookup(name=name, feature=name.rpartition("#")[0], table=POOL) for name in ids.names
            ),
            ids=ids,
            hook=None if self.growth == "static" else self._hook(layout, index),
        )

    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "DynamicSparse":
        """Returns as many blocks as the budget holds beside the mask and its counts."""
        total = self._layout(tables).total
        index, row = bitmap_bytes(total), options.row_bytes(self.block)
        most = min(total, MAX_ROWS)
        count = min((budget_bytes - index) // row, most)
        used = index + count * row
        if count < 1 or (count == most and used < min(CLOSE * budget_bytes, total * row)):
            raise out_of_reach(NAME, budget_bytes, index + row, index + most * row)
        if count < most and used < CLOSE * budget_bytes:
            raise unreachable(NAME, budget_bytes, used, used + row)
        return replace(self, num_blocks=count, density=None)

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],
        trained: Trained,
        budget_bytes: int | None,
        options: TableOptions,
    ) -> tuple["DynamicSparse", Values]:
        """Returns the method with the blocks of greatest norm over all tables, as trained."""
        method = self if budget_bytes is None else self.fit(tables, budget_bytes, options)
        layout = method._layout(tables)
        index = Bitmap(layout.total)
        norms = torch.empty(layout.total)
        spans = [
            (table.name, slice(first, last))
            for table, first, last in zip(tables, layout.ends, layout.ends[1:], strict=False)
        ]
        for name, span in spans:
            blocks = trained.vectors(name).view(-1, self.block)
            norms[span] = torch.linalg.vector_norm(blocks, dim=1)
        stored = torch.zeros(len(index.words) * 64, dtype=torch.bool)
        stored[: layout.total] = smallest(norms.neg_(), method._count(layout))
        index.fill(pack(stored))
        pool = [trained.vectors(name).view(-1, self.block)[stored[span]] for name, span in spans]
        ids = {f"index.{name}": value for name, value in index.state_dict().items()}
        return method, Values(tables={POOL: torch.cat(pool)}, ids=ids)

    def in_one_stage(self, *, adopting: bool) -> "DynamicSparse":
        """Returns the form whose blocks stay where trained tables had the largest."""
        return replace(self, growth="static") if adopting else self

    def _hook(self, layout: Layout, index: Bitmap) -> Growing:
        schedule = Schedule(
            every=self.update_steps,
            window=min(self.window, self.update_steps),
            ratio=self.update_ratio,
            stop=self.stop,
        )
        spans = [(0, layout.total)]
        if not self.redistribute:
            spans = list(zip(layout.ends, layout.ends[1:], strict=False))
        return Growing(
            layout=layout,
            index=index,
            schedule=schedule,
            random=self.growth == "random",
            spans=spans,
            table=POOL,
            seed=self.seed,
            # So their sums take at most a quarter of what the pool does, or little anyway.
            most_ids=max(_FEW_IDS, self._count(layout) // (4 * layout.width)),
        )

    def _layout(self, tables: Sequence[EmbeddingBagConfig]) -> Layout:
        """Returns where the tables' blocks are.

        Raises:
            UserError: a knob is out of range or does not suit the tables.
        """
        self._check()
        dims = sorted({int(table.embedding_dim) for table in tables})
        if len(dims) > 1:
            raise UserError(f"method {NAME!r} needs tables of one width, these have {dims}")
        dim, rest = dims[0], dims[0] % self.block
        if rest:
            nearest = [str(d) for d in (dim - rest, dim - rest + self.block) if d]
            raise UserError(
                f"embedding.dim = {dim}: is no multiple of embedding.methods.{NAME}.block = "
                f"{self.block}; use {' or '.join(nearest)}"
            )
        if dim // self.block > MAX_WIDTH:
            raise UserError(
                f"embedding.methods.{NAME}.block = {self.block}: makes {dim // self.block} blocks "
                f"of a vector of {dim}, more than {MAX_WIDTH}; use {-(-dim // MAX_WIDTH)} or more"
            )
        for table in tables:
            if table.num_embeddings > MAX_ROWS:
                raise UserError(
                    f"table {table.name!r}: has {table.num_embeddings:,} ids, too many to keep a "
                    "bit for each; prepare the data with --encoding vocabulary"
                )
        return Layout.of(tables, self.block)

    def _count(self, layout: Layout) -> int:
        """Returns P.

        Raises:
            UserError: nothing says how many blocks there are, or it is impossible.
        """
        if self.density is not None and self.num_blocks is not None:
            raise UserError(f"embedding.methods.{NAME}: give num_blocks or density, not both")
        if self.density is not None:
            return max(1, min(round(self.density * layout.total), MAX_ROWS))
        if self.num_blocks is None:
            raise UserError(
                f"method {NAME!r} needs embedding.budget or embedding.methods.{NAME}.density"
            )
        if not 0 < self.num_blocks <= min(layout.total, MAX_ROWS):
            raise UserError(
                f"embedding.methods.{NAME}.num_blocks = {self.num_blocks}: must lie in "
                f"[1, {min(layout.total, MAX_ROWS)}]"
            )
        return self.num_blocks

    def _check(self) -> None:
        check_choice(f"{NAME}.growth", self.growth, GrowthKind)
        for key in ("block", "update_steps", "window"):
            if getattr(self, key) < 1:
                raise UserError(
                    f"embedding.methods.{NAME}.{key} = {getattr(self, key)}: must be at least 1"
                )
        for key in ("density", "update_ratio", "stop"):
            share = getattr(self, key)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"embedding.methods.{NAME}.{key} = {share}: must lie in (0, 1]")
