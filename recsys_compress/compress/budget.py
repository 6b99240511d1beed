"""What methods share in fitting a knob to a byte budget, and in checking their knobs."""

import math
from collections.abc import Callable
from typing import get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.errors import UserError, nearest

CLOSE = 0.95  # least share of a budget that a fitted method takes


def out_of_reach(name: str, budget_bytes: int, least: int, greatest: int) -> UserError:
    """Returns the error of a method that cannot take `budget_bytes`."""
    return UserError(
        f"budget of {budget_bytes:,} bytes is out of reach for {name!r}: it can take from "
        f"{least:,} to {greatest:,} bytes; choose a budget in between or another method"
    )


def unreachable(name: str, budget_bytes: int, below: int, above: int) -> UserError:
    """Returns the error of a method whose sizes leave a gap around `budget_bytes`."""
    return UserError(
        f"budget of {budget_bytes:,} bytes is out of reach for {name!r}: it has no size within "
        f"5 % below; the nearest are {below:,} and {above:,} bytes; choose one of them"
    )


def solve(
    name: str,
    need: Callable[[float], int],
    budget_bytes: int,
    uncompressed_bytes: int,
    *,
    least: float,
    greatest: float,
) -> float:
    """Finds by bisection the greatest value of a knob that fits a budget.

    Args:
        name: of the method.
        need: bytes for a value of the knob; never falls while the knob rises.
        budget_bytes: the budget.
        uncompressed_bytes: of the same tables; with no less than that any budget is met.
        least: of the knob's values, positive.
        greatest: of the knob's values.

    Raises:
        UserError: no value takes from 95 % to all of the budget.
    """
    low, high = least, greatest
    floor = min(CLOSE * budget_bytes, uncompressed_bytes)
    if need(low) > budget_bytes or need(high) < floor:
        raise out_of_reach(name, budget_bytes, need(low), need(high))
    if need(high) <= budget_bytes:
        return high
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if need(middle) <= budget_bytes else (low, middle)
    if need(low) < floor:
        raise unreachable(name, budget_bytes, need(low), need(high))
    return low


def check_choice(key: str, value: str, choices: object) -> None:
    """Refuses a value that is none of a `Literal`'s; jobs are checked before, code is not.

    Raises:
        UserError: names the nearest choice.
    """
    if value not in get_args(choices):
        raise UserError(f"embedding.methods.{key} = {value!r}: {nearest(value, get_args(choices))}")


def check_share(name: str, share: float | None) -> float:
    """Returns the share of its tables that a method keeps.

    Raises:
        UserError: no share was given and no budget fitted, or it is not in (0, 1].
    """
    if share is None:
        raise UserError(f"method {name!r} needs embedding.budget or embedding.methods.{name}.share")
    if not 0 < share <= 1:
        raise UserError(f"embedding.methods.{name}.share = {share}: must lie in (0, 1]")
    return share


def half_dim(name: str, table: EmbeddingBagConfig) -> int:
    """Returns D / 2, for methods that concatenate two look-ups.

    Raises:
        UserError: D is odd.
    """
    dim = int(table.embedding_dim)
    if dim % 2:
        raise UserError(
            f"embedding.dim = {dim}: {name!r} with operation 'concat' needs an even one; "
            "change it, or use 'add'"
        )
    return dim // 2
