"""Blocks dropped by their norm and grown by their gradient, while a pool keeps its size.

The update is that of Wang et al., WSDM 2024, after Evci et al., "Rigging the Lottery", ICML 2020.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.bitmap import Bitmap, chunks, draw, pack, unpack
from recsys_compress.compress.blocks import Layout
from recsys_compress.compress.hashing import per_value, salt
from recsys_compress.compress.hook import Hook, LiveTable
from recsys_compress.ranks import Ranks

LAST_RATIO = 0.005
_ROWS = 1 << 16  # rows moved at a time

GrowthKind = Literal["gradient", "random", "static"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When blocks move, and how many.

    Attributes:
        every: steps from one update to the next.
        window: steps before an update whose gradients are summed.
        ratio: share of the blocks that are dropped at first.
        stop: share of training after which there is no further update.
    """

    every: int
    window: int
    ratio: float
    stop: float

    def ratio_at(self, progress: float) -> float:
        """Returns r, which falls to 0.005 along half a cosine until updates stop."""
        share = min(progress / self.stop, 1.0)
        return LAST_RATIO + (self.ratio - LAST_RATIO) * (1 + math.cos(math.pi * share)) / 2


class Gradients:
    """Gradients of the vectors looked up, summed by id over several steps.

    A single batch has gradients of its own ids only. Where more ids are seen than are to be kept,
    those go whose sums are least; so memory is bounded, whatever the number of ids.

    Args:
        layout: of the tables.
        index: the mask of stored blocks; sums are kept on its device, where gradients come.
        most: ids to keep.
    """

    def __init__(self, layout: Layout, index: Bitmap, most: int) -> None:
        self._layout = layout
        self._index = index
        self._most = most
        # None at first: the mask is made before it is known on which device it will be.
        self.parts: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Forgets all sums."""
        dim = self._layout.width * self._layout.block
        self.load([(torch.empty(0, dtype=torch.int64), torch.empty(0, dim))])

    def load(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replaces all sums by (N,) numbers of ids and their (N, D) sums, on any device."""
        device = self._index.words.device
        self.parts = [(ids.to(device), sums.to(device)) for ids, sums in parts]

    def add(self, features: KeyedJaggedTensor, vectors: list[Tensor]) -> None:
        """Adds what one backward pass says.

        Args:
            features: the tables' F features.
            vectors: F gradients of their pooled vectors, (B, D) each.
        """
        rows = torch.stack(vectors).flatten(0, 1)
        lengths, weights = features.lengths(), features.weights_or_none()
        averaged = torch.tensor(self._layout.averaged, device=rows.device)
        if averaged.any():
            shares = lengths.view(len(averaged), -1).clamp(min=1).reciprocal()
            rows = rows * torch.where(averaged[:, None], shares, 1.0).view(-1, 1)
        if len(features.values()) != len(rows) or not bool((lengths == 1).all()):
            bags = torch.arange(len(rows), device=rows.device)
            rows = rows[torch.repeat_interleave(bags, lengths.long())]
        if weights is not None:
            rows = rows * weights[:, None]
        rows = rows / Ranks.current().size
        per_key = features.length_per_key()
        ids = per_value(self._layout.first_ids, per_key, rows.device).add_(features.values())
        if not self.parts:
            self.clear()
        self.parts.append((ids, rows))
        pending = sum(len(ids) for ids, _ in self.parts[1:])
        if 2 * pending > len(self.parts[0][0]):
            self.merge()

    def merge(self) -> tuple[Tensor, Tensor]:
        """Returns the (U,) numbers of the ids seen, rising, and their (U, D) sums."""
        if not self.parts:
            self.clear()
        ids, numbers = torch.unique(torch.cat([i for i, _ in self.parts]), return_inverse=True)
        sums = self.parts[0][1].new_zeros(len(ids), self.parts[0][1].shape[1])
        for part in numbers.split([len(i) for i, _ in self.parts]):
            sums.index_add_(0, part, self.parts.pop(0)[1])
        if len(ids) > self._most:
            kept = smallest(-torch.linalg.vector_norm(sums, dim=1).cpu(), self._most)
            ids, sums = ids[kept], sums[kept]
        self.parts = [(ids, sums)]
        return ids, sums

    def gather(self) -> None:
        """Adds up the sums of all processes, after which each has them all."""
        ranks = Ranks.current()
        if ranks.size > 1:
            ids, sums = self.merge()
            self.parts = [(ranks.concat(ids), ranks.concat(sums))]
            self.merge()

    def share(self) -> None:
        """Leaves what all processes have alike to the first one, so that it counts once."""
        if not Ranks.current().first:
            self.clear()

    def norms(self) -> tuple[Tensor, Tensor]:
        """Returns the (N,) blocks with a gradient, rising, and its (N,) norms."""
        ids, sums = self.merge()
        norms = torch.linalg.vector_norm(
            sums.view(len(ids), self._layout.width, self._layout.block), dim=2
        )
        seen = norms > 0
        steps = torch.arange(self._layout.width, device=ids.device)
        return (ids[:, None] * self._layout.width + steps)[seen], norms[seen]


