"""Generated clicks whose true odds are known: the data that needs no download.

The logit of a row is a factorization machine over its ids and dense features: an effect of each,
and the product of the factors of each pair. So a model must learn a vector per id, and loses
quality where a table is squeezed. Rarer ids have weaker effects, as there is less to learn them
from. Every number is a function of (seed, stream, counter): any chunk size gives the same rows,
and nothing but a chunk is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_compress.data.hashing import random_bits, uniform
from recsys_compress.data.sources.source import Chunk, RawField, RawSchema, Source
from recsys_compress.data.split import DEFAULT_FRACTIONS, Fractions
from recsys_compress.errors import UserError

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_CARDINALITIES = (10, 100, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_COMMON_RANKS = 1000
_BIAS = -1.0
_EFFECT_SHARE = 0.8
_LOGIT_STD = 3.0

_LABEL, _IDS, _DENSE, _LATENT = (stream << 32 for stream in range(1, 5))


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Generated clicks.

    Attributes:
        rows: number of rows.
        cardinalities: number of ids that each categorical field draws from.
        zipf: exponent s of the ids' frequencies, proportional to rank**-s.
        dense: number of dense features, standard normal.
        seed: of everything: other seeds are other worlds.
        fractions: shares of the random split into train, valid and test.
    """

    name: ClassVar[str] = "synthetic"

    rows: int = 600_000
    cardinalities: tuple[int, ...] = _CARDINALITIES
    zipf: float = 1.2
    dense: int = 4
    seed: int = 0
    fractions: Fractions = DEFAULT_FRACTIONS

    def schema(self) -> RawSchema:
        """Returns the columns."""
        if self.rows < 1 or self.dense < 0 or self.zipf < 0:
            raise UserError(
                f"synthetic: rows {self.rows} must be positive, dense {self.dense} and "
                f"zipf {self.zipf} not negative"
            )
        if not self.cardinalities or min(self.cardinalities) < 1:
            raise UserError(f"synthetic: cardinalities {self.cardinalities} must be positive")
        return RawSchema(
            label="label",
            dense=tuple(f"dense_{index}" for index in range(self.dense)),
            categorical=tuple(
                RawField(name=f"field_{index}") for index in range(len(self.cardinalities))
            ),
        )

    def random_fractions(self) -> Fractions:
        """Returns the shares of the random split, if it is one."""
        return self.fractions

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time."""
        for first in range(0, self.rows, rows):
            yield self._chunk(np.arange(first, min(first + rows, self.rows), dtype=np.uint64))

    def _chunk(self, rows: npt.NDArray[np.uint64]) -> Chunk:
        schema = self.schema()
        ids = [
            _zipf(self._uniform(_IDS + field, rows), cardinality, self.zipf)
            for field, cardinality in enumerate(self.cardinalities)
        ]
        dense = [
            _normal(self._uniform(_DENSE + 2 * i, rows), self._uniform(_DENSE + 2 * i + 1, rows))
            for i in range(self.dense)
        ]
        probability = 1 / (1 + np.exp(-self._logit(ids, dense)))
        label = self._uniform(_LABEL, rows) < probability
        columns: dict[str, npt.NDArray[np.generic]] = {schema.label: label.astype(np.int8)}
        columns |= {
            name: values.astype(np.float32)
            for name, values in zip(schema.dense, dense, strict=True)
        }
        columns |= {
            field.name: values for field, values in zip(schema.categorical, ids, strict=True)
        }
        return Chunk(table=pa.table(columns), probability=probability, where="synthetic")

    def _logit(self, ids: list[Ids], dense: list[Floats]) -> Floats:
        """Returns the true logits: effects, and pairwise products of factors."""
        inputs = len(ids) + len(dense)
        pairs = max(inputs * (inputs - 1) / 2, 1)
        effects, factors, squares = (np.zeros(len(ids[0])) for _ in range(3))
        for effect, factor in self._latents(ids, dense):
            effects += effect
            factors += factor
            squares += factor**2
        products = (factors**2 - squares) / 2
        logits: Floats = _BIAS + _LOGIT_STD * (
            np.sqrt(_EFFECT_SHARE / inputs) * effects
            + np.sqrt((1 - _EFFECT_SHARE) / pairs) * products
        )
        return logits

    def _latents(self, ids: list[Ids], dense: list[Floats]) -> Iterator[tuple[Floats, Floats]]:
        """Yields effect and factor of each input in each row, of variance 1 for common ids."""
        for field, values in enumerate(ids):
            effect, factor = self._latent(field, values.view(np.uint64))
            weight = 1 / np.sqrt(1 + values / _COMMON_RANKS)
            yield effect * weight, factor * weight
        for feature, numbers in enumerate(dense):
            effect, factor = self._latent(len(ids) + feature, np.zeros(1, dtype=np.uint64))
            yield effect * numbers, factor * numbers

    def _latent(self, stream: int, ids: npt.NDArray[np.uint64]) -> tuple[Floats, Floats]:
        """Returns two uniform numbers of mean 0 and variance 1 per id."""
        bits = random_bits((self.seed << 40) + _LATENT + stream, ids)
        low, high = bits & np.uint64(2**32 - 1), bits >> np.uint64(32)
        return _standard(low), _standard(high)

    def _uniform(self, stream: int, counter: npt.NDArray[np.uint64]) -> Floats:
        return uniform((self.seed << 40) + stream, counter)


def _standard(bits: npt.NDArray[np.uint64]) -> Floats:
    """Returns 32 random bits as uniform numbers of mean 0 and variance 1."""
    numbers: Floats = (bits.astype(np.float64) * 2.0**-32 - 0.5) * np.sqrt(12)
    return numbers


def _normal(u: Floats, v: Floats) -> Floats:
    """Returns standard normal numbers (Box and Muller, 1958)."""
    numbers: Floats = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
    return numbers


def _zipf(u: Floats, cardinality: int, exponent: float) -> Ids:
    """Returns ranks from 0 with odds about proportional to (rank + 1)**-exponent.

    It inverts the integral of x**-exponent from 0.5 to cardinality + 0.5, and rounds.
    """
    low, high = 0.5, cardinality + 0.5
    power = 1 - exponent
    if abs(power) < 1e-9:
        x = low * (high / low) ** u
    else:
        x = (low**power + u * (high**power - low**power)) ** (1 / power)
    return np.clip(np.floor(x + 0.5).astype(np.int64), 1, cardinality) - 1
