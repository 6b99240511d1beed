"""Batches of a prepared dataset: sharded by rank, shuffled, deterministic, resumable.

The order of an epoch is a function of (seed, epoch, streams) alone, whatever the number of ranks.
Row groups are shuffled by (seed, epoch). Their sequence is cut into equal, contiguous streams; each
stream is cut into buffers, and each buffer permuted. A batch over all ranks takes the next rows of
every stream, and each rank takes its share of that batch; with as many streams as ranks that is its
own stream, and it reads nothing else. Any batch is found without reading those before it.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

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
        batch_size: rows per batch, over all ranks.
        seed: of the order.
        shuffle: whether rows come in random order; else as stored.
        rank: which share of each batch; shares of one batch are of one size, padding included.
        world_size: number of shares.
        streams: from how many places of the data a batch is put together; None for one a rank.
        buffer_rows: rows of a stream permuted together; two such buffers are in memory at a time.

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
        streams: int | None = None,
        buffer_rows: int = 500_000,
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
        self._world_size = world_size
        self._streams = world_size if streams is None else streams
        self._rows = dataset.rows(split)
        self._buffer_rows = buffer_rows
        self._maker = _BatchMaker(self._shards)
        self._position = (0, 0)

    def __len__(self) -> int:
        """Returns the number of batches per epoch, which is that of every rank."""
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
        sequence = self._sequence(epoch)
        opened: dict[int, Iterator[tuple[Rows, Positions]]] = {}
        for step in range(start, len(self)):
            total = self._total(step)
            own = _share(total, self._rank, self._world_size)
            parts = []
            for stream in _sharers(own, total, self._streams):
                theirs = _share(total, stream, self._streams)
                if stream not in opened:
                    opened[stream] = self._stream(epoch, stream, sequence, step)
                rows, positions = next(opened[stream])
                first, last = max(own.start, theirs.start), min(own.stop, theirs.stop)
                parts.append((rows, positions[first - theirs.start : last - theirs.start]))
            rows, positions = parts[0] if len(parts) == 1 else self._shards.joined(parts)
            padding = -(-total // self._world_size) - len(own)
            yield self._maker.make(rows, positions, padding=padding, total=total)

    def _total(self, step: int) -> int:
        """Returns the rows of a batch over all ranks."""
        return min(self._batch_size, self._rows - step * self._batch_size)

    def _stream(
        self, epoch: int, stream: int, sequence: tuple[Positions, Positions], start: int
    ) -> Iterator[tuple[Rows, Positions]]:
        """Yields a stream's part of each batch from batch `start` on: where its rows are."""
        size = len(_share(self._batch_size, stream, self._streams))
        steps = max(1, self._buffer_rows // size)  # of a buffer
        buffers = range(start // steps, -(-len(self) // steps))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as executor:

            def read(buffer: int) -> Future[Rows]:
                return executor.submit(self._read, sequence, *self._extent(stream, buffer, steps))

            ahead = [read(buffer) for buffer in buffers[:1]]
            for buffer in buffers:
                rows = ahead.pop().result()
                if buffer + 1 in buffers:
                    ahead.append(read(buffer + 1))
                permutation = self._permutation(epoch, stream, buffer, len(rows))
                skipped = max(0, start - buffer * steps) * size
                for first in range(skipped, len(rows), size):
                    yield rows, permutation[first : first + size]

    def _extent(self, stream: int, buffer: int, steps: int) -> tuple[int, int]:
        """Returns first and last + 1 of a buffer's rows in the epoch's sequence."""
        whole, rest = divmod(self._rows, self._batch_size)
        each = _share(self._batch_size, stream, self._streams)
        last = _share(rest, stream, self._streams)
        first = whole * each.start + last.start + buffer * steps * len(each)
        return first, min(first + steps * len(each), whole * each.stop + last.stop)

    def _sequence(self, epoch: int) -> tuple[Positions, Positions]:
        """Returns the row groups in the order of an epoch, and where each ends, in rows."""
        sizes = self._shards.group_rows
        order = np.arange(len(sizes))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(sizes))
        return order, np.cumsum(sizes[order])

    def _permutation(self, epoch: int, stream: int, buffer: int, rows: int) -> Positions:
        if not self._shuffle:
            return np.arange(rows)
        return np.random.default_rng([self._seed, epoch, stream, buffer]).permutation(rows)

    def _read(self, sequence: tuple[Positions, Positions], first: int, last: int) -> Rows:
        """Reads a range of rows of the epoch's sequence of row groups."""
        order, ends = sequence
        if first >= last:
            return self._shards.read([])
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


def _share(rows: int, number: int, count: int) -> range:
    """Returns which of a batch's rows are share `number` of `count`; the first ones have one more.

    The share of a smaller batch is never larger: what a stream has for a batch is enough.
    """
    size, longer = divmod(rows, count)
    start = number * size + min(number, longer)
    return range(start, start + size + (number < longer))


def _sharers(own: range, rows: int, count: int) -> range:
    """Returns which of the `count` shares of a batch's rows have some of `own`."""
    if not own:
        return range(0)
    size, longer = divmod(rows, count)

    def sharer(row: int) -> int:
        within = row // (size + 1)  # as if all had one more
        return within if within < longer else (row - longer) // size

    return range(sharer(own.start), sharer(own.stop - 1) + 1)


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

    def make(self, rows: Rows, positions: Positions, *, padding: int, total: int) -> Batch:
        """Returns the batch of the rows at `positions`, shape (B,), and of padding below them."""
        taken = np.take(rows.single, positions, axis=0)
        single = taken.T.astype(np.int64, order="C")
        if len(self._single) == len(self._fields) and not padding:
            sparse = self._one_id_each(torch.from_numpy(single))
        else:
            sparse = self._bags(rows, torch.from_numpy(single), positions, padding)
        weights = None if rows.weights is None else torch.from_numpy(rows.weights[positions])
        if padding:
            weights = torch.ones(len(positions)) if weights is None else weights
        return Batch(
            dense=_padded(torch.from_numpy(np.take(rows.dense, positions, axis=0)), padding),
            sparse=sparse,
            labels=_padded(torch.from_numpy(np.take(rows.labels, positions)), padding),
            weights=None if weights is None else _padded(weights, padding),
            padding=padding,
            total=total,
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

    def _bags(
        self, rows: Rows, single: Tensor, positions: Positions, padding: int
    ) -> KeyedJaggedTensor:
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
            lengths=torch.cat([_padded(of_key, padding) for of_key in lengths]),
            stride=size + padding,
            length_per_key=[len(ids) for ids in values],
        )


def _padded(values: Tensor, padding: int) -> Tensor:
    """Returns (N, ...) values with rows of zeros below them."""
    return torch.cat([values, values.new_zeros(padding, *values.shape[1:])]) if padding else values


def _gather(bags: Jagged, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values, lengths (B,) and weights (ones where there are none) of the bags chosen."""
    taken = bags.take(positions)
    values = torch.from_numpy(taken.values.astype(np.int64, copy=False))
    weights = torch.ones(len(values)) if taken.weights is None else torch.from_numpy(taken.weights)
    return values, torch.from_numpy(np.diff(taken.offsets)), weights
