"""Linear layers in int8: close to fp32, the same for any batch, and loaded as they were written."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recsys_compress.models import build_model
from recsys_compress.models.quantized import (
    QuantizedLinear,
    empty_layers,
    round_layers,
    rounded_layers,
)
from tests.models.test_models import SMALL, bags, collection


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_model(SMALL[request.param], collection(), 3).eval()


def batches(count: int = 4) -> list[tuple[torch.Tensor, object]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3), bags()) for _ in range(count)]


def test_every_models_layers_are_rounded_and_load_again(model: nn.Module) -> None:
    rows = batches()
    before = torch.cat([model(*batch) for batch in rows]).detach()
    names = list(rounded_layers(model))
    empty = copy.deepcopy(model)
    round_layers(model, rows)
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)
    after = torch.cat([model(*batch) for batch in rows])
    assert (after - before).abs().max() < 0.05 * (before.abs().max() + 1)
    empty_layers(empty)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(torch.cat([empty(*batch) for batch in rows]), after)


@given(
    rows=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_a_layer_is_within_its_rounding_and_no_row_hangs_on_another(
    rows: int, widths: tuple[int, int], bias: bool, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*widths, bias=bias)
    x = scale * torch.randn(rows, widths[0])
    low, high = float(x.min()), float(x.max())
    with torch.no_grad():
        rounded = QuantizedLinear.of(layer, low, high)
        found, exact = rounded(x), layer(x)
        # Half a step of each input and weight, times what it is multiplied by.
        steps = rounded.scale, (max(high, 0) - min(low, 0)) / 127
        error = widths[0] * (
            layer.weight.abs().amax(1) * steps[1] + x.abs().amax() * steps[0] + steps[0] * steps[1]
        )
        assert ((found - exact).abs() <= error + 1e-5 * scale).all()
        assert torch.equal(rounded(x[-1:]), found[-1:])


def test_what_is_below_the_bounds_is_cut_and_zeros_stay() -> None:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        rounded = QuantizedLinear.of(layer, -1.0, 1.0)
        assert torch.allclose(rounded(torch.zeros(1, 2)), layer.bias)
        assert torch.equal(rounded(torch.full((1, 2), -9.0)), rounded(torch.full((1, 2), -1.01)))
        # Above there is room up to twice the range.
        assert torch.allclose(
            rounded(torch.full((1, 2), 1.5)), layer(torch.full((1, 2), 1.5)), atol=0.1
        )
        nothing = QuantizedLinear.of(nn.Linear(2, 3, bias=False), 0.0, 0.0)
        assert torch.equal(nothing(torch.zeros(1, 2)), torch.zeros(1, 3))
