"""What a table's ids say about the label, from the training data alone.

The information of an id's label, less that of random labels on ids of the same counts, is what is
not an effect of many rare ids. Source: the noise baseline of OutRank, outbrain/outrank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from recsys_compress.compress.lowering import Lowering
from recsys_compress.compress.reads import rows_read
from recsys_compress.data.dataset import PreparedDataset, read_table

_DRAWS = 4  # of random labels
_DECAY = 3.0  # of the principal components of trained vectors, as found on MovieLens-1M
_SAMPLE = 1_000_000  # rows on which fields are compared
_DETERMINED = 0.99  # share of occurrences from which on a field is a function of another
_REPEATS = 5  # occurrences of an id, on average, before that means anything
_REST = 0.05  # share of its information that a determined field is left with

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LabelCounts:
    """How often each id of a field occurs, and how often with which label, real and random.

    Each example counts once, whatever its weight.

    Attributes:
        ids: (n,) that occur in the training split, by falling count behind the reserved two.
        counts: (n,) occurrences.
        positives: (1 + draws, n) occurrences with label 1; the first row is real.
        rows: of the training split.
        share: of the information that no other field holds; see `redundancy`.
    """

    ids: npt.NDArray[np.int64]
    counts: Floats
    positives: Floats
    rows: int
    share: float = 1.0

    @staticmethod
    def of(dataset: PreparedDataset, field: str, seed: int = 0) -> "LabelCounts":
        """Counts a field's ids in the training split."""
        ids, counts = dataset.id_counts(field)
        order = np.argsort(ids, kind="stable")
        positives = np.zeros(len(ids))
        for path in dataset.files("train"):
            table = read_table(path, [field, dataset.schema.label])
            column = table[field].combine_chunks()
            labels = table[dataset.schema.label].to_numpy()
            if pa.types.is_list(column.type):
                labels = np.repeat(labels, column.value_lengths().to_numpy())
                column = column.flatten()
            slots = order[np.searchsorted(ids, column.to_numpy(), sorter=order)]
            positives += np.bincount(slots, weights=labels, minlength=len(ids))
        generator = np.random.default_rng(seed)
        rate = positives.sum() / max(counts.sum(), 1)
        random = generator.binomial(counts.astype(np.int64), rate, size=(_DRAWS, len(ids)))
        return LabelCounts(
            ids=ids,
            counts=counts.astype(np.float64),
            positives=np.vstack([positives, random]),
            rows=dataset.rows("train"),
        )

    def information(self) -> tuple[float, float]:
        """Returns nats an example that the ids say about the label, and their standard error."""
        return self.lost(None)

    def lost(
        self, kept: "Kept | None", masses: Mapping[str, Floats] | None = None
    ) -> tuple[float, float]:
        """Returns nats an example that are lost where ids share rows, and the standard error.

        Args:
            kept: how ids read rows; None where they read none.
            masses: by physical table, how often each row is read by all fields; None where no other
                field reads them.
        """
        whole = self._divergence(np.zeros(len(self.ids), dtype=np.int64))
        if kept is not None:
            # Look-ups are independent noisy readings of an id: signal over noise adds up.
            clear = np.zeros_like(whole)
            for table, who, rows in kept.reads:
                cells = np.full(len(self.ids), -1)
                cells[who] = rows
                noise = np.minimum(self._divergence(cells) / np.maximum(whole, 1e-300), 1.0)[:, who]
                if masses is not None:  # what other fields put into the rows is noise too
                    own = np.bincount(rows, self.counts[who], len(masses[table]))
                    noise = 1 - (1 - noise) * (own / np.maximum(masses[table], 1))[rows]
                with np.errstate(divide="ignore"):
                    clear[:, who] += (1 - noise) / noise
            share = 1 / (1 + clear)
            whole = whole * (share + (1 - share) * kept.narrowness)
        totals = whole.sum(axis=1)
        random = totals[1:]
        return max(float(totals[0] - random.mean()), 0.0), float(random.std())

    def kept(self, lowering: Lowering, feature: str, dim: int) -> "Kept":
        """Returns how ids read rows under a lowering.

        Args:
            lowering: of the feature's table.
            feature: the feature.
            dim: width D of its vectors.
        """
        widths = {table.name: table.embedding_dim for table in lowering.tables}
        dims = np.zeros(len(self.ids))
        reads = []
        for lookup, who, rows in rows_read(lowering, feature, _tensor(self.ids)):
            reads.append((lookup.table, who.numpy(), rows.numpy()))
            dims[who.numpy()] += widths[lookup.table]
        return Kept(reads=reads, narrowness=_cut(dim)[np.minimum(dims, dim).astype(np.int64)])

    def _divergence(self, cells: npt.NDArray[np.int64]) -> Floats:
        """Returns (1 + draws, n): count / rows * KL(label given the id || label given its cell).

        Its sum is the information that is lost where ids of one cell are told apart no more.
        """
        _, cell = np.unique(cells, return_inverse=True)
        sums = np.stack([np.bincount(cell, weights=row) for row in self.positives])
        totals = np.bincount(cell, weights=self.counts)
        counts = np.maximum(self.counts, 1)
        own = self.positives / counts
        mean = (sums / np.maximum(totals, 1))[:, cell]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(own > 0, own * np.log(own / mean), 0.0)
            found += np.where(own < 1, (1 - own) * np.log((1 - own) / (1 - mean)), 0.0)
        found[:, self.counts == 0] = 0
        return self.share * np.maximum(found, 0.0) * self.counts / self.rows


