"""How many bytes the tables take, by table and in total, as they are in memory."""

from dataclasses import asdict, dataclass
from typing import Any

from recsys_compress.compress.lowering import FP32_BYTES
from recsys_compress.config import DenseOptimizerName

DATA_TYPE_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
ROW_SCALE_BYTES = 4  # fp16 scale and bias of a row quantized to integers


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

    def serving_bytes(self, data_type: str) -> int:
        """Returns bytes in a storage type, unpadded, with a scale and bias a row for integers."""
        row = -(-self.used_dim * DATA_TYPE_BITS[data_type] // 8)
        scale = ROW_SCALE_BYTES if data_type.startswith("int") else 0
        return self.num_embeddings * (row + scale)


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
        tables = sum(t.parameter_bytes for t in self.physical)
        combine = sum(p.parameter_bytes for p in self.combine)
        return tables + combine + sum(self.auxiliary.values())

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
    def ratio(self) -> float:
        """How many times smaller than full."""
        return self.full_bytes / self.table_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        unquantized = sum(p.parameter_bytes for p in self.combine) + sum(self.auxiliary.values())
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
                "serving": {
                    kind: sum(t.serving_bytes(kind) for t in self.physical) + unquantized
                    for kind in DATA_TYPE_BITS
                },
            },
        }
