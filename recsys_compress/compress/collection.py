"""Compressed tables that look like torchrec's `EmbeddingBagCollection`."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.bags import without_weights
from recsys_compress.compress.hook import Hook, LiveTable
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.merge import MergedTable, merge
from recsys_compress.compress.method import Values, method_name
from recsys_compress.compress.physical import Output, PhysicalIds
from recsys_compress.compress.policy import Policy, full_bytes
from recsys_compress.compress.reads import all_vectors
from recsys_compress.compress.size import CombineSize, LogicalSize, SizeReport
from recsys_compress.compress.tensors import below
from recsys_compress.config import DenseOptimizerName
from recsys_compress.errors import UserError


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
        _check_lookups(lowerings)
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
        """Looks up and pools, within `torch.autocast` in fp32 too.

        Args:
            features: has a key for each feature of the logical tables, in any order, and may have
                more; integer ids.

        Returns:
            (B, sum of widths), one key a feature, in the order of the logical tables.

        Raises:
            ValueError: a feature is missing, or an id lies outside its table.
        """
        if not self._is_weighted:
            features = without_weights(features)
        with _fp32(features.device()):
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
        return all_vectors(self, table, self._device)

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


def _fp32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns within what nothing is rounded for speed, whatever goes on around it."""
    # There is no autocast for tensors that hold nothing, as in a dry run.
    return (
        contextlib.nullcontext()
        if device.type == "meta"
        else torch.autocast(device.type, enabled=False)
    )


def _check_names(tables: Sequence[EmbeddingBagConfig]) -> None:
    names = [table.name for table in tables]
    features = [feature for table in tables for feature in table.feature_names]
    for kind, values in (("table", names), ("feature", features)):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UserError(f"{kind} {twice[0]!r} is given twice; give each its own name")


def _check_lookups(lowerings: Sequence[Lowering]) -> None:
    """Refuses features of which one is called what another's look-up is, like "a" and "a#0"."""
    owners: dict[str, str] = {}
    for lowering in lowerings:
        stored = [table.name for table in lowering.tables]
        for name in stored:
            if stored.count(name) > 1:
                raise UserError(f"tables: two would be stored as {name!r}; rename one of them")
        named = [(lookup.name, lookup.feature) for lookup in lowering.lookups]
        if lowering.combine is not None:
            named += [(f"={feature}", feature) for feature in lowering.features]
        for name, feature in named:
            other = owners.setdefault(name, feature)
            if other != feature:
                raise UserError(
                    f"features {other!r} and {feature!r}: a look-up of either would be called "
                    f"{name!r}; rename one of them"
                )
