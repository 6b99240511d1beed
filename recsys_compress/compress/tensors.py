"""Named tensors."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def below(prefix: str, state: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors under a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
