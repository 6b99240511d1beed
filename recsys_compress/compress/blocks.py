"""All tables as one row of blocks, of which only some exist: a mask says which, its ranks where."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.bitmap import Bitmap
from recsys_compress.compress.hashing import along_keys, check_range, per_value

MAX_WIDTH = 64  # blocks of one id, which are read as one word


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The blocks of all tables in the order of (table, id, position in the vector).

    Attributes:
        features: (F,) names.
        first_ids: (F,) number of ids in the tables before the feature's.
        sizes: (F,) ids of the feature's table.
        averaged: (F,) whether the feature's bags are averaged.
        ends: (T + 1,) first block of each table, and the number of all blocks.
        width: blocks of one id.
        block: values of one block.
    """

    features: tuple[str, ...]
    first_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    averaged: tuple[bool, ...]
    ends: tuple[int, ...]
    width: int
    block: int

    @staticmethod
    def of(tables: Sequence[EmbeddingBagConfig], block: int) -> "Layout":
        """Returns the layout of tables of one width, a multiple of `block`."""
        width = tables[0].embedding_dim // block
        first_ids = [0]
        for table in tables:
            first_ids.append(first_ids[-1] + table.num_embeddings)
        by_feature = [
            (feature, table, first)
            for table, first in zip(tables, first_ids[:-1], strict=True)
            for feature in table.feature_names
        ]
        return Layout(
            features=tuple(feature for feature, _, _ in by_feature),
            first_ids=tuple(first for _, _, first in by_feature),
            sizes=tuple(table.num_embeddings for _, table, _ in by_feature),
            averaged=tuple(table.pooling == PoolingType.MEAN for _, table, _ in by_feature),
            ends=tuple(first * width for first in first_ids),
            width=width,
            block=block,
        )

    @property
    def total(self) -> int:
        """Blocks of all tables, stored or not."""
        return self.ends[-1]


class BlockIds(nn.Module):
    """Ids to the rows of their stored blocks: a look-up for each feature and block of its vector.

    A bag of the look-up of block j holds, of the ids in the feature's bag, those whose block j is
    stored. The row of a block is the number of stored blocks before it.

    Args:
        layout: of the tables.
        index: the mask of stored blocks, of `layout.total` bits.
    """

    def __init__(self, layout: Layout, index: Bitmap) -> None:
        super().__init__()
        self.index = index
        self._layout = layout
        width = layout.width
        self.names = [f"{feature}#{j}" for feature in layout.features for j in range(width)]
        self._source = [i for i in range(len(layout.features)) for _ in range(width)]
        self._firsts = tuple(layout.first_ids[i] for i in self._source)
        self._steps = tuple(range(width)) * len(layout.features)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the F x width look-ups' bags.

        Raises:
            ValueError: an id lies outside its table.
        """
        layout, lengths = self._layout, features.lengths()
        check_range(features.values(), layout.sizes, features.length_per_key(), layout.features)
        single = 0 < len(lengths) == len(features.values()) and bool((lengths == 1).all())
        return self._one_each(features) if single else self._bags(features)

    def _one_each(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the look-ups for one id a bag: all of them lie in one (F, width, B) array."""
        ids, firsts = along_keys(
            features.values().long(), self._layout.first_ids, features.length_per_key()
        )
        width = self._layout.width
        steps = torch.arange(width, device=ids.device).unsqueeze(1)
        positions = (ids + firsts).mul_(width).unsqueeze(1)
        stored = self.index.read(positions, width).bitwise_and(1 << steps).bool()
        found = stored.view(-1).nonzero().squeeze(1)
        weights = features.weights_or_none()
        if weights is not None:
            weights = weights.view(len(ids), 1, -1).expand_as(stored).reshape(-1)[found]
        lengths = stored.view(-1).to(features.lengths().dtype)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        # The blocks of an id lie side by side, so one rank an id is enough.
        rows = stored.cumsum(1).add_(self.index.rank(positions) - 1).view(-1)
        return self._lookups(rows.index_select(0, found), weights, lengths, offsets)

    def _bags(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the look-ups for bags of any length."""
        repeated = features.permute(self._source)
        ids, per_key = repeated.values().long(), repeated.length_per_key()
        positions = per_value(self._firsts, per_key, ids.device).add_(ids)
        positions.mul_(self._layout.width).add_(per_value(self._steps, per_key, ids.device))
        stored = self.index.test(positions)
        weights = repeated.weights_or_none()
        before = torch.ops.fbgemm.asynchronous_complete_cumsum(stored.long())
        offsets = before[repeated.offsets().long()]
        lengths = offsets.diff().to(features.lengths().dtype)
        weights = None if weights is None else weights[stored]
        return self._lookups(self.index.rank(positions[stored]), weights, lengths, offsets)

    def _lookups(
        self, rows: Tensor, weights: Tensor | None, lengths: Tensor, offsets: Tensor
    ) -> KeyedJaggedTensor:
        stride = len(lengths) // len(self.names)
        return KeyedJaggedTensor(
            keys=self.names,
            values=rows,
            weights=weights,
            lengths=lengths,
            offsets=offsets,
            stride=stride,
            length_per_key=offsets[::stride].diff().tolist() if stride else [0] * len(self.names),
        )
