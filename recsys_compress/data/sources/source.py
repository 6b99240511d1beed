"""What a source of raw data gives to `prepare`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict

from recsys_compress.data.inputs import Inputs, plain
from recsys_compress.data.schema import Pooling
from recsys_compress.data.split import Fractions, SplitIndex

# Options come parsed: an unknown one and a value of another type are refused.
STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class RawField:
    """One categorical column: int64 or large_string values, or lists of them.

    Attributes:
        name: of the column.
        multi_valued: each row holds a list.
        weighted: multi-valued only: column `<name>.weights` holds lists of float32, as long.
        pooling: how the vectors of a row's ids become one.
    """

    name: str
    multi_valued: bool = False
    weighted: bool = False
    pooling: Pooling = "sum"


@dataclass(frozen=True, kw_only=True)
class RawSchema:
    """The columns of a source's chunks: int8 label, float32 weight and dense, categorical."""

    label: str
    categorical: tuple[RawField, ...]
    dense: tuple[str, ...] = ()
    weight: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of raw data.

    Attributes:
        table: N rows with the columns of the raw schema; only categorical columns hold nulls.
        split: (N,) indices into `SPLITS`, or None to draw them by `Source.fractions`.
        probability: (N,) true odds of label 1 as float64, where the source knows them.
        where: file that the rows come from, for messages.
    """

    table: pa.Table
    split: SplitIndex | None = None
    probability: npt.NDArray[np.float64] | None = None
    where: str


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Raw data; a dataclass whose fields are the user's options.

    `chunks` is called twice and gives the same rows in the same order, whatever the chunk size.
    """

    __pydantic_config__ = STRICT

    name: ClassVar[str]

    @abstractmethod
    def schema(self) -> RawSchema:
        """Returns the columns.

        Raises:
            UserError: the source cannot be read or lacks a column.
        """

    @abstractmethod
    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time.

        Raises:
            UserError: the source cannot be read or holds what it must not.
        """

    def inputs(self) -> Inputs:
        """Returns what a model needs of raw rows; by default, the features as they are."""
        schema = self.schema()
        return plain(schema.dense, [field.name for field in schema.categorical])

    def random_fractions(self) -> Fractions | None:
        """Returns the shares of a random split, or None if chunks say which rows are where."""
        return None
