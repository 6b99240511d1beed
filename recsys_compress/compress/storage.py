"""Tables as they are served: values of another type, rows without padding; on CPU."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.bags import without_weights
from recsys_compress.compress.collection import CompressedEmbeddingBagCollection
from recsys_compress.compress.kernels import empty_table, given_width, look_up, pack
from recsys_compress.compress.merge import MergedTable
from recsys_compress.compress.size import DATA_TYPE_BITS, DataType, row_bytes, smallest_type
from recsys_compress.errors import UserError, nearest

_CHUNK_ROWS = 1 << 17  # packed at a time, which bounds the memory that packing needs


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """In which type each table is served.

    Attributes:
        types: one type for all tables, or the type of each merged table by its name. One type for
            all stores a table finer where that takes no more bytes, as a row's scale and bias may
            take more than integers save; a type given to one table is taken at its word or refused.

    Raises:
        UserError: a type is unknown.
    """

    types: DataType | Mapping[str, DataType]

    def __post_init__(self) -> None:
        for data_type in [self.types] if isinstance(self.types, str) else self.types.values():
            if data_type not in DATA_TYPE_BITS:
                raise UserError(
                    f"storage type {data_type!r}: unknown; {nearest(data_type, DATA_TYPE_BITS)}"
                )

    @staticmethod
    def planned(collection: CompressedEmbeddingBagCollection) -> "StoragePlan":
        """Returns the types that the tables' own options name, or finer ones of no more bytes."""
        return StoragePlan(
            types={
                table.name: smallest_type(table.options.storage, table.used_dim)
                for table in collection.merged_tables()
            }
        )

    def resolve(self, collection: CompressedEmbeddingBagCollection) -> dict[str, DataType]:
        """Returns the type of each of the collection's merged tables, by its name.

        Raises:
            UserError: a table has no type, or one that a finer type matches in bytes; or the plan
                names a table that does not exist.
        """
        tables = {table.name: table for table in collection.merged_tables()}
        if isinstance(self.types, str):
            return {n: smallest_type(self.types, t.used_dim) for n, t in tables.items()}
        for name in self.types:
            if name not in tables:
                raise UserError(f"storage: there is no table {name!r}; {nearest(name, tables)}")
        for name, table in tables.items():
            if name not in self.types:
                raise UserError(
                    f"storage: table {name!r} (of {', '.join(table.members)}) has no type; give it "
                    "one, 'fp32' to leave it as it is"
                )
            _check_smaller(table, self.types[name])
        return {name: self.types[name] for name in tables}

    def serving_bytes(self, collection: CompressedEmbeddingBagCollection) -> int:
        """Returns the bytes of all that is served: tables, what combines them, id transforms."""
        report, types = collection.size_report(), self.resolve(collection)
        return report.unquantized_bytes + sum(
            table.num_embeddings * row_bytes(types[table.name], table.used_dim)
            for table in collection.merged_tables()
        )


class QuantizedEmbeddingBagCollection(nn.Module):
    """A trained collection as it is served; from outside, an `EmbeddingBagCollection`.

    Its state dict is what is served, to the byte. Made here, its tables are zeros, to be loaded;
    `quantize` makes it with a trained collection's values. It needs a CPU.

    Args:
        collection: whose tables to store; its fused tables may be on the meta device.
        plan: in which types.

    Raises:
        UserError: the plan does not suit the tables.
    """

    def __init__(self, collection: CompressedEmbeddingBagCollection, plan: StoragePlan) -> None:
        super().__init__()
        types = plan.resolve(collection)
        self.tables = nn.ModuleDict(
            {
                table.name: StoredTable(table, types[table.name])
                for table in collection.merged_tables()
            }
        )
        # Copies: training on must not change what is served.
        self.ids = copy.deepcopy(collection.ids).cpu()
        self.output = copy.deepcopy(collection.output).cpu().requires_grad_(False)
        self._lookups = [list(table.lookups) for table in collection.merged_tables()]
        for table in collection.merged_tables():
            width = given_width(table.used_dim, types[table.name])
            self.output.expect_widths(dict.fromkeys(table.lookups, width))
        self._configs = collection.embedding_bag_configs()
        self._is_weighted = collection.is_weighted()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up and pools, as the trained collection does.

        Args:
            features: has a key for each feature of the logical tables, in any order, and may have
                more; integer ids.

        Returns:
            (B, sum of widths) in fp32, one key a feature, in the order of the logical tables.

        Raises:
            ValueError: a feature is missing, or an id lies outside its table.
        """
        if not self._is_weighted:
            features = without_weights(features)
        lookups = self.ids(features)
        parts = lookups.split([len(names) for names in self._lookups])
        pooled = [
            (names, table(part))
            for names, table, part in zip(self._lookups, self.tables.values(), parts, strict=True)
        ]
        output: KeyedTensor = self.output(pooled, features)
        return output

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the logical tables, with the width of the vectors that they give."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags come with a weight for each id."""
        return self._is_weighted


