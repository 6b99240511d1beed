"""Sizes in bytes as people write them."""

import re

from recsys_compress.errors import UserError


def format_bytes(size: float) -> str:
    """Returns a size with three digits and a decimal unit, like "158 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def parse_bytes(text: str) -> int:
    """Returns the bytes that "158kB", "2MiB", "1.5 GB" or "4096" stand for.

    Raises:
        UserError: `text` is no positive size.
    """
    units = {"": 1, "b": 1} | {
        f"{prefix}{infix}b": base ** (power + 1)
        for power, prefix in enumerate("kmgt")
        for infix, base in (("", 1000), ("i", 1024))
    }
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise UserError(f"size {text!r} is not understood; write it like 158kB, 2MiB or 4096")
    return int(float(match[1]) * units[match[2].lower()])


def budget_bytes(budget: str | int, full_bytes: int) -> int:
    """Returns a budget in bytes; "0.1x" is that share of `full_bytes`.

    Raises:
        UserError: the budget is neither a size nor a positive share.
    """
    if isinstance(budget, int):
        return budget
    share = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)x\s*", budget)
    if share is None:
        return parse_bytes(budget)
    if float(share[1]) <= 0:
        raise UserError(f"budget {budget!r} is not positive; write a share like 0.1x")
    return int(float(share[1]) * full_bytes)
