"""Linear layers as products of two thin ones, from scratch or by atomic feature mimicking."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys_compress.config import Between
from recsys_compress.errors import UserError, nearest


class FactorizedLinear(nn.Module):
    """y = U a(V x) + c, with V (k, in), U (out, k): k (in + out) weights instead of in * out.

    In place of a linear layer W x + b whose outputs have the mean mu and the principal components
    U_k (out, k), `factors` gives U = U_k, V = U_k^T W and the bias c that make it
    U_k U_k^T (W x + b - mu) + mu. Source: Yu and Wu, "Compressing Transformers: Features Are
    Low-Rank, but Weights Are Not!", AAAI 2023; Guo et al., "Unified Low-rank Compression Framework
    for Click-through Rate Prediction", KDD 2024, who add the activation a.

    The products U V start with the variance of Xavier's normal weights, c at zero.

    Args:
        in_features: columns of x.
        out_features: columns of y.
        rank: k.
        activation: a; None for none. With it V has a bias of its own, without it c says it all.

    Attributes:
        first: V.
        second: U and c.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, rank, bias=activation is not None)
        self.activation = activation
        self.second = nn.Linear(rank, out_features)
        deviation = (2 / (in_features + out_features) / rank) ** 0.25
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        x = self.first(x)
        output: Tensor = self.second(x if self.activation is None else self.activation(x))
        return output


def candidates(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns a model's layers that can be factorized, by their names in `model.named_modules()`.

    These are the linear layers outside of the embeddings, but for those with a single output.
    """
    products = [name for name, m in model.named_modules() if isinstance(m, FactorizedLinear)]
    inside = tuple(f"{name}." for name in ["embeddings", *products])
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features > 1 and not name.startswith(inside)
    }


def factorize(model: nn.Module, ranks: Mapping[str, int], between: Between = "linear") -> None:
    """Replaces layers of a model by products of two, with values to train from scratch.

    Args:
        model: of `build_model`.
        ranks: by layer, as `candidates` names them; others stay whole.
        between: "activation" for the activation that follows the layer also between its two parts.

    Raises:
        UserError: a name or rank is wrong.
    """
    layers = candidates(model)
    for name, rank in ranks.items():
        if name not in layers:
            raise UserError(f"model.ranks: no layer {name!r} to factorize; {nearest(name, layers)}")
        layer = layers[name]
        most = min(layer.in_features, layer.out_features)
        if not 1 <= rank <= most:
            raise UserError(f"model.ranks: {rank} for {name!r} must lie in [1, {most}]")
        activation = _activation(model, name) if between == "activation" else None
        product = FactorizedLinear(layer.in_features, layer.out_features, rank, activation)
        model.set_submodule(name, product.to(layer.weight.device))


def factors(
    layer: nn.Linear, mean: Tensor, basis: Tensor, *, activation: bool = False
) -> dict[str, Tensor]:
    """Returns the state dict of the `FactorizedLinear` that mimics a trained layer.

    Args:
        layer: the layer, y = W x + b.
        mean: (out,) of its outputs, mu.
        basis: (out, k) orthonormal columns U_k.
        activation: whether there is one between.
    """
    mean, basis = mean.double(), basis.double()
    weight = layer.weight.detach().double().cpu()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double().cpu()
    inner = basis.t() @ bias
    state = {"first.weight": basis.t() @ weight, "second.weight": basis}
    if activation:
        state |= {"first.bias": inner, "second.bias": mean - basis @ (basis.t() @ mean)}
    else:
        state["second.bias"] = mean + basis @ (inner - basis.t() @ mean)
    return {name: value.float().contiguous() for name, value in state.items()}


def _activation(model: nn.Module, name: str) -> nn.Module | None:
    """Returns a new activation like the one that follows a layer in its `mlp`; None for none."""
    parent, _, child = name.rpartition(".")
    sequence = model.get_submodule(parent)
    if isinstance(sequence, nn.Sequential):
        for following in list(sequence)[int(child) + 1 :]:
            if isinstance(following, nn.Linear | FactorizedLinear):
                return None
            if isinstance(following, nn.ReLU):
                return nn.ReLU()
    return None
