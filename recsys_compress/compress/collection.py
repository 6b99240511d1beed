"""Compressed tables that look like torchrec's `EmbeddingBagCollection`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.hashing import along_keys, check_range
from recsys_compress.compress.hook import Hook, LiveTable
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.merge import MAX_ROWS, MergedTable, Slot, merge
from recsys_compress.compress.method import Values, method_name
from recsys_compress.compress.policy import Policy, full_bytes
from recsys_compress.compress.size import CombineSize, LogicalSize, SizeReport
from recsys_compress.config import DenseOptimizerName
from recsys_compress.errors import UserError

_CHUNK = 1 << 16  # ids whose vectors are read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a physical table lies.

    Attributes:
        parameter: the table parameter's name within the collection.
        rows: its rows there.
        used_dim: its width without padding.
    """

    parameter: str
    rows: slice
    used_dim: int


class CompressedEmbeddingBagCollection(nn.Module):
    """Embedding tables stored as a policy says; from outside, an `EmbeddingBagCollection`.

    It contains stock torchrec collections, which torchrec shards: `fused` holds the tables whose
    optimizer runs inside the backward pass, `dense` the small ones that are replicated and trained
    by a dense optimizer. `output` holds the parameters of methods that combine look-ups.

    Attributes:
        frozen: whether look-ups leave no trace for a backward pass, so that no table moves.

    Args:
        tables: the logical tables, as for `EmbeddingBagCollection`.
        policy: which table is stored how; fit it to a budget first if there is one.
        is_weighted: whether bags come with a weight for each id.
        device: of the tables in `dense` and of what combines look-ups.
        fused_device: of the tables in `fused`; "meta" where sharding will make them.

    Raises:
        UserError: the policy does not suit the tables.
    """

    def __init__(
        self,
        *,
        tables: Sequence[EmbeddingBagConfig],
        policy: Policy,
        is_weighted: bool = False,
        device: torch.device | None = None,
        fused_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_names(tables)
        device = device or torch.device("cpu")
        assignments = policy.assign(tables)
        lowerings = [a.rule.method.lower(a.tables) for a in assignments]
        self._tables, slots = merge(lowerings, [a.rule.options for a in assignments])
        fused = [t for t in self._tables if t.options.fused]
        self._dense_tables = [t for t in self._tables if not t.options.fused]
        self._num_fused_lookups = sum(len(t.lookups) for t in fused)
        self.ids = PhysicalIds(lowerings, slots, self._tables).to(device)
        self.frozen = False
        self._lowerings = lowerings
        self._slots = slots
        self.fused = None
        if fused:
            self.fused = EmbeddingBagCollection(
                tables=[t.config(t.lookups) for t in fused],
                is_weighted=is_weighted,
                device=fused_device or device,
            )
        # One feature a table: its look-ups come stacked along the batch, as K x B bags.
        self.dense = nn.ModuleDict(
            {
                t.name: EmbeddingBagCollection(
                    tables=[t.config([t.name])], is_weighted=is_weighted, device=device
                )
                for t in self._dense_tables
            }
        )
        self.output = Output(tables, slots, lowerings, is_weighted=is_weighted).to(device)
        self._configs = self.output.configs
        self._is_weighted = is_weighted
        self._device = device
        physical: dict[str, dict[str, None]] = {}
        for slot in slots:
            physical.setdefault(slot.feature, {})[slot.table.parameter] = None
        self._logical = tuple(
            LogicalSize(
                table=table.name,
                method=method_name(assignment.rule.method),
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                full_bytes=full_bytes([table]),
                physical=tuple(physical[table.feature_names[0]]),
            )
            for assignment in assignments
            for table in assignment.tables
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up and pools.

        Args:
            features: has a key for each feature of the logical tables, in any order, and may have
                more; integer ids.

        Returns:
            (B, sum of widths), one key a feature, in the order of the logical tables.

        Raises:
            ValueError: a feature is missing, or an id lies outside its table.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled = self._look_up(features)
        output: KeyedTensor = self.output(pooled, features)
        if self.training and torch.is_grad_enabled() and not self.frozen:
            for hook in self.hooks():
                hook.looked_up(features, output)
        return output

    def _look_up(self, features: KeyedJaggedTensor) -> list[tuple[list[str], Tensor]]:
        """Returns for each inner collection its look-ups' names and their (B, K x D) vectors."""
        lookups = self.ids(features)
        num_dense = len(lookups.keys()) - self._num_fused_lookups
        fused, *dense = (
            lookups.split([self._num_fused_lookups, *(len(t.lookups) for t in self._dense_tables)])
            if num_dense
            else (lookups,)
        )
        pooled = []
        if self.fused is not None:
            result = self.fused(fused)
            pooled.append((result.keys(), result.values()))
        for table, part in zip(self._dense_tables, dense, strict=True):
            pooled.append((list(table.lookups), self._look_up_dense(table, part)))
        return pooled

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the logical tables, with the width of the vectors that they give."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags come with a weight for each id."""
        return self._is_weighted

    def merged_tables(self) -> list[MergedTable]:
        """Returns the tables there are, fused ones first."""
        return self._tables

    def table_options(self) -> dict[str, TableOptions]:
        """Returns how each table parameter is trained, by its name within the collection."""
        return {table.parameter: table.options for table in self._tables}

    def hooks(self) -> list[Hook]:
        """Returns the hooks of the methods that have one."""
        return [lowering.hook for lowering in self._lowerings if lowering.hook is not None]

    def bind_hooks(self, live: Callable[[Placement], LiveTable]) -> None:
        """Gives hooks access to their physical tables.

        Args:
            live: returns the live tensors of a place in a table parameter.
        """
        for lowering, places in zip(self._lowerings, self._placements(), strict=True):
            if lowering.hook is not None:
                lowering.hook.bind(lambda name, places=places: live(places[name]))  # type: ignore[misc]

    def values(self, state: Mapping[str, Tensor]) -> list[Values]:
        """Returns each assignment's part of the collection's tensors, as views.

        Args:
            state: the collection's state dict, tables whole.
        """
        return [
            Values(
                tables={
                    name: state[place.parameter][place.rows, : place.used_dim]
                    for name, place in places.items()
                },
                combine=below(f"output.combines.{number}.", state),
                ids=below(f"ids.transforms.{number}.", state),
            )
            for number, places in enumerate(self._placements())
        ]

    @torch.no_grad()
    def write(self, values: Sequence[Values], state: Mapping[str, Tensor]) -> None:
        """Overwrites tensors; padding becomes zero.

        Args:
            values: for each assignment of the policy, in its order; tensors that are not named
                stay as they are.
            state: the collection's state dict, tables whole, by which its tensors are written.
        """
        for given, own, places in zip(values, self.values(state), self._placements(), strict=True):
            for name, table in given.tables.items():
                state[places[name].parameter][places[name].rows].zero_()
                own.tables[name].copy_(table)
            for name, value in given.combine.items():
                own.combine[name].copy_(value)
            for name, value in given.ids.items():
                own.ids[name].copy_(value)

    def vectors(self, table: str) -> Tensor:
        """Returns the (n, D) vectors of all ids of a logical table.

        Raises:
            UserError: its ids are hashes, too many to look at.
        """
        config = next(t for t in self._configs if t.name == table)
        if config.num_embeddings > MAX_ROWS:
            raise UserError(
                f"table {table!r}: has {config.num_embeddings:,} ids, too many to take over one by "
                "one; prepare the data with --encoding vocabulary"
            )
        keys = [feature for t in self._configs for feature in t.feature_names]
        own = keys.index(config.feature_names[0])
        chunks = []
        with torch.no_grad():
            for ids in torch.split(torch.arange(config.num_embeddings), _CHUNK):
                lengths = torch.zeros(len(keys), len(ids), dtype=torch.int64)
                lengths[own] = 1
                features = KeyedJaggedTensor(
                    keys=keys,
                    values=ids,
                    lengths=lengths.view(-1),
                    weights=torch.ones(len(ids)) if self._is_weighted else None,
                    stride=len(ids),
                ).to(self._device)
                chunks.append(self(features)[keys[own]].clone().cpu())
        return torch.cat(chunks)

    def _placements(self) -> list[dict[str, Placement]]:
        """Returns by lowering, and then by its physical table, where that table lies."""
        slots = iter(self._slots)
        return [
            {
                lookup.table: Placement(
                    parameter=slot.table.parameter,
                    rows=slice(slot.offset, slot.offset + slot.rows),
                    used_dim=slot.table.used_dim,
                )
                for lookup, slot in zip(lowering.lookups, slots, strict=False)
            }
            for lowering in self._lowerings
        ]

    def size_report(self, dense_optimizer: DenseOptimizerName = "adam") -> SizeReport:
        """Returns the bytes of the tables and of what combines their vectors.

        Args:
            dense_optimizer: what trains the latter.
        """
        return SizeReport(
            logical=self._logical,
            physical=tuple(table.size() for table in self._tables),
            combine=tuple(
                CombineSize.of(f"output.{name}", parameter.numel(), dense_optimizer)
                for name, parameter in self.output.named_parameters()
            ),
            auxiliary={name: b.numel() * b.element_size() for name, b in self.named_buffers()},
        )

    def _look_up_dense(self, table: MergedTable, lookups: KeyedJaggedTensor) -> Tensor:
        """Returns (B, K x D) for the K look-ups of one dense table."""
        count = len(table.lookups)
        stacked = KeyedJaggedTensor(
            keys=[table.name],
            values=lookups.values(),
            weights=lookups.weights_or_none(),
            lengths=lookups.lengths(),
            stride=count * lookups.stride(),
        )
        vectors: Tensor = self.dense[table.name](stacked).values()
        return (
            vectors.view(count, lookups.stride(), table.stored_dim)
            .transpose(0, 1)
            .reshape(lookups.stride(), count * table.stored_dim)
        )


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
            transform(_select(features, names))
            for transform, names in zip(self.transforms, self._features, strict=True)
        ]
        length_per_key = [length for part in parts for length in part.length_per_key()]
        values = _join([part.values() for part in parts])
        check_range(values, self._rows, length_per_key, [slot.feature for slot in self._slots])
        rows, offsets = along_keys(values, self._offsets, length_per_key)
        lookups = KeyedJaggedTensor(
            keys=[slot.lookup for slot in self._slots],
            values=(rows + offsets).view(-1),
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
        if len(self.combines):
            weights = self._bag_weights(features)
            keys = features.keys()
            for number, combine in self.combines.items():
                names = self._combined[number]
                totals = weights[[keys.index(name) for name in names]].t()
                vectors = combine(self._pick(pooled, self._inputs[number]), totals)
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

    def _bag_weights(self, features: KeyedJaggedTensor) -> Tensor:
        """Returns (keys, B) the total weight of each bag, or its length without weights."""
        lengths = features.lengths()
        if not self._is_weighted:
            return lengths.view(len(features.keys()), -1).float()
        totals = torch.segment_reduce(features.weights(), "sum", lengths=lengths.long(), initial=0)
        return totals.view(len(features.keys()), -1)

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


def _select(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Returns the named features in their order, without a copy where that is how they stand."""
    keys = features.keys()
    if keys == names:
        return features
    missing = set(names) - set(keys)
    if missing:
        raise ValueError(f"features {sorted(missing)} are missing; the batch has {keys}")
    return features.permute([keys.index(name) for name in names])


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _check_names(tables: Sequence[EmbeddingBagConfig]) -> None:
    names = [table.name for table in tables]
    features = [feature for table in tables for feature in table.feature_names]
    for kind, values in (("table", names), ("feature", features)):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UserError(f"{kind} {twice[0]!r} is given twice; give each its own name")
