"""How much loss each candidate is expected to cost, in three grades of evidence."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress import StoragePlan, quantize
from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.method import Method, Trained, Values, method_name
from recsys_compress.compress.reads import all_vectors
from recsys_compress.compress.size import DATA_TYPE_BITS, DataType, is_integer
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import Candidate, alone, lowered
from recsys_compress.plan.labels import LabelCounts

Grade = Literal["data", "reference", "probes"]

_HALF_BITS = 11  # of fp16's mantissa, the leading one included


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected rise of the mean logloss, in nats.

    Attributes:
        method: what the method and its knobs cost.
        storage: what the storage type costs beside it.
        error: standard error of their sum, as far as the evidence tells.
    """

    method: float
    storage: float
    error: float

    @property
    def loss(self) -> float:
        """The rise."""
        return self.method + self.storage


class Evidence(Protocol):
    """Where estimates come from.

    Attributes:
        trained: the tables of a reference run, which methods take over; None for none.
    """

    trained: Trained | None

    def worth(self, table: EmbeddingBagConfig) -> float:
        """Returns the loss if all ids of a table had one vector."""
        ...

    def estimates(
        self,
        tables: Sequence[EmbeddingBagConfig],
        candidates: Sequence[Candidate],
        values: Values | None,
    ) -> list[Estimate]:
        """Returns the estimate of each candidate.

        Args:
            tables: the logical tables.
            candidates: one method with its knobs, in several storage types.
            values: what its tables begin with, where there is a reference run.
        """
        ...


class DataEvidence:
    """Grade "data": what ids say about the label, and how much of it sharing and width leave.

    Args:
        counts: of each table's ids and labels.
    """

    trained: Trained | None = None

    def __init__(self, counts: Mapping[str, LabelCounts]) -> None:
        self._counts = counts

    def worth(self, table: EmbeddingBagConfig) -> float:
        """Returns the information of the table's ids about the label."""
        return self._counts[table.name].information()[0]

    def estimates(
        self,
        tables: Sequence[EmbeddingBagConfig],
        candidates: Sequence[Candidate],
        values: Values | None,  # noqa: ARG002
    ) -> list[Estimate]:
        """Returns the estimates; see `Evidence.estimates`."""
        lowering = candidates[0].method.lower(tables)
        masses = {t.name: np.zeros(t.num_embeddings) for t in lowering.tables}
        reads = {}
        for table in tables:
            counts = self._counts[table.name]
            kept = counts.kept(lowering, table.feature_names[0], int(table.embedding_dim))
            for physical, who, rows in kept.reads:
                np.add.at(masses[physical], rows, counts.counts[who])
            reads[table.name] = kept
        method = worth = error = 0.0
        for table in tables:
            counts = self._counts[table.name]
            lost, spread = counts.lost(reads[table.name], masses if len(tables) > 1 else None)
            method, error = method + lost, (error**2 + spread**2) ** 0.5
            worth += counts.information()[0]
        return [
            Estimate(method=method, storage=worth * _noise(c.options.storage), error=error)
            for c in candidates
        ]


class ReferenceEvidence:
    """Grade "reference": the change of a trained model's vectors, weighted by its curvature.

    Args:
        trained: its tables.
        curvatures: of each table.
    """

    def __init__(self, trained: Trained, curvatures: Mapping[str, Curvature]) -> None:
        self.trained: Trained | None = trained
        self.curvature = curvatures.__getitem__
        self._vectors = trained.vectors

    def worth(self, table: EmbeddingBagConfig) -> float:
        """Returns the loss if all ids of a table had the mean vector."""
        vectors, curvature = self._vectors(table.name), self.curvature(table.name)
        mean = (curvature.weights.unsqueeze(1) * vectors).sum(dim=0)
        return curvature.rise(mean - vectors)[0]

    def estimates(
        self,
        tables: Sequence[EmbeddingBagConfig],
        candidates: Sequence[Candidate],
        values: Values | None,
    ) -> list[Estimate]:
        """Returns the estimates; see `Evidence.estimates`.

        Raises:
            UserError: vectors would be of another width, which the trained model cannot take.
        """
        given = Values() if values is None else values
        rises: list[tuple[float, float]] = []
        for vectors in changed(tables, [*_unstored(candidates), *candidates], given):
            _check_widths(tables, vectors)
            each = [
                self.curvature(name).rise(new.double() - self._vectors(name).double())
                for name, new in vectors.items()
            ]
            error = sum(own**2 for _, own in each) ** 0.5
            rises.append((sum(rise for rise, _ in each), error))
        method = rises[0][0]
        return [
            Estimate(method=method, storage=max(rise - method, 0.0), error=error)
            for rise, error in rises[1:]
        ]


def changed(
    tables: Sequence[EmbeddingBagConfig], candidates: Sequence[Candidate], values: Values
) -> Iterator[dict[str, Tensor]]:
    """Yields by table the vectors that each candidate gives in the place of the trained ones.

    Args:
        tables: the logical tables.
        candidates: one method with its knobs, in several storage types.
        values: what its tables begin with.
    """
    first = candidates[0]
    options = dataclasses.replace(first.options, storage="fp32")
    collection = lowered(tables, alone(first.method, options), on_cpu=True)
    collection.write([values], collection.state_dict())
    for candidate in candidates:
        storage = candidate.options.storage
        served = (
            collection if storage == "fp32" else quantize(collection, StoragePlan(types=storage))
        )
        yield {table.name: all_vectors(served, table.name) for table in tables}


@dataclass(frozen=True, kw_only=True)
class Scales:
    """By how much estimates are off for methods that train in their own form, from probes.

    Attributes:
        factors: by method, measured over estimated rises.
        spread: by method, the standard deviation of the factor's logarithm; of several probes.
    """

    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def apply(self, method: Method, estimate: Estimate) -> Estimate:
        """Returns the estimate as probes have it; a method without a probe keeps its own."""
        name = method_name(method)
        factor = self.factors.get(name, 1.0)
        scaled = factor * estimate.method
        error = ((factor * estimate.error) ** 2 + (scaled * self.spread.get(name, 0.0)) ** 2) ** 0.5
        return Estimate(method=scaled, storage=estimate.storage, error=error)


def _check_widths(tables: Sequence[EmbeddingBagConfig], vectors: Mapping[str, Tensor]) -> None:
    for table in tables:
        width = vectors[table.name].shape[1]
        if width != table.embedding_dim:
            raise UserError(
                f"table {table.name!r}: has vectors of width {width} and the reference run "
                f"{table.embedding_dim}; set the method's knobs for that width, or plan by "
                "--grade data"
            )


def _unstored(candidates: Sequence[Candidate]) -> list[Candidate]:
    first = candidates[0]
    return [first.stored_as("fp32", first.sizes)]


def _noise(storage: DataType) -> float:
    """Returns the mean squared error of a storage type, as a share of the values' variance.

    For uniform values: an integer's step is 1 / levels of the range.
    """
    if storage == "fp32":
        return 0.0
    bits = DATA_TYPE_BITS[storage]
    if is_integer(storage):
        return float((2**bits - 1) ** -2)
    return float(4.0**-_HALF_BITS / 3)
