"""Named tensors."""

from collections.abc import Mapping

from torch import Tensor


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
