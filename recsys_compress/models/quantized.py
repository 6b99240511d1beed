"""Linear layers as they may be served: weights in int8, inputs rounded to 7 bits."""

import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

LayerType = Literal["fp32", "int8"]
# One bit less than there are: a CPU that adds pairs of products in 16 bits would overflow with 8,
# and results would hang on the machine.
_INPUT_LEVELS = 127
_WEIGHT_LEVELS = 127


class QuantizedLinear(nn.Module):
    """y = W x + b of integers, on CPU: about twice as fast as in fp32.

    Weights are rounded to int8, by a scale for each output. Inputs are rounded to 128 levels
    between bounds that were measured on training rows, so a row's y never hangs on other rows of
    its batch; what lies below is cut, and above there is room up to twice the range. Sums of
    products are exact.

    Args:
        in_features: columns of x.
        out_features: columns of y.
        bias: whether there is a b.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.register_buffer("input_scale", torch.empty(()))
        self.register_buffer("input_zero", torch.empty((), dtype=torch.int32))
        self._packed: tuple[object, float, int] | None = None

    @classmethod
    def of(cls, layer: nn.Linear, low: float, high: float) -> "QuantizedLinear":
        """Returns a trained layer so rounded.

        Args:
            layer: the layer.
            low: least value of its inputs.
            high: the greatest.
        """
        found = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = layer.weight.detach()
        found.scale = (weight.abs().amax(1) / _WEIGHT_LEVELS).clamp_min(torch.finfo().tiny)
        found.weight = (weight / found.scale[:, None]).round().to(torch.int8)
        found.bias = None if layer.bias is None else layer.bias.detach().clone()
        low, high = min(low, 0.0), max(high, 0.0)  # 0 is kept exactly
        found.input_scale = torch.tensor(max((high - low) / _INPUT_LEVELS, 1e-12))
        found.input_zero = (-low / found.input_scale).round().to(torch.int32)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        if self._packed is None:
            self._packed = self._pack()
        packed, scale, zero = self._packed
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = multiply(x.contiguous(), scale, zero, packed)
        return y

    def _pack(self) -> tuple[object, float, int]:
        """Returns the weights in the kernel's own layout, and how inputs are rounded."""
        with warnings.catch_warnings():
            # torch is to drop tensors of quantized types, and this kernel with them. What it offers
            # instead, onednn.qlinear_pointwise, has no fast way to round the inputs yet.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            zeros = torch.zeros(len(self.scale), dtype=torch.int64)
            rounded = torch._make_per_channel_quantized_tensor(self.weight, self.scale, zeros, 0)
        packed = torch.ops.quantized.linear_prepack(rounded, self.bias)
        return packed, float(self.input_scale), int(self.input_zero)


def rounded_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the layers that int8 is for, by name: all outside of the embeddings.

    A layer with a single output stays: it has few weights, and its rounding would be the logit's.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features > 1
        and not name.startswith("embeddings.")
    }


def empty_layers(model: nn.Module) -> None:
    """Replaces a model's layers by rounded ones, whose values are still to be loaded."""
    for name, layer in rounded_layers(model).items():
        empty = QuantizedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        model.set_submodule(name, empty)


def round_layers(model: nn.Module, batches: Iterable[tuple[Tensor, KeyedJaggedTensor]]) -> None:
    """Replaces a trained model's layers by rounded ones.

    Args:
        model: in evaluation mode.
        batches: dense features and ids of training rows, to measure the bounds of inputs on.
    """
    layers = rounded_layers(model)
    bounds = dict.fromkeys(layers, (0.0, 0.0))

    def watch(name: str, x: Tensor) -> None:
        low, high = bounds[name]
        bounds[name] = min(low, float(x.min())), max(high, float(x.max()))

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for dense, sparse in batches:
            model(dense, sparse)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        model.set_submodule(name, QuantizedLinear.of(layer, *bounds[name]))