class Growing(Hook):
    """Moves blocks every so many steps; see `DynamicSparse`.

    Of S blocks stored in a span, the ceil(r S) of least norm are dropped, or as many as there are
    others to grow. Those grown are the ones of greatest gradient, or random ones, among all that
    are then zero. One just dropped may be among them and keeps its values, as in the published
    code: the paper's regret. All others begin at zero, with an optimizer that has seen nothing.

    Args:
        layout: of the tables.
        index: the mask of stored blocks.
        schedule: when, and how many.
        random: whether to grow blocks at random, not by gradient.
        spans: bits within which the number of blocks is kept.
        table: the pool's name.
        seed: of random growth.
        most_ids: whose gradients are kept.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        index: Bitmap,
        schedule: Schedule,
        random: bool,
        spans: Sequence[tuple[int, int]],
        table: str,
        seed: int,
        most_ids: int,
    ) -> None:
        self._layout = layout
        self._index = index
        self._schedule = schedule
        self._random = random
        self._spans = list(spans)
        self._table = table
        self._seed = seed
        self._live: Callable[[str], LiveTable] | None = None
        self._gradients = Gradients(layout, index, most_ids)
        self._steps = 0
        self._progress = 0.0

    def bind(self, table: Callable[[str], LiveTable]) -> None:
        """Keeps access to the pool."""
        self._live = table

    def looked_up(self, features: KeyedJaggedTensor, vectors: KeyedTensor) -> None:
        """Has the batch's gradients summed, where an update is near."""
        every, window = self._schedule.every, self._schedule.window
        near = self._steps % every >= every - window and self._progress < self._schedule.stop
        if self._random or not near:
            return
        keys, names = features.keys(), self._layout.features
        own = features if keys == list(names) else features.permute([keys.index(n) for n in names])
        widths = vectors.length_per_key()
        columns = [vectors.keys().index(name) for name in names]

        def add(gradient: Tensor) -> None:
            parts = torch.split(gradient, widths, dim=1)
            self._gradients.add(own, [parts[column] for column in columns])

        vectors.values().register_hook(add)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def on_step(self, progress: float) -> None:
        """Counts the step, and moves blocks if it is time."""
        self._steps += 1
        self._progress = progress
        if self._steps % self._schedule.every:
            return
        if progress <= self._schedule.stop:
            self._update(self._schedule.ratio_at(progress))
        self._gradients.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the step, and what of the window has been summed."""
        self._gradients.gather()
        state = {
            "steps": torch.tensor(self._steps),
            "progress": torch.tensor(self._progress).double(),
        }
        for number, (ids, sums) in enumerate(self._gradients.parts):
            state |= {f"ids.{number}": ids, f"sums.{number}": sums}
        self._gradients.share()
        return state

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self._steps = int(tensors["steps"])
        self._progress = float(tensors["progress"])
        count = sum(name.startswith("ids.") for name in tensors)
        self._gradients.load(
            [(tensors[f"ids.{number}"], tensors[f"sums.{number}"]) for number in range(count)]
        )
        self._gradients.share()

    def _update(self, ratio: float) -> None:
        if self._live is None:
            raise RuntimeError(f"nothing was bound to the hook of table {self._table!r}")
        self._gradients.merge()  # before other memory is taken
        self._gradients.gather()
        live = self._live(self._table)
        norms = torch.linalg.vector_norm(live.weight[:, : self._layout.block], dim=1)
        if live.bounds:
            norms = Ranks.current().concat(norms)
        new = self._moved(norms.cpu(), ratio)
        stays, fresh = _changes(self._index.words, new)
        for tensor in (live.weight, *_state_by_row(live)):
            if live.bounds:
                relocate_sharded(tensor, stays, fresh, live.bounds)
            else:
                _relocate(tensor, stays, fresh)
        self._index.fill(new)

    def _moved(self, norms: Tensor, ratio: float) -> Tensor:
        """Returns the words of the mask after an update.

        Args:
            norms: (P,) of the stored blocks, on the CPU like all here but the mask.
            ratio: share of them to drop.
        """
        index, dropped = self._index, torch.zeros(len(norms), dtype=torch.bool)
        device = index.words.device
        blocks, gradients = (values.cpu() for values in self._gradients.norms())
        grown, counts = [], []
        for first, last in self._spans:
            begin, end = index.rank(torch.tensor([first, last], device=device)).tolist()
            count = math.ceil(ratio * (end - begin))
            if self._random:
                count = min(count, last - first - (end - begin))
                dropped[begin:end] = smallest(norms[begin:end], count)
            else:
                low, high = torch.searchsorted(blocks, torch.tensor([first, last])).tolist()
                seen, strengths = blocks[low:high], gradients[low:high]
                stored = index.test(seen.to(device)).cpu()
                count = min(count, int((~stored).sum()))
                dropped[begin:end] = smallest(norms[begin:end], count)
                zero = ~stored
                zero[stored] = dropped[index.rank(seen[stored].to(device)).cpu()]
                grown.append(seen[zero][smallest(-strengths[zero], count)])
            counts.append(count)
        words = _without(index.words, dropped)
        if self._random:
            generator = torch.Generator().manual_seed(salt("grow", self._steps, self._seed))
            for (first, last), count in zip(self._spans, counts, strict=True):
                words |= draw(words, first, last, count, generator)
        else:
            added = torch.cat(grown)
            words.index_add_(0, added >> 6, 1 << (added & 63))
        return words


def smallest(values: Tensor, count: int) -> Tensor:
    """Returns which of (N,) values are the `count` smallest; of equal ones the first."""
    if count == 0:
        return torch.zeros(len(values), dtype=torch.bool)
    bound = float(np.partition(values.numpy(), count - 1)[count - 1])
    chosen = values < bound
    equal = (values == bound).nonzero().squeeze(1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen


def _without(words: Tensor, dropped: Tensor) -> Tensor:
    """Returns the words of a mask without those of its ones that are dropped."""
    words, left = words.cpu(), (~dropped).numpy()
    kept, row = torch.zeros_like(words), 0
    for part in chunks(words):
        stored = unpack(words[part]).numpy()  # whose indexing by booleans is the faster one
        bits, count = np.zeros_like(stored), int(stored.sum())
        bits[stored] = left[row : row + count]
        kept[part] = pack(torch.from_numpy(bits))
        row += count
    return kept


def _changes(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which ones of the old mask stay, and which of the new one were not there."""
    stays, fresh = [], []
    for part in chunks(old):
        before, after = unpack(old[part]).numpy(), unpack(new[part]).numpy()
        stays.append(after[before])
        fresh.append(~before[after])
    return torch.from_numpy(np.concatenate(stays)), torch.from_numpy(np.concatenate(fresh))