def redundancy(dataset: PreparedDataset, fields: Sequence[str]) -> dict[str, str]:
    """Returns the fields that are functions of another one, with that one.

    A user's zip code says nothing that the user's id does not. Chains end at a field that is not
    itself in the result.

    Args:
        dataset: the data; up to a million of its training rows are looked at.
        fields: single-valued categorical fields.
    """
    table = pa.concat_tables(read_table(path, list(fields)) for path in dataset.files("train"))
    columns = {
        name: np.unique(table[name].slice(0, _SAMPLE).to_numpy(), return_inverse=True)
        for name in fields
    }
    by_size = sorted(fields, key=lambda name: -len(columns[name][0]))
    found: dict[str, str] = {}
    for position, name in enumerate(by_size):
        for other in by_size[:position]:
            ids, codes = columns[other]
            if other in found or len(codes) < _REPEATS * len(ids):
                continue
            own = columns[name]
            pairs, counts = np.unique(codes * len(own[0]) + own[1], return_counts=True)
            most = np.zeros(len(ids))
            np.maximum.at(most, pairs // len(own[0]), counts)
            if most.sum() >= _DETERMINED * len(codes):
                found[name] = other
                break
    return found


def label_counts(dataset: PreparedDataset, fields: Sequence[str]) -> dict[str, LabelCounts]:
    """Returns the counts of all fields, with what others hold of them."""
    single = [name for name in fields if not dataset.field(name).multi_valued]
    redundant = redundancy(dataset, single) if single else {}
    return {
        name: replace(LabelCounts.of(dataset, name), share=_REST if name in redundant else 1.0)
        for name in fields
    }


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How the ids of a table read rows.

    Attributes:
        reads: for each look-up its physical table, the positions of the ids that read it, and their
            rows.
        narrowness: (n,) share of what an id says that its width cannot hold.
    """

    reads: list[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    narrowness: Floats


def _cut(dim: int) -> Floats:
    """Returns (D + 1,) the share that widths 0, ..., D cannot hold: component j weighs j**-3."""
    weights = np.arange(1, dim + 1) ** -_DECAY
    return np.concatenate([[1.0], 1 - np.cumsum(weights) / weights.sum()]).clip(min=0)


def _tensor(ids: npt.NDArray[np.int64]) -> Tensor:
    return torch.tensor(ids)