class StoredTable(nn.Module):
    """A merged table in a storage type, zeros at first.

    Args:
        table: its rows, width and look-ups.
        data_type: of its values.
    """

    weight: Tensor

    def __init__(self, table: MergedTable, data_type: DataType) -> None:
        super().__init__()
        self.table, self.data_type = table, data_type
        weight = empty_table(table.num_embeddings, table.used_dim, data_type)
        self.register_buffer("weight", weight)

    def forward(self, lookups: KeyedJaggedTensor) -> Tensor:
        """Returns (B, K x width), the sums over the bags of the table's K look-ups."""
        return look_up(self.weight, self.table.used_dim, self.data_type, lookups)

    def store(self, weight: Tensor) -> None:
        """Takes over the (rows, D and padding) values of the trained table.

        Raises:
            ValueError: it has another shape.
            UserError: a value is not finite, or too large for fp16, the type of scales and biases.
        """
        wanted = (self.table.num_embeddings, self.table.stored_dim)
        if weight.shape != wanted:
            raise ValueError(
                f"table {self.table.name!r} is {tuple(weight.shape)}, not {wanted}; pass the state "
                "dict of this collection"
            )
        largest = torch.finfo(torch.float16).max
        for start in range(0, len(weight), _CHUNK_ROWS):
            values = weight[start : start + _CHUNK_ROWS, : self.table.used_dim].detach().cpu()
            if self.data_type not in ("fp32", "bf16") and not values.abs().max() <= largest:
                raise UserError(
                    f"storage: table {self.table.name!r} has values beyond {largest:,.0f}, or not "
                    f"finite, which {self.data_type} cannot hold; use 'bf16' or 'fp32'"
                )
            self.weight[start : start + len(values)] = pack(values, self.data_type)


def quantize(
    collection: CompressedEmbeddingBagCollection,
    plan: StoragePlan,
    weights: Mapping[str, Tensor] | None = None,
) -> QuantizedEmbeddingBagCollection:
    """Returns a trained collection as it is served.

    Args:
        collection: sharded or not.
        plan: in which types.
        weights: the collection's state dict, in whole tensors; where it is sharded, that is not
            what its own `state_dict` gives.

    Raises:
        UserError: the plan does not suit the tables or their values.
        ValueError: `weights` are wanted, or lack one.
    """
    if weights is None:
        if not isinstance(collection.fused, EmbeddingBagCollection | None):
            raise ValueError("the collection is sharded; pass its whole tensors as `weights`")
        weights = collection.state_dict()
    served = QuantizedEmbeddingBagCollection(collection, plan)
    wanted = {name for name in served.state_dict() if not name.startswith("tables.")}
    wanted |= {table.parameter for table in collection.merged_tables()}
    if missing := sorted(wanted - set(weights)):
        raise ValueError(f"weights lack {missing[0]!r}; pass the collection's whole state dict")
    for table in collection.merged_tables():
        cast("StoredTable", served.tables[table.name]).store(weights[table.parameter])
    rest = {name: weights[name] for name in wanted if name in served.state_dict()}
    served.load_state_dict(rest, strict=False)
    return served


def _check_smaller(table: MergedTable, data_type: DataType) -> None:
    """Refuses a type for a table where a finer one takes no more bytes."""
    best, width = smallest_type(data_type, table.used_dim), table.used_dim
    if best != data_type:
        raise UserError(
            f"storage: {data_type} makes table {table.name!r} no smaller: a row of {width} takes "
            f"{row_bytes(data_type, width)} bytes with its scale and bias, and in {best} "
            f"{row_bytes(best, width)}; use {best!r}"
        )