def _relocate(tensor: Tensor, stays: Tensor, fresh: Tensor) -> None:
    """Moves rows in place to where a new mask has them, in order, and zeroes the fresh ones.

    Rows that stay are first closed up towards the front, then spread out from the back; so a
    buffer of a few rows is enough, and memory that a kernel holds is not replaced.

    Args:
        tensor: (P, ...).
        stays: (P,) which rows stay.
        fresh: (P,) which rows of the result are new; as many as do not stay.
    """
    starts, end = range(0, len(tensor), _ROWS), 0
    for start in starts:
        rows = tensor[start : start + _ROWS][stays[start : start + _ROWS]]
        tensor[end : end + len(rows)] = rows
        end += len(rows)
    for start in reversed(starts):
        rows = tensor.new_zeros(tensor[start : start + _ROWS].shape)
        kept = ~fresh[start : start + _ROWS]
        count = int(kept.sum())
        rows[kept] = tensor[end - count : end]
        tensor[start : start + _ROWS] = rows
        end -= count


def _state_by_row(live: LiveTable) -> list[Tensor]:
    """Returns the state that has a row for each row of the table; all processes as many tensors."""
    found = {n: s for n, s in live.state.items() if s.ndim and len(s) == len(live.weight)}
    # A process without rows may have no state either.
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs in Ranks.current().gather({n: tuple(s.shape[1:]) for n, s in found.items()}):
        shapes |= theirs
    return [found.get(n, live.weight.new_empty(0, *shapes[n])) for n in sorted(shapes)]


def relocate_sharded(
    tensor: Tensor, stays: Tensor, fresh: Tensor, bounds: Sequence[tuple[int, int]]
) -> None:
    """Does what `_relocate` does to rows that are spread over processes.

    Args:
        tensor: the rows that are here.
        stays: as for `_relocate`, of all rows.
        fresh: as for `_relocate`, of all rows.
        bounds: first and last + 1 of each process's rows, in the order of the processes.
    """
    ranks = Ranks.current()
    # The k-th row that stays becomes the k-th that is not fresh: who has it, and who gets it.
    ends = torch.tensor([(first, last) for first, last in bounds]).t()
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])
    had = counts[ends]
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), (~fresh).cumsum(0)])
    gets = counts[ends]
    shared = (
        torch.minimum(had[1][:, None], gets[1]) - torch.maximum(had[0][:, None], gets[0])
    ).clamp(min=0)
    first, last = bounds[ranks.rank]
    moved = ranks.exchange(
        tensor[stays[first:last].to(tensor.device)],
        shared[ranks.rank].tolist(),
        shared[:, ranks.rank].tolist(),
    )
    tensor.zero_()
    tensor[~fresh[first:last].to(tensor.device)] = moved
