"""From logical features to look-ups of merged tables, and from their vectors back to features."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.bags import Bags, select
from recsys_compress.compress.hashing import along_keys, check_range
from recsys_compress.compress.lowering import Lowering
from recsys_compress.compress.merge import MergedTable, Slot


class PhysicalIds(nn.Module):
    """Ids of logical features to rows of merged tables; parameter-free.

    Args:
        lowerings: of disjoint sets of features.
        slots: where each look-up lands, in the order in which the lowerings emit them.
        tables: the merged tables in the order wanted.
    """

    def __init__(
        self, lowerings: Sequence[Lowering], slots: Sequence[Slot], tables: Sequence[MergedTable]
    ) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(lowering.ids for lowering in lowerings)
        self._features = [lowering.features for lowering in lowerings]
        self._slots = list(slots)
        self._rows = [slot.rows for slot in slots]
        self._offsets = [slot.offset for slot in slots]
        emitted = [slot.lookup for slot in slots]
        wanted = [name for table in tables for name in table.lookups]
        self._order = None if emitted == wanted else [emitted.index(name) for name in wanted]

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the K look-ups' bags, tables outermost.

        Raises:
            ValueError: a feature is missing, lengths and ids disagree, or an id lies outside its
                table. The kernel itself would read and train row 0 instead.
        """
        if sum(features.length_per_key()) != features.values().numel():
            raise ValueError(
                f"lengths add up to {sum(features.length_per_key())}, but there are "
                f"{features.values().numel()} ids; make them agree"
            )
        parts = [
            transform(select(features, names))
            for transform, names in zip(self.transforms, self._features, strict=True)
        ]
        length_per_key = [length for part in parts for length in part.length_per_key()]
        values = _join([part.values() for part in parts])
        check_range(values, self._rows, length_per_key, [slot.feature for slot in self._slots])
        if any(self._offsets):
            rows, offsets = along_keys(values, self._offsets, length_per_key)
            values = (rows + offsets).view(-1)
        lookups = KeyedJaggedTensor(
            keys=[slot.lookup for slot in self._slots],
            values=values,
            weights=None
            if parts[0].weights_or_none() is None
            else _join([part.weights() for part in parts]),
            lengths=_join([part.lengths() for part in parts]),
            offsets=parts[0].offsets_or_none() if len(parts) == 1 else None,
            stride=features.stride(),
            length_per_key=length_per_key,
        )
        return lookups if self._order is None else lookups.permute(self._order)


class Output(nn.Module):
    """Vectors of look-ups to vectors of features, in the order of the logical tables.

    Args:
        tables: the logical tables.
        slots: where each look-up lands.
        lowerings: of disjoint sets of the tables' features.
        is_weighted: whether bags come with a weight for each id.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        slots: Sequence[Slot],
        lowerings: Sequence[Lowering],
        *,
        is_weighted: bool,
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._mean = [
            feature
            for table in tables
            if table.pooling == PoolingType.MEAN
            for feature in table.feature_names
        ]
        dims = {feature: table.embedding_dim for table in tables for feature in table.feature_names}
        self._features = list(dims)
        # A piece is a look-up or, as "=feature", a combined feature: its width, and with padding.
        self._dims = {s.lookup: (s.table.used_dim, s.table.stored_dim) for s in slots}
        pieces = {f: [s.lookup for s in slots if s.feature == f] for f in dims}
        self.combines = nn.ModuleDict()
        self._inputs: dict[str, list[str]] = {}
        self._combined: dict[str, list[str]] = {}
        for number, lowering in enumerate(lowerings):
            if lowering.combine is None:
                continue
            self.combines[str(number)] = lowering.combine
            self._inputs[str(number)] = [lookup.name for lookup in lowering.lookups]
            self._combined[str(number)] = lowering.features
            for feature in lowering.features:
                pieces[feature] = [f"={feature}"]
                self._dims[f"={feature}"] = (dims[feature], dims[feature])
        self._order = [name for f in dims for name in pieces[f]]
        self._widths = [sum(self._dims[name][0] for name in pieces[f]) for f in dims]
        widths = dict(zip(dims, self._widths, strict=True))
        self.configs = [
            dataclasses.replace(t, embedding_dim=widths[t.feature_names[0]]) for t in tables
        ]

    def expect_widths(self, widths: Mapping[str, int]) -> None:
        """Takes look-ups' vectors of these widths from now on, padding included, by look-up."""
        for lookup, width in widths.items():
            self._dims[lookup] = (self._dims[lookup][0], width)

    def forward(
        self, pooled: Sequence[tuple[list[str], Tensor]], features: KeyedJaggedTensor
    ) -> KeyedTensor:
        """Combines and concatenates.

        Args:
            pooled: for each collection its look-ups' names and their (B, K x D) vectors.
            features: the logical features, for the lengths and weights of their bags.
        """
        parts = list(pooled)
        for number, combine in self.combines.items():
            names = self._combined[number]
            bags = Bags(features=features, names=names, is_weighted=self._is_weighted)
            vectors = combine(self._pick(pooled, self._inputs[number]), bags)
            parts.append(([f"={name}" for name in names], vectors))
        values = self._pick(parts, self._order)
        output = KeyedTensor(keys=self._features, length_per_key=self._widths, values=values)
        return self._average(output, features) if self._mean else output

    def _pick(self, parts: Sequence[tuple[list[str], Tensor]], wanted: list[str]) -> Tensor:
        """Returns the wanted pieces side by side, without a copy where they stand so already."""
        by_name: dict[str, Tensor] = {}
        for keys, values in parts:
            # Sharding reorders keys, so the order is looked at, never assumed.
            if keys == wanted and self._is_unpadded(keys):
                return values
            by_name |= self._pieces(keys, values)
        return torch.cat([by_name[name] for name in wanted], dim=1)

    def _pieces(self, keys: list[str], values: Tensor) -> dict[str, Tensor]:
        """Returns the vectors of each piece, without padding."""
        sizes = [size for key in keys for size in self._used_and_padding(key)]
        return dict(zip(keys, torch.split(values, sizes, dim=1)[::2], strict=True))

    def _is_unpadded(self, pieces: list[str]) -> bool:
        return all(used == stored for used, stored in (self._dims[piece] for piece in pieces))

    def _used_and_padding(self, piece: str) -> tuple[int, int]:
        used, stored = self._dims[piece]
        return used, stored - used

    def _average(self, pooled: KeyedTensor, features: KeyedJaggedTensor) -> KeyedTensor:
        """Divides the sums of features with mean pooling by the lengths of their bags."""
        keys = features.keys()
        positions = [keys.index(feature) for feature in self._mean]
        lengths = features.lengths().view(len(keys), -1)[positions].clamp(min=1)
        scale = torch.ones(len(self._features), lengths.shape[1], device=lengths.device)
        order = pooled.keys()
        scale[[order.index(feature) for feature in self._mean]] = 1.0 / lengths
        widths = torch.tensor(self._widths, device=lengths.device)
        columns = scale.repeat_interleave(widths, dim=0, output_size=sum(self._widths)).t()
        return KeyedTensor(
            keys=order, length_per_key=self._widths, values=pooled.values() * columns
        )


def _join(tensors: list[Tensor]) -> Tensor:
    """Returns the concatenation; no copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
