"""Prepared datasets for the cases that read: generated, in a folder of the caller's."""

from pathlib import Path

import numpy as np

from benchmarks.case import Shape
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic

_TRAIN = 0.9  # shares of the rows
_FRACTIONS = (_TRAIN, 0.05, 0.05)
_ENDLESS = 2**40  # values to draw from, so that no two rows share one
LARGE_ROWS = 20_000_000


def click_log(shape: Shape, folder: Path) -> Path:
    """Returns a dataset like Criteo's: fields of 4 to 100,000 ids, dense features."""
    cardinalities = np.geomspace(4, 100_000, shape.features).astype(int)
    source = Synthetic(
        rows=shape.examples,
        cardinalities=tuple(cardinalities.tolist()),
        dense=shape.dense,
        fractions=_FRACTIONS,
    )
    return prepare(source, folder / "click_log").path


def many_ids(shape: Shape, folder: Path) -> Path:
    """Returns a dataset whose vocabularies together hold twice `shape.rows` ids.

    Nearly every value occurs once, so the number of rows follows from the number of ids.
    """
    rows = round(2 * shape.rows / shape.features / _TRAIN)
    source = Synthetic(
        rows=rows, cardinalities=(_ENDLESS,) * shape.features, zipf=0.0, fractions=_FRACTIONS
    )
    return prepare(source, folder / "many_ids").path
