"""How many bytes the tables take, by table and in total, as they are in memory."""

from dataclasses import asdict, dataclass
from typing import Any

from recsys_compress.compress.lowering import FP32_BYTES
from recsys_compress.config import DataType as DataType
from recsys_compress.config import DenseOptimizerName

DATA_TYPE_BITS: dict[DataType, int] = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "int8": 8,
    "int4": 4,
    "int2": 2,
}
ROW_SCALE_BYTES = 4  # fp16 scale and bias of a row quantized to integers


def is_integer(data_type: DataType) -> bool:
    """Whether rows of the type are quantized to integers, with a scale and a bias each."""
    return data_type.startswith("int")


def row_bytes(data_type: DataType, width: int) -> int:
    """Returns the bytes at serving of a row of `width` values, unpadded, its scale included."""
    values = -(-width * DATA_TYPE_BITS[data_type] // 8)
    return values + (ROW_SCALE_BYTES if is_integer(data_type) else 0)


def smallest_type(asked: DataType, width: int) -> DataType:
    """Returns what stores rows of `width` values in the fewest bytes, no coarser than `asked`.

    Of types of equal bytes it is the finest: int8 has the bytes of fp16 where rows are 4 wide.
    """
    finer: dict[DataType, int] = {"fp32": row_bytes("fp32", width)}
    for data_type, bits in DATA_TYPE_BITS.items():
        # fp16 and bf16 are neither finer than the other: one has the digits, the other the range.
        if bits > DATA_TYPE_BITS[asked] and data_type != "bf16":
            finer[data_type] = row_bytes(data_type, width)
    finer[asked] = row_bytes(asked, width)
    return min(finer, key=lambda data_type: finer[data_type])


@dataclass(frozen=True, kw_only=True)
class LogicalSize:
    """A table as the user sees it.

    Attributes:
        table: its name.
        method: name of the method that stores it.
        num_embeddings: ids.
        embedding_dim: width of its vectors.
        full_bytes: bytes it would take uncompressed, in fp32.
        physical: names of the tables that hold it.
    """

    table: str
    method: str
    num_embeddings: int
    embedding_dim: int
    full_bytes: int
    physical: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PhysicalSize:
    """A table as it is in memory.

    Attributes:
        name: the parameter's name within the collection.
        num_embeddings: rows.
        embedding_dim: width in memory, padding included.
        used_dim: width without padding.
        optimizer: its optimizer.
        parameter_bytes: of the weights.
        optimizer_bytes: of the optimizer's state.
        members: logical tables held in it.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    used_dim: int
    optimizer: str
    parameter_bytes: int
    optimizer_bytes: int
    members: tuple[str, ...]

    def serving_bytes(self, data_type: DataType) -> int:
        """Returns bytes in a storage type, unpadded, with a scale and bias a row for integers."""
        return self.num_embeddings * row_bytes(data_type, self.used_dim)


@dataclass(frozen=True, kw_only=True)
class CombineSize:
    """A parameter by which a method combines look-ups.

    Attributes:
        name: the parameter's name within the collection.
        parameter_bytes: of its values.
        optimizer_bytes: of the dense optimizer's state for it.
    """

    name: str
    parameter_bytes: int
    optimizer_bytes: int

    @staticmethod
    def of(name: str, values: int, optimizer: DenseOptimizerName) -> "CombineSize":
        """Returns the size of a parameter of so many values under the dense optimizer."""
        # Each parameter's state has a step count, but for plain SGD, which has no state.
        state = {"adam": 2 * values + 1, "adagrad": values + 1, "sgd": 0}[optimizer]
        return CombineSize(
            name=name, parameter_bytes=values * FP32_BYTES, optimizer_bytes=state * FP32_BYTES
        )


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Bytes of a collection's tables.

    Attributes:
        logical: the tables the user asked for.
        physical: the tables there are.
        combine: the parameters by which methods combine look-ups.
        auxiliary: bytes of other tensors of the collection, by name.
    """

    logical: tuple[LogicalSize, ...]
    physical: tuple[PhysicalSize, ...]
    combine: tuple[CombineSize, ...]
    auxiliary: dict[str, int]

    @property
    def table_bytes(self) -> int:
        """Bytes of all parameters and auxiliary tensors of the collection."""
        return sum(t.parameter_bytes for t in self.physical) + self.unquantized_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes of the logical tables, uncompressed."""
        return sum(t.full_bytes for t in self.logical)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of all these parameters' optimizer state."""
        tables = sum(t.optimizer_bytes for t in self.physical)
        return tables + sum(p.optimizer_bytes for p in self.combine)

    @property
    def unquantized_bytes(self) -> int:
        """Bytes that every storage type leaves as they are: all but the tables."""
        return sum(p.parameter_bytes for p in self.combine) + sum(self.auxiliary.values())

    def serving_bytes(self, data_type: DataType) -> int:
        """Returns the bytes of all that is served under `StoragePlan(types=data_type)`."""
        return self.unquantized_bytes + sum(
            table.serving_bytes(smallest_type(data_type, table.used_dim)) for table in self.physical
        )

    @property
    def ratio(self) -> float:
        """How many times smaller than full."""
        return self.full_bytes / self.table_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "logical": [asdict(t) for t in self.logical],
            "physical": [asdict(t) for t in self.physical],
            "combine": [asdict(p) for p in self.combine],
            "auxiliary": [{"name": n, "bytes": b} for n, b in self.auxiliary.items()],
            "total": {
                "tables": self.table_bytes,
                "full": self.full_bytes,
                "ratio": self.ratio,
                "optimizer": self.optimizer_bytes,
                "serving": {kind: self.serving_bytes(kind) for kind in DATA_TYPE_BITS},
            },
        }
