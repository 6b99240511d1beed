"""Which dims each block of ids keeps, by one threshold for all tables."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from recsys_compress.compress.budget import out_of_reach
from recsys_compress.compress.lowering import TableOptions


@dataclass(frozen=True, kw_only=True)
class Block:
    """Neighbouring ids of a table that keep the same dims.

    Attributes:
        ids: their number.
        dims: positions in the vector, rising; none where the vectors are zero.
    """

    ids: int
    dims: tuple[int, ...]

    def bytes(self, options: TableOptions) -> int:
        """Returns what its rows take, padding included."""
        return self.ids * options.row_bytes(len(self.dims)) if self.dims else 0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the dims of a block are worth.

    Attributes:
        ids: number of the block's ids.
        dims: (D,) worth of each dim for one id.
    """

    ids: int
    dims: Tensor


@dataclass(kw_only=True)
class _Chunk:
    """Dims of a block that are kept or dropped together."""

    block: int
    ids: int
    dims: list[int]
    score: float  # of an id, for one byte
    row_bytes: int
    kept: int = 0  # of the ids, from the first


def select(
    name: str,
    scores: Mapping[str, Sequence[Scores]],
    budget_bytes: int,
    options: TableOptions,
    *,
    dim_multiple: int,
    least_dims: int = 0,
) -> dict[str, tuple[Block, ...]]:
    """Returns what each table keeps: the chunks worth most for a byte, filled up to a budget.

    A chunk is `dim_multiple` dims of one block, rounded up to what a row of that width takes
    anyway; the best dims of a block make its first chunk. Each table keeps the first chunk of its
    first block, and each block the first ones that make up `least_dims`. All other chunks have to
    pass one threshold. Those that meet it exactly are kept
    for the first of their ids alone, as many as the budget still allows: a share that is the same
    for all of them. So blocks may be split in two, and neighbours that keep the same dims are
    joined.

    Args:
        name: of the method, for messages.
        scores: of each table's blocks in the order of their ids.
        budget_bytes: most bytes, padding included.
        options: how tables are stored.
        dim_multiple: least number of dims in a chunk, but for the last of a block.
        least_dims: number of dims that every block keeps.

    Raises:
        UserError: the budget does not hold the least that all tables keep.
    """
    blocks = {
        table: [_chunks(number, own, options, dim_multiple) for number, own in enumerate(given)]
        for table, given in scores.items()
    }
    chunks = [chunk for of in blocks.values() for block in of for chunk in block]
    firsts = [
        chunk
        for of in blocks.values()
        for number, block in enumerate(of)
        for chunk in block[: max(number == 0, -(-least_dims // options.stored_dim(dim_multiple)))]
    ]
    least = sum(chunk.ids * chunk.row_bytes for chunk in firsts)
    if least > budget_bytes:
        greatest = sum(chunk.ids * chunk.row_bytes for chunk in chunks)
        raise out_of_reach(name, budget_bytes, least, greatest)
    for chunk in firsts:
        chunk.kept = chunk.ids
    left = budget_bytes - least
    rest = sorted((c for c in chunks if not c.kept), key=_rank)
    for _, tied in itertools.groupby(rest, key=_rank):
        group = list(tied)
        wanted = sum(chunk.ids * chunk.row_bytes for chunk in group)
        for chunk in group:
            chunk.kept = chunk.ids if wanted <= left else chunk.ids * left // wanted
        if wanted > left:
            break
        left -= wanted
    return {table: _joined(of) for table, of in blocks.items()}


def _rank(chunk: _Chunk) -> tuple[float, int]:
    return -chunk.score, chunk.block


def _chunks(block: int, scores: Scores, options: TableOptions, dim_multiple: int) -> list[_Chunk]:
    """Returns a block's chunks, the best first."""
    size, values = options.stored_dim(dim_multiple), scores.dims.double()
    order = values.argsort(descending=True, stable=True).tolist()
    chunks = []
    for first in range(0, len(order), size):
        dims = order[first : first + size]
        row_bytes = options.row_bytes(len(dims))
        score = float(values[dims].sum()) / row_bytes
        chunks.append(
            _Chunk(block=block, ids=scores.ids, dims=dims, score=score, row_bytes=row_bytes)
        )
    return chunks


def _joined(blocks: Sequence[Sequence[_Chunk]]) -> tuple[Block, ...]:
    """Returns a table's blocks, split where a chunk is kept in part, joined where equal."""
    found: list[Block] = []
    for chunks in blocks:
        ends = sorted({*(c.kept for c in chunks if c.kept), chunks[0].ids})
        for start, end in itertools.pairwise([0, *ends]):
            dims = tuple(sorted(d for c in chunks if c.kept >= end for d in c.dims))
            if found and found[-1].dims == dims:
                found[-1] = Block(ids=found[-1].ids + end - start, dims=dims)
            else:
                found.append(Block(ids=end - start, dims=dims))
    return tuple(found)
