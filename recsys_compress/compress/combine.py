"""What stands between look-ups and features where concatenation is not enough."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.bags import Bags
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable


class Pairwise(nn.Module):
    """Combines two look-ups a feature by an elementwise sum or product.

    The look-ups are the first of all such features, then the second of each, then the only
    look-ups of other features, which pass as they are.

    Args:
        width: sum of the widths of the first look-ups.
        product: whether they are multiplied; else they are added.
    """

    def __init__(self, width: int, *, product: bool) -> None:
        super().__init__()
        self._width = width
        self._product = product

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:  # noqa: ARG002
        """Returns the features' vectors; see `Lowering.combine`."""
        if self._product:
            product: Tensor = _Product.apply(vectors, self._width)  # type: ignore[no-untyped-call]
            return product
        others = vectors.shape[1] - 2 * self._width
        # A split's backward pass is one concatenation; two slices' are two padded sums.
        first, second, rest = torch.split(vectors, [self._width, self._width, others], dim=1)
        return torch.cat([first + second, rest], dim=1) if others else first + second


class _Product(torch.autograd.Function):
    """Multiplies the first W columns by the next W; autograd's way back takes a copy more."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(vectors)
        ctx.width = width
        output = vectors.new_empty(len(vectors), vectors.shape[1] - width)
        torch.mul(vectors[:, :width], vectors[:, width : 2 * width], out=output[:, :width])
        output[:, width:] = vectors[:, 2 * width :]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (vectors,), width = ctx.saved_tensors, ctx.width
        moved = torch.empty_like(vectors)
        own = gradient[:, :width]
        torch.mul(own, vectors[:, width : 2 * width], out=moved[:, :width])
        torch.mul(own, vectors[:, :width], out=moved[:, width : 2 * width])
        moved[:, 2 * width :] = gradient[:, width:]
        return moved, None


def projected(
    tables: Sequence[EmbeddingBagConfig], dims: Mapping[str, int], *, mean: bool
) -> Lowering:
    """Returns tables narrower than D whose rows are projected to D.

    Args:
        tables: the logical tables.
        dims: width d of each physical table by name; one of D is not projected.
        mean: whether each projected table also has a mean vector, added for each id.
    """
    ordered = sorted(tables, key=lambda table: _shape(table, dims))
    narrow = any(dims[table.name] < table.embedding_dim for table in tables)
    return Lowering(
        tables=tuple(
            PhysicalTable(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=dims[table.name],
                members=(table.name,),
            )
            for table in ordered
        ),
        lookups=tuple(
            Lookup(name=feature, feature=feature, table=table.name)
            for table in ordered
            for feature in table.feature_names
        ),
        ids=nn.Identity(),
        combine=Projections(ordered, dims, mean=mean) if narrow else None,
    )


class Projections(nn.Module):
    """Projects each feature's look-up, e = x P_t + w m_t, with x (1, d), P_t (d, D), m_t (1, D).

    Here x is the weighted sum of a bag's rows and w the total weight of the bag. Features of equal
    d and D are projected in one product. The values of P start uniform in +-sqrt(3 / d), which
    gives the projected vectors the variance of the rows; m starts at zero.

    Args:
        tables: the logical tables, those of equal d and D side by side.
        dims: width d of each table by name; look-ups of width D pass as they are.
        mean: whether there is an m.
    """

    def __init__(
        self, tables: Sequence[EmbeddingBagConfig], dims: Mapping[str, int], *, mean: bool
    ) -> None:
        super().__init__()
        self.projections = nn.ParameterDict()
        self.means = nn.ParameterDict()
        self._groups: list[tuple[int, int, str, list[int]]] = []
        for (dim, out), group in itertools.groupby(tables, key=lambda t: _shape(t, dims)):
            members = list(group)
            owners = [i for i, table in enumerate(members) for _ in table.feature_names]
            name = f"{dim}x{out}" if dim < out else ""
            if name:
                weight = torch.empty(len(members), dim, out)
                bound = math.sqrt(3 / dim)
                self.projections[name] = nn.Parameter(weight.uniform_(-bound, bound))
            if name and mean:
                self.means[name] = nn.Parameter(torch.zeros(len(members), out))
            self._groups.append((len(owners), dim, name, owners))

    def forward(self, vectors: Tensor, bags: Bags) -> Tensor:
        """Returns the features' vectors; see `Lowering.combine`."""
        outputs = []
        widths = [count * dim for count, dim, _, _ in self._groups]
        parts = torch.split(vectors, widths, dim=1)
        # Only means are weighed; lengths are not looked at for nothing.
        totals: Sequence[Tensor | None] = [None] * len(self._groups)
        if len(self.means):
            counts = [count for count, _, _, _ in self._groups]
            totals = torch.split(bags.weights(), counts, dim=1)
        for part, total, (count, dim, name, owners) in zip(
            parts, totals, self._groups, strict=True
        ):
            if not name:
                outputs.append(part)
                continue
            projection = _of_features(self.projections[name], owners)
            output = torch.einsum("bfk,fkd->bfd", part.reshape(-1, count, dim), projection)
            if total is not None and name in self.means:
                output = output + total.unsqueeze(2) * _of_features(self.means[name], owners)
            outputs.append(output.flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _shape(table: EmbeddingBagConfig, dims: Mapping[str, int]) -> tuple[int, int]:
    return dims[table.name], int(table.embedding_dim)


def _of_features(parameter: Tensor, owners: list[int]) -> Tensor:
    """Returns the tables' parameters by feature; a copy only where features share a table."""
    return parameter if len(owners) == len(parameter) else parameter[owners]
