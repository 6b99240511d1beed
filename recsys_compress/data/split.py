"""The three splits, and which rows belong to which."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from recsys_compress.data.hashing import uniform
from recsys_compress.errors import UserError

Split = Literal["train", "valid", "test"]
Fractions = tuple[float, float, float]
SplitIndex = npt.NDArray[np.uint8]

SPLITS: tuple[Split, ...] = get_args(Split)
DEFAULT_FRACTIONS: Fractions = (0.8, 0.1, 0.1)

_STREAM = 0x73706C6974


def random_split(first_row: int, num_rows: int, fractions: Fractions, seed: int) -> SplitIndex:
    """Returns the split of each row, drawn independently; a row's draw depends on its number only.

    Args:
        first_row: number of the first row.
        num_rows: how many rows.
        fractions: expected shares of `SPLITS`.
        seed: which of all random splits.

    Returns:
        (num_rows,) indices into `SPLITS`.
    """
    rows = np.arange(first_row, first_row + num_rows, dtype=np.uint64)
    return _assign(uniform(seed + _STREAM, rows), fractions)


def ordered_split(
    first_row: int, num_rows: int, fractions: Fractions, total_rows: int
) -> SplitIndex:
    """Returns the split of each row where the first rows train and the last ones test."""
    position = (np.arange(first_row, first_row + num_rows) + 0.5) / total_rows
    return _assign(position, fractions)


def check_fractions(fractions: Fractions, where: str) -> None:
    """Checks that three positive fractions sum to one.

    Raises:
        UserError: they do not.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"{where}: fractions {fractions} must be three positive numbers that sum to 1, "
            "for train, valid and test"
        )


def _assign(position: npt.NDArray[np.float64], fractions: Fractions) -> SplitIndex:
    train, valid, _ = fractions
    return ((position >= train).astype(np.uint8) + (position >= train + valid)).astype(np.uint8)
