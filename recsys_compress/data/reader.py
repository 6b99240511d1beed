"""Batches of a prepared dataset: sharded by rank, shuffled, deterministic, resumable.

The order of an epoch is a function of (seed, epoch, rank) alone. Row groups are shuffled by
(seed, epoch); each rank takes an equal, contiguous range of rows of that sequence, cuts it into
buffers of whole batches and permutes each buffer. So any batch is found without reading those
before it.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.shards import Jagged, Piece, Rows, Shards
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError

Positions = npt.NDArray[np.int64]


class Reader:
    """Reads one split of a prepared dataset in batches.

    Iterating yields what is left of the current epoch, then moves on to the next; `epoch(n)`
    yields any epoch and leaves the position alone.

    Args:
        dataset: the prepared dataset.
        split: "train", "valid" or "test".
        batch_size: rows per batch of this rank.
        seed: of the order.
        shuffle: whether rows come in random order; else as stored.
        rank: which share of the rows.
        world_size: number of shares; they differ by one row at most.
        buffer_rows: rows permuted together; two such buffers are in memory at a time.
        drop_last: whether the last batch is left out where it is not whole; every rank then has
            the same number of batches.

    Raises:
        UserError: a shard cannot be read, or a setting is not valid.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        buffer_rows: int = 500_000,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank}: must lie in [0, {world_size})")
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        self._shards = Shards(dataset, split)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        total = dataset.rows(split)
        self._start = total * rank // world_size
        self._rows = total * (rank + 1) // world_size - self._start
        if drop_last:
            self._rows = total // world_size // batch_size * batch_size
        self._buffer_batches = max(1, buffer_rows // batch_size)
        self._maker = _BatchMaker(self._shards)
        self._position = (0, 0)

    def __len__(self) -> int:
        """Returns the number of batches per epoch of this rank."""
        return -(-self._rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches left of the current epoch, keeping the position."""
        epoch, start = self._position
        for index, batch in enumerate(self.epoch(epoch, start=start), start=start + 1):
            self._position = (epoch, index)
            yield batch
        self._position = (epoch + 1, 0)

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the epoch, and the batches of it already yielded."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a position: iterating yields the very batches that were left there."""
        self._position = (state["epoch"], state["batch"])

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from batch `start` on.

        Raises:
            UserError: a shard cannot be read, or holds an id that its field does not have.
        """
        order, ends = self._sequence(epoch)
        buffers = range(start // self._buffer_batches, -(-len(self) // self._buffer_batches))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as executor:
            ahead = [executor.submit(self._read, order, ends, b) for b in buffers[:1]]
            for buffer in buffers:
                rows = ahead.pop().result()
                if buffer + 1 in buffers:
                    ahead.append(executor.submit(self._read, order, ends, buffer + 1))
                permutation = self._permutation(epoch, buffer, len(rows))
                skipped = max(0, start - buffer * self._buffer_batches) * self._batch_size
                for first in range(skipped, len(rows), self._batch_size):
                    yield self._maker.make(rows, permutation[first : first + self._batch_size])

    def _sequence(self, epoch: int) -> tuple[Positions, Positions]:
        """Returns the row groups in the order of an epoch, and where each ends, in rows."""
        sizes = self._shards.group_rows
        order = np.arange(len(sizes))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(sizes))
        return order, np.cumsum(sizes[order])

    def _permutation(self, epoch: int, buffer: int, rows: int) -> Positions:
        if not self._shuffle:
            return np.arange(rows)
        return np.random.default_rng([self._seed, epoch, self._rank, buffer]).permutation(rows)

    def _read(self, order: Positions, ends: Positions, buffer: int) -> Rows:
        """Reads one buffer: a range of rows of the epoch's sequence of row groups."""
        size = self._buffer_batches * self._batch_size
        first = self._start + buffer * size
        last = min(first + size, self._start + self._rows)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        return self._shards.read(
            [
                Piece(
                    group=int(order[i]),
                    start=int(max(first - (ends[i] - self._shards.group_rows[order[i]]), 0)),
                    stop=int(min(last, ends[i]) - (ends[i] - self._shards.group_rows[order[i]])),
                )
                for i in range(begin, end + 1)
            ]
        )


class _BatchMaker:
    """Makes batches out of rows in memory."""

    def __init__(self, shards: Shards) -> None:
        self._fields = shards.schema.categorical
        self._keys = [field.name for field in self._fields]
        self._single = {
            field.name: index
            for index, field in enumerate(f for f in self._fields if not f.multi_valued)
        }
        self._any_weighted = any(field.weighted for field in self._fields)
        self._ones: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def make(self, rows: Rows, positions: Positions) -> Batch:
        """Returns the batch of the rows at `positions`, shape (B,)."""
        taken = np.take(rows.single, positions, axis=0)
        single = taken.T.astype(np.int64, order="C")
        if len(self._single) == len(self._fields):
            sparse = self._one_id_each(torch.from_numpy(single))
        else:
            sparse = self._bags(rows, torch.from_numpy(single), positions)
        return Batch(
            dense=torch.from_numpy(np.take(rows.dense, positions, axis=0)),
            sparse=sparse,
            labels=torch.from_numpy(np.take(rows.labels, positions)),
            weights=None
            if rows.weights is None
            else torch.from_numpy(np.take(rows.weights, positions)),
        )

    def _one_id_each(self, ids: Tensor) -> KeyedJaggedTensor:
        """Returns ids (F, B) as bags of one; KJT values are key-major, so this copies nothing."""
        features, size = ids.shape
        if len(self._ones[0]) != ids.numel():
            lengths = torch.ones(ids.numel(), dtype=torch.int64)
            self._ones = (lengths, torch.arange(ids.numel() + 1))
        lengths, offsets = self._ones
        return KeyedJaggedTensor(
            keys=self._keys,
            values=ids.view(-1),
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=[size] * features,
            offset_per_key=[size * feature for feature in range(features + 1)],
        )

    def _bags(self, rows: Rows, single: Tensor, positions: Positions) -> KeyedJaggedTensor:
        size = len(positions)
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        weights: list[Tensor] = []
        for name in self._keys:
            if name in self._single:
                values.append(single[self._single[name]])
                lengths.append(torch.ones(size, dtype=torch.int64))
                weights.append(torch.ones(size) if self._any_weighted else torch.empty(0))
            else:
                bag_values, bag_lengths, bag_weights = _gather(rows.jagged[name], positions)
                values.append(bag_values)
                lengths.append(bag_lengths)
                weights.append(bag_weights if self._any_weighted else torch.empty(0))
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat(values),
            weights=torch.cat(weights) if self._any_weighted else None,
            lengths=torch.cat(lengths),
            stride=size,
            length_per_key=[len(ids) for ids in values],
        )


def _gather(bags: Jagged, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values, lengths (B,) and weights (ones where there are none) of the bags chosen."""
    starts = bags.offsets[positions]
    lengths = bags.offsets[positions + 1] - starts
    ends = np.cumsum(lengths)
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    values = torch.from_numpy(bags.values[index].astype(np.int64, copy=False))
    weights = (
        torch.ones(len(index)) if bags.weights is None else torch.from_numpy(bags.weights[index])
    )
    return values, torch.from_numpy(lengths), weights
